// The kernel of modulate_jvp_backward for the rows of one task; a body of foreach_isa.h. Rows are
// taken kRows at a time, so that what is summed over rows is read and written once for them all.

#include "fewstep/cpu/row_body.h"

template <bool kTail, int kRows, typename T>
[[gnu::always_inline]] inline void pull_back_columns(const ModulateBackwardTask<T>& x,
                                                     std::int64_t row, std::int64_t i,
                                                     std::int64_t n, acc_t<T>* gate_sums,
                                                     acc_t<T>* t_gate_sums) {
    using V = Vec<acc_t<T>>;
    V gate_sum = {}, t_gate_sum = {};
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        const std::int64_t at = row + r;
        const V a = load_columns<kTail>(x.d_out[at] + i, n);
        const V b = load_columns<kTail>(x.dt_out[at] + i, n);
        const V gate = load_columns<kTail>(x.gate[at] + i, n);
        if (x.d_y) {
            const V t_gate = load_columns<kTail>(x.t_gate[at] + i, n);
            store_columns<kTail>(x.d_y[at] + i, gate * a + t_gate * b, n);
        }
        if (x.d_t_y) store_columns<kTail>(x.d_t_y[at] + i, gate * b, n);
        if (!x.wants_gates) continue;
        const V y = load_columns<kTail>(x.y[at] + i, n);
        const V d_gate = a * y + b * load_columns<kTail>(x.t_y[at] + i, n), d_t_gate = b * y;
        if (x.d_gate) store_columns<kTail>(x.d_gate[at] + i, d_gate, n);
        if (x.d_t_gate) store_columns<kTail>(x.d_t_gate[at] + i, d_t_gate, n);
        gate_sum += d_gate;
        t_gate_sum += d_t_gate;
    }
    if (gate_sums != nullptr) store(gate_sums + i, load(gate_sums + i) + gate_sum);
    if (t_gate_sums != nullptr) store(t_gate_sums + i, load(t_gate_sums + i) + t_gate_sum);
}

template <int kRows, typename T>
void pull_back_rows(const ModulateBackwardTask<T>& x, std::int64_t row, acc_t<T>* gate_sums,
                    acc_t<T>* t_gate_sums) {
    constexpr std::int64_t kWidth = Lanes<acc_t<T>>::kCount;
    std::int64_t i = 0;
    for (; i + kWidth <= x.columns; i += kWidth) {
        pull_back_columns<false, kRows>(x, row, i, kWidth, gate_sums, t_gate_sums);
    }
    if (i == x.columns) return;
    pull_back_columns<true, kRows>(x, row, i, x.columns - i, gate_sums, t_gate_sums);
}

// The sums, null where they are not wanted, are of whole vectors and hold zeros.
template <typename T>
void modulate_backward_rows(const ModulateBackwardTask<T>& x, acc_t<T>* gate_sums,
                            acc_t<T>* t_gate_sums) {
    constexpr int kRows = 4;
    std::int64_t row = 0;
    for (; row + kRows <= x.count; row += kRows) {
        pull_back_rows<kRows>(x, row, gate_sums, t_gate_sums);
    }
    for (; row < x.count; ++row) pull_back_rows<1>(x, row, gate_sums, t_gate_sums);
}
