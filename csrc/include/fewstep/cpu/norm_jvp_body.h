// The kernel of norm_jvp for the rows of one task; a body of foreach_isa.h. Each step is a loop
// over the row in scratch, which stays in the first-level cache. The primal is finished before the
// tangent starts and never sees it, so its bits don't depend on it.

#include "fewstep/cpu/row_body.h"

template <typename Acc>
void modulate_primal(const NormWorkspace<Acc>& w, const Acc* factor, const Acc* shift) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < w.padded; i += kWidth) {
        const Vec<Acc> z = load(w.n + i) * load(w.weight + i) + load(w.bias + i);
        store(w.out + i, z * load(factor + i) + load(shift + i));
    }
}

// w.t holds t_u where kHasTX.
template <bool kHasTX, bool kHasTScale, typename Acc>
void modulate_tangent(const NormWorkspace<Acc>& w, Acc rstd, Acc a, const Acc* factor,
                      const Acc* t_scale, const Acc* t_shift) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < w.padded; i += kWidth) {
        const Vec<Acc> n = load(w.n + i), weight = load(w.weight + i);
        Vec<Acc> t_y = load(t_shift + i);
        if constexpr (kHasTScale) t_y += load(t_scale + i) * (n * weight + load(w.bias + i));
        if constexpr (kHasTX) {
            t_y += load(factor + i) * (rstd * (load(w.t + i) - n * a) * weight);
        }
        store(w.out + i, t_y);
    }
}

template <typename T>
void norm_rows(const NormTask<T>& x, const NormWorkspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    const Acc columns = static_cast<Acc>(x.columns);
    for (std::int64_t row = 0; row < x.count; ++row) {
        const Acc* factor =
            modulation_row<T, Acc>(x.scale, row, x.columns, w.padded, 1, w.factor, w.ones);
        const Acc* shift =
            modulation_row<T, Acc>(x.shift, row, x.columns, w.padded, 0, w.shift, w.zeros);
        widen_row(x.x[row], x.columns, w.padded, w.n);
        const Acc mean = x.centred ? sum_row(w.n, w.padded) / columns : 0;
        if (x.centred) subtract_row(w.n, mean, x.columns, w.padded);
        const Acc variance = dot_row(w.n, w.n, w.padded) / columns;
        const Acc rstd = 1 / std::sqrt(variance + static_cast<Acc>(x.eps));
        scale_row(w.n, rstd, w.padded);
        modulate_primal(w, factor, shift);
        narrow_row(w.out, x.columns, x.y[row]);

        Acc t_mean = 0, a = 0;
        if (x.t_x) {
            widen_row(x.t_x[row], x.columns, w.padded, w.t);
            t_mean = x.centred ? sum_row(w.t, w.padded) / columns : 0;
            if (x.centred) subtract_row(w.t, t_mean, x.columns, w.padded);
            a = dot_row(w.n, w.t, w.padded) / columns;
        }
        if (x.t_y) {
            const Acc* t_scale =
                modulation_row<T, Acc>(x.t_scale, row, x.columns, w.padded, 0, w.t_scale, w.zeros);
            const Acc* t_shift =
                modulation_row<T, Acc>(x.t_shift, row, x.columns, w.padded, 0, w.t_shift, w.zeros);
            if (x.t_x && x.t_scale) {
                modulate_tangent<true, true>(w, rstd, a, factor, t_scale, t_shift);
            } else if (x.t_x) {
                modulate_tangent<true, false>(w, rstd, a, factor, t_scale, t_shift);
            } else if (x.t_scale) {
                modulate_tangent<false, true>(w, rstd, a, factor, t_scale, t_shift);
            } else {
                modulate_tangent<false, false>(w, rstd, a, factor, t_scale, t_shift);
            }
            narrow_row(w.out, x.columns, x.t_y[row]);
        }
        Acc* stats = static_cast<Acc*>(x.stats) + row * 4;
        stats[0] = mean;
        stats[1] = rstd;
        stats[2] = t_mean;
        stats[3] = a;
    }
}
