// The kernel of norm_jvp_backward for the rows of one task; a body of foreach_isa.h. Each step is a
// loop over the row in scratch. w.sums[i] is null where that sum over the columns is not wanted.

#include "fewstep/cpu/row_body.h"

// n and t_n from the row and its statistics, zero in the padding.
template <typename T, typename Acc>
void rebuild_row(const NormBackwardTask<T>& x, const NormBackwardWorkspace<Acc>& w,
                 std::int64_t row, const Acc* stats) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const Acc rstd = stats[1], a = stats[3];
    widen_row(x.x[row], x.columns, w.padded, w.n);
    subtract_row(w.n, stats[0], x.columns, w.padded);
    scale_row(w.n, rstd, w.padded);
    if (!x.t_x) return;  // t_n stays zero
    widen_row(x.t_x[row], x.columns, w.padded, w.t_n);
    subtract_row(w.t_n, stats[2], x.columns, w.padded);
    for (std::int64_t i = 0; i < w.padded; i += kWidth) {
        store(w.t_n + i, rstd * (load(w.t_n + i) - load(w.n + i) * a));
    }
}

template <typename Acc>
[[gnu::always_inline]] inline void add_to(Acc* sums, std::int64_t i, const Vec<Acc>& value) {
    if (sums != nullptr) store(sums + i, load(sums + i) + value);
}

// g, h, d_scale and d_t_scale of the row, and its part of the sums over the columns.
template <typename Acc>
void pull_back_modulation(const NormBackwardWorkspace<Acc>& w, const Acc* d_y, const Acc* dt_y,
                          const Acc* factor, const Acc* t_scale) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < w.padded; i += kWidth) {
        const Vec<Acc> a = load(d_y + i), b = load(dt_y + i), weight = load(w.weight + i);
        const Vec<Acc> n = load(w.n + i), t_n = load(w.t_n + i);
        const Vec<Acc> z = n * weight + load(w.bias + i);
        const Vec<Acc> d_tz = load(factor + i) * b;
        const Vec<Acc> d_z = load(factor + i) * a + load(t_scale + i) * b;
        const Vec<Acc> d_scale = a * z + b * (t_n * weight), d_t_scale = b * z;
        store(w.g + i, d_z * weight);
        store(w.h + i, d_tz * weight);
        store(w.d_scale + i, d_scale);
        store(w.d_t_scale + i, d_t_scale);
        add_to(w.sums[0], i, d_z * n + d_tz * t_n);
        add_to(w.sums[1], i, d_z);
        add_to(w.sums[2], i, d_scale);
        add_to(w.sums[3], i, a);
        add_to(w.sums[4], i, d_t_scale);
        add_to(w.sums[5], i, b);
    }
}

// g becomes d_x and h becomes d_t_x.
template <typename Acc>
void pull_back_norm(const NormBackwardWorkspace<Acc>& w, const Acc* stats, Acc columns,
                    bool centred) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    const Acc rstd = stats[1], a = stats[3];
    const Acc g_mean = centred ? sum_row(w.g, w.padded) / columns : 0;
    const Acc h_mean = centred ? sum_row(w.h, w.padded) / columns : 0;
    const Acc h_n = dot_row(w.h, w.n, w.padded) / columns;
    // The two terms along n of d_x in one.
    const Acc along_n = (dot_row(w.g, w.n, w.padded) + dot_row(w.h, w.t_n, w.padded)) / columns;
    for (std::int64_t i = 0; i < w.padded; i += kWidth) {
        const Vec<Acc> n = load(w.n + i), t_n = load(w.t_n + i);
        const Vec<Acc> d_t_x = rstd * ((load(w.h + i) - h_mean) - n * h_n);
        store(w.h + i, d_t_x);
        const Vec<Acc> d_x = (load(w.g + i) - g_mean) - n * along_n - d_t_x * a - t_n * h_n;
        store(w.g + i, rstd * d_x);
    }
}

template <typename T>
void norm_backward_rows(const NormBackwardTask<T>& x, const NormBackwardWorkspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    for (std::int64_t row = 0; row < x.count; ++row) {
        const Acc* stats = static_cast<const Acc*>(x.stats) + row * 4;
        const Acc* factor =
            modulation_row<T, Acc>(x.scale, row, x.columns, w.padded, 1, w.factor, w.ones);
        const Acc* t_scale =
            modulation_row<T, Acc>(x.t_scale, row, x.columns, w.padded, 0, w.t_scale, w.zeros);
        const Acc* d_y = modulation_row<T, Acc>(x.d_y, row, x.columns, w.padded, 0, w.d_y, w.zeros);
        const Acc* dt_y =
            modulation_row<T, Acc>(x.dt_y, row, x.columns, w.padded, 0, w.dt_y, w.zeros);
        rebuild_row(x, w, row, stats);
        pull_back_modulation(w, d_y, dt_y, factor, t_scale);
        if (x.d_scale) narrow_row(w.d_scale, x.columns, x.d_scale[row]);
        if (x.d_t_scale) narrow_row(w.d_t_scale, x.columns, x.d_t_scale[row]);
        if (!x.d_x && !x.d_t_x) continue;
        pull_back_norm(w, stats, static_cast<Acc>(x.columns), x.centred);
        if (x.d_x) narrow_row(w.g, x.columns, x.d_x[row]);
        if (x.d_t_x) narrow_row(w.h, x.columns, x.d_t_x[row]);
    }
}
