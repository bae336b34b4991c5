// The kernel of norm_jvp for the rows of one task; a body of foreach_isa.h. A row comes from memory
// once: its means, its variance and its results are three passes, the later ones from cache, and
// each widens it again. The modulation and the parameters are taken together,
//   P = (1 + scale) weight     Q = (1 + scale) bias + shift     y   = P n + Q
//   R = t_scale weight         S = t_scale bias + t_shift       t_y = P t_n + R n + S
// and kNormBlock rows that share them write their results together, so that P to S, which are
// longer than the rows, are read once for all. The bits of y don't depend on the tangents.

#include "fewstep/cpu/row_body.h"

template <typename T, bool kTangent>
void fold_modulation(const NormTask<T>& x, std::int64_t row, const NormWorkspace<acc_t<T>>& w) {
    const T *scale = x.scale[row], *shift = x.shift[row];
    for (std::int64_t i = 0; i < x.columns; ++i) {
        const acc_t<T> factor = 1 + to_acc(scale[i]);
        w.p[i] = factor * w.weight[i];
        w.q[i] = factor * w.bias[i] + to_acc(shift[i]);
    }
    if constexpr (!kTangent) return;
    const T *t_scale = x.t_scale[row], *t_shift = x.t_shift[row];
    for (std::int64_t i = 0; i < x.columns; ++i) {
        const acc_t<T> t_factor = to_acc(t_scale[i]);
        w.r[i] = t_factor * w.weight[i];
        w.s[i] = t_factor * w.bias[i] + to_acc(t_shift[i]);
    }
}

template <typename T, bool kTangent>
struct AddRow {
    const T *x, *t_x;
    Vec<acc_t<T>> sum, t_sum;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        sum += load_columns<kTail>(x + i, n);
        if constexpr (kTangent) t_sum += load_columns<kTail>(t_x + i, n);
    }
};

// The sums of u u and u t_u.
template <typename T, bool kTangent>
struct AddSquares {
    const T *x, *t_x;
    acc_t<T> mean, t_mean;
    Vec<acc_t<T>> square, product;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        using Acc = acc_t<T>;
        const Vec<Acc> u = keep_columns<kTail, Acc>(load_columns<kTail>(x + i, n) - mean, n);
        square += u * u;
        if constexpr (kTangent) product += u * (load_columns<kTail>(t_x + i, n) - t_mean);
    }
};

template <typename Acc>
struct NormStats {
    Acc mean, rstd, t_mean, a;
};

template <typename T, bool kTangent>
NormStats<acc_t<T>> take_statistics(const NormTask<T>& x, std::int64_t row) {
    using Acc = acc_t<T>;
    const Acc columns = static_cast<Acc>(x.columns);
    NormStats<Acc> stats{};
    if (x.centred) {
        AddRow<T, kTangent> sums{x.x[row], x.t_x[row], {}, {}};
        for_columns<Acc>(sums, x.columns);
        stats.mean = add_lanes<Acc>(sums.sum) / columns;
        if constexpr (kTangent) stats.t_mean = add_lanes<Acc>(sums.t_sum) / columns;
    }
    AddSquares<T, kTangent> sums{x.x[row], x.t_x[row], stats.mean, stats.t_mean, {}, {}};
    for_columns<Acc>(sums, x.columns);
    const Acc variance = add_lanes<Acc>(sums.square) / columns;
    stats.rstd = 1 / std::sqrt(variance + static_cast<Acc>(x.eps));
    if constexpr (kTangent) stats.a = stats.rstd * (add_lanes<Acc>(sums.product) / columns);
    return stats;
}

template <typename T, bool kTangent, int kRows>
struct WriteRows {
    const NormTask<T>& x;
    const NormWorkspace<acc_t<T>>& w;
    const NormStats<acc_t<T>>* stats;
    std::int64_t row;
    Rows<T> y;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t columns) {
        using V = Vec<acc_t<T>>;
        const V p = load(w.p + i), q = load(w.q + i), r = load(w.r + i), s = load(w.s + i);
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
            const auto& of = stats[k];
            const V n = (load_columns<kTail>(x.x[row + k] + i, columns) - of.mean) * of.rstd;
            store_columns<kTail>(y[k] + i, p * n + q, columns);
            if constexpr (kTangent) {
                const V t_u = load_columns<kTail>(x.t_x[row + k] + i, columns) - of.t_mean;
                const V t_n = (t_u - n * of.a) * of.rstd;
                store_columns<kTail>(x.t_y[row + k] + i, p * t_n + (r * n + s), columns);
            }
        }
    }
};

// y is where the first of kRows rows goes.
template <typename T, bool kTangent, int kRows>
void norm_block(const NormTask<T>& x, const NormWorkspace<acc_t<T>>& w, std::int64_t row,
                const Rows<T>& y) {
    using Acc = acc_t<T>;
    NormStats<Acc> stats[kRows];
    for (int k = 0; k < kRows; ++k) {
        stats[k] = take_statistics<T, kTangent>(x, row + k);
        if (x.stats == nullptr) continue;
        Acc* const to = static_cast<Acc*>(x.stats) + (row + k) * 4;
        to[0] = stats[k].mean;
        to[1] = stats[k].rstd;
        to[2] = stats[k].t_mean;
        to[3] = stats[k].a;
    }
    WriteRows<T, kTangent, kRows> write{x, w, stats, row, y};
    for_columns<Acc>(write, x.columns);
}

// Calls block.at<rows>(row) for all rows of the task, with their modulation folded.
template <typename T, bool kTangent, typename Block>
void for_blocks(const NormTask<T>& x, const NormWorkspace<acc_t<T>>& w, const Block& block) {
    const bool shared = x.scale.stride == 0 && x.shift.stride == 0 && x.t_scale.stride == 0 &&
                        x.t_shift.stride == 0;
    std::int64_t row = 0;
    if (shared) {
        fold_modulation<T, kTangent>(x, 0, w);
        for (; row + kNormBlock <= x.count; row += kNormBlock) block.template at<kNormBlock>(row);
    }
    for (; row < x.count; ++row) {
        if (!shared) fold_modulation<T, kTangent>(x, row, w);
        block.template at<1>(row);
    }
}

template <typename T, bool kTangent>
struct WriteNorm {
    const NormTask<T>& x;
    const NormWorkspace<acc_t<T>>& w;

    template <int kRows>
    void at(std::int64_t row) const {
        norm_block<T, kTangent, kRows>(x, w, row, Rows<T>{x.y[row], x.y.stride});
    }
};

template <typename T>
void norm_rows(const NormTask<T>& x, const NormWorkspace<acc_t<T>>& w) {
    if (x.t_y) {
        for_blocks<T, true>(x, w, WriteNorm<T, true>{x, w});
    } else {
        for_blocks<T, false>(x, w, WriteNorm<T, false>{x, w});
    }
}
