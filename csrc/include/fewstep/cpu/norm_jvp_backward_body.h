// The kernel of norm_jvp_backward for the rows of one task; a body of foreach_isa.h. Two passes
// over a row, the second from cache: the means over it, then the gradients of it and what is summed
// over rows. With
//   P = (1 + scale) weight     R = t_scale weight     g = P d_y + R dt_y     h = P dt_y
// every sum over rows that share a modulation follows from four,
//   s0 = sum d_y n + dt_y t_n     s1 = sum dt_y n     s2 = sum d_y     s3 = sum dt_y:
//   weight: (1 + scale) s0 + t_scale s1     scale: weight s0 + bias s2        shift: s2
//   bias:   (1 + scale) s2 + t_scale s3     t_scale: weight s1 + bias s3      t_shift: s3
// Rows are taken kBlock at a time in the second pass, so that P, R and the sums, which are longer
// than the rows, are read and written once for them all.

#include "fewstep/cpu/row_body.h"

template <typename T>
void fold_modulation(const NormBackwardTask<T>& x, std::int64_t row,
                     const NormBackwardWorkspace<acc_t<T>>& w) {
    const T *scale = x.scale[row], *t_scale = x.t_scale[row];
    for (std::int64_t i = 0; i < x.columns; ++i) {
        w.factor[i] = 1 + to_acc(scale[i]);
        w.t_factor[i] = to_acc(t_scale[i]);
        w.p[i] = w.factor[i] * w.weight[i];
        w.r[i] = w.t_factor[i] * w.weight[i];
    }
}

// A row's input and cotangents at some columns, as the formulas name them.
template <typename T>
struct Columns {
    using V = Vec<acc_t<T>>;
    V a, b, n, t_n, g, h;  // a and b are d_y and dt_y

    template <bool kTail>
    [[gnu::always_inline]] void read(const NormBackwardTask<T>& x, std::int64_t row,
                                     const acc_t<T>* stats, const V& p, const V& r, std::int64_t i,
                                     std::int64_t columns) {
        a = load_columns<kTail>(x.d_y[row] + i, columns);
        b = load_columns<kTail>(x.dt_y[row] + i, columns);
        n = (load_columns<kTail>(x.x[row] + i, columns) - stats[0]) * stats[1];
        t_n = (load_columns<kTail>(x.t_x[row] + i, columns) - stats[2] - n * stats[3]) * stats[1];
        // Of the same bits in both passes: a row of one column has no gradient. (The zero keeps the
        // compiler from contracting the product with what it is used in.)
        g = sum_of_products<acc_t<T>>(p, a, r, b);
        h = p * b + acc_t<T>(0);
    }
};

template <typename T>
struct AddProducts {
    const NormBackwardTask<T>& x;
    const NormBackwardWorkspace<acc_t<T>>& w;
    const acc_t<T>* stats;
    std::int64_t row;
    Vec<acc_t<T>> g, h, h_n, along_n;

    // Past the row's end P, R and the cotangents are zero, so g and h are.
    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t columns) {
        Columns<T> of;
        of.template read<kTail>(x, row, stats, load(w.p + i), load(w.r + i), i, columns);
        g += of.g;
        h += of.h;
        h_n += of.h * of.n;
        along_n += of.g * of.n + of.h * of.t_n;
    }
};

// <g>, <h>, <h n>, and <g n> + <h t_n>, which both go along n in d_x.
template <typename Acc>
struct PulledMeans {
    Acc g, h, h_n, along_n;
};

template <typename T>
PulledMeans<acc_t<T>> take_means(const NormBackwardTask<T>& x,
                                 const NormBackwardWorkspace<acc_t<T>>& w, const acc_t<T>* stats,
                                 std::int64_t row) {
    using Acc = acc_t<T>;
    AddProducts<T> sums{x, w, stats, row, {}, {}, {}, {}};
    for_columns<Acc>(sums, x.columns);
    const Acc columns = static_cast<Acc>(x.columns);
    return {x.centred ? add_lanes<Acc>(sums.g) / columns : 0,
            x.centred ? add_lanes<Acc>(sums.h) / columns : 0, add_lanes<Acc>(sums.h_n) / columns,
            add_lanes<Acc>(sums.along_n) / columns};
}

