// The kernel of token_scatter for one row; a body of foreach_isa.h. `to` may be `base`.

#include "fewstep/cpu/row_body.h"

template <typename T, bool kResidual>
struct GateRow {
    const T *value, *gate, *base;
    T* to;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        Vec<acc_t<T>> y = load_columns<kTail>(gate + i, n) * load_columns<kTail>(value + i, n);
        if constexpr (kResidual) y = load_columns<kTail>(base + i, n) + y;
        store_columns<kTail>(to + i, y, n);
    }
};

template <typename T, bool kResidual>
void gated_row(const T* value, const T* gate, const T* base, T* to, std::int64_t columns) {
    GateRow<T, kResidual> row{value, gate, base, to};
    for_columns<acc_t<T>>(row, columns);
}
