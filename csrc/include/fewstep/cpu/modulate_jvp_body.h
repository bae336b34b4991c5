// The kernel of modulate_jvp for the rows of one task; a body of foreach_isa.h.

#include "fewstep/cpu/row_body.h"

template <typename T>
struct ModulateRow {
    const T *x, *y, *gate, *t_x, *t_y, *t_gate;
    T *out, *t_out;
};

template <bool kTail, typename T>
[[gnu::always_inline]] inline void modulate_columns(const ModulateRow<T>& row, std::int64_t i,
                                                    std::int64_t n) {
    using V = Vec<acc_t<T>>;
    const V y = load_columns<kTail>(row.y + i, n), gate = load_columns<kTail>(row.gate + i, n);
    store_columns<kTail>(row.out + i, load_columns<kTail>(row.x + i, n) + gate * y, n);
    const V t_gated = sum_of_products<acc_t<T>>(gate, load_columns<kTail>(row.t_y + i, n),
                                                load_columns<kTail>(row.t_gate + i, n), y);
    store_columns<kTail>(row.t_out + i, load_columns<kTail>(row.t_x + i, n) + t_gated, n);
}

template <typename T>
void modulate_rows(const ModulateTask<T>& x) {
    constexpr std::int64_t kWidth = Lanes<acc_t<T>>::kCount;
    for (std::int64_t at = 0; at < x.count; ++at) {
        const ModulateRow<T> row{x.x[at],   x.y[at],      x.gate[at], x.t_x[at],
                                 x.t_y[at], x.t_gate[at], x.out[at],  x.t_out[at]};
        std::int64_t i = 0;
        for (; i + kWidth <= x.columns; i += kWidth) modulate_columns<false>(row, i, kWidth);
        if (i < x.columns) modulate_columns<true>(row, i, x.columns - i);
    }
}