template <typename T, bool kSums, int kRows>
struct PullBack {
    const NormBackwardTask<T>& x;
    const NormBackwardWorkspace<acc_t<T>>& w;
    const acc_t<T>* stats;
    const PulledMeans<acc_t<T>>* means;
    std::int64_t row;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t columns) {
        using V = Vec<acc_t<T>>;
        const V p = load(w.p + i), r = load(w.r + i);
        V s0 = {}, s1 = {}, s2 = {}, s3 = {};
#pragma GCC unroll 4
        for (int k = 0; k < kRows; ++k) {
            const acc_t<T>* const row_stats = stats + k * 4;
            const PulledMeans<acc_t<T>>& mean = means[k];
            Columns<T> of;
            of.template read<kTail>(x, row + k, row_stats, p, r, i, columns);
            const acc_t<T> rstd = row_stats[1];
            const V d_t_x = ((of.h - mean.h) - of.n * mean.h_n) * rstd;
            if (x.d_t_x) store_columns<kTail>(x.d_t_x[row + k] + i, d_t_x, columns);
            if (x.d_x) {
                const V d_x = (of.g - mean.g) - of.n * mean.along_n - d_t_x * row_stats[3] -
                              of.t_n * mean.h_n;
                store_columns<kTail>(x.d_x[row + k] + i, d_x * rstd, columns);
            }
            if constexpr (kSums) {
                s0 += of.a * of.n + of.b * of.t_n;
                s1 += of.b * of.n;
                s2 += of.a;
                s3 += of.b;
            }
        }
        if constexpr (kSums) {
            store(w.s[0] + i, load(w.s[0] + i) + s0);
            store(w.s[1] + i, load(w.s[1] + i) + s1);
            store(w.s[2] + i, load(w.s[2] + i) + s2);
            store(w.s[3] + i, load(w.s[3] + i) + s3);
        }
    }
};

template <typename T, bool kSums, int kRows>
void pull_back_block(const NormBackwardTask<T>& x, const NormBackwardWorkspace<acc_t<T>>& w,
                     std::int64_t row) {
    using Acc = acc_t<T>;
    const Acc* const stats = static_cast<const Acc*>(x.stats) + row * 4;
    PulledMeans<Acc> means[kRows] = {};
    for (int k = 0; k < kRows && (x.d_x || x.d_t_x); ++k) {
        means[k] = take_means(x, w, stats + k * 4, row + k);
    }
    PullBack<T, kSums, kRows> pull{x, w, stats, means, row};
    for_columns<Acc>(pull, x.columns);
}

// What `count` rows that share a modulation give to the sums over columns, or the gradients of the
// modulation of one row.
template <typename T>
void finish_sums(const NormBackwardTask<T>& x, const NormBackwardWorkspace<acc_t<T>>& w,
                 std::int64_t row) {
    using Acc = acc_t<T>;
    const Acc* const s[4] = {w.s[0], w.s[1], w.s[2], w.s[3]};
    const auto add = [&w](int which, const Acc* a, const Acc* y, const Acc* b, const Acc* z) {
        if (w.sums[which] != nullptr) add_products(a, y, b, z, w.padded, w.sums[which]);
    };
    add(0, w.factor, s[0], w.t_factor, s[1]);
    add(1, w.factor, s[2], w.t_factor, s[3]);
    add(2, w.weight, s[0], w.bias, s[2]);
    add(3, w.ones, s[2], w.zeros, s[2]);
    add(4, w.weight, s[1], w.bias, s[3]);
    add(5, w.ones, s[3], w.zeros, s[3]);
    for (std::int64_t i = 0; x.d_scale && i < x.columns; ++i) {
        x.d_scale[row][i] = Convert<T>::from(w.weight[i] * s[0][i] + w.bias[i] * s[2][i]);
    }
    for (std::int64_t i = 0; x.d_t_scale && i < x.columns; ++i) {
        x.d_t_scale[row][i] = Convert<T>::from(w.weight[i] * s[1][i] + w.bias[i] * s[3][i]);
    }
}

template <typename T, bool kSums>
void pull_back_task(const NormBackwardTask<T>& x, const NormBackwardWorkspace<acc_t<T>>& w) {
    constexpr int kBlock = 4;
    const bool shared = x.scale.stride == 0 && x.t_scale.stride == 0 && !x.d_scale && !x.d_t_scale;
    for (std::int64_t row = 0; row < x.count;) {
        const std::int64_t end = shared ? x.count : row + 1, first = row;
        fold_modulation(x, row, w);
        for (acc_t<T>* sum : w.s) std::fill_n(sum, w.padded, acc_t<T>(0));
        for (; row + kBlock <= end; row += kBlock) pull_back_block<T, kSums, kBlock>(x, w, row);
        for (; row < end; ++row) pull_back_block<T, kSums, 1>(x, w, row);
        if constexpr (kSums) finish_sums(x, w, first);
    }
}

template <typename T>
void norm_backward_rows(const NormBackwardTask<T>& x, const NormBackwardWorkspace<acc_t<T>>& w) {
    bool wants_sums = x.d_scale || x.d_t_scale;
    for (const acc_t<T>* sum : w.sums) wants_sums |= sum != nullptr;
    return wants_sums ? pull_back_task<T, true>(x, w) : pull_back_task<T, false>(x, w);
}
