// The kernel of modulate_jvp_backward for the rows of one task; a body of foreach_isa.h. Every
// operand is a row of the accumulation type: widened into scratch, or of ones or zeros where it is
// absent.

#include "fewstep/cpu/row_body.h"

// out = a b + c d
template <typename Acc>
void sum_of_products(const Acc* a, const Acc* b, const Acc* c, const Acc* d, std::int64_t padded,
                     Acc* out) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < padded; i += kWidth) {
        store(out + i, load(a + i) * load(b + i) + load(c + i) * load(d + i));
    }
}

template <typename Acc>
void add_row(const Acc* from, std::int64_t n, Acc* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] += from[i];
}

template <typename T>
void modulate_backward_rows(const ModulateBackwardTask<T>& x,
                            const ModulateBackwardWorkspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    Acc* gate_sums = static_cast<Acc*>(x.gate_sums);
    Acc* t_gate_sums = static_cast<Acc*>(x.t_gate_sums);
    for (std::int64_t row = 0; row < x.count; ++row) {
        const auto operand = [&](const Rows<const T>& from, Acc* scratch, const Acc* absent) {
            return modulation_row<T, Acc>(from, row, x.columns, w.padded, 0, scratch, absent);
        };
        const Acc* gate = operand(x.gate, w.gate, w.ones);
        const Acc* t_gate = operand(x.t_gate, w.t_gate, w.zeros);
        const Acc* d_out = operand(x.d_out, w.d_out, w.zeros);
        const Acc* dt_out = operand(x.dt_out, w.dt_out, w.zeros);
        if (x.d_y) {
            sum_of_products(gate, d_out, t_gate, dt_out, w.padded, w.out);
            narrow_row(w.out, x.columns, x.d_y[row]);
        }
        if (x.d_t_y) {
            sum_of_products(gate, dt_out, w.zeros, w.zeros, w.padded, w.out);
            narrow_row(w.out, x.columns, x.d_t_y[row]);
        }
        const bool wants_gate = x.d_gate || gate_sums != nullptr;
        const bool wants_t_gate = x.d_t_gate || t_gate_sums != nullptr;
        if (!wants_gate && !wants_t_gate) continue;
        const Acc* y = operand(x.y, w.y, w.zeros);
        if (wants_gate) {
            const Acc* t_y = operand(x.t_y, w.t_y, w.zeros);
            sum_of_products(d_out, y, dt_out, t_y, w.padded, w.out);
            if (x.d_gate) narrow_row(w.out, x.columns, x.d_gate[row]);
            if (gate_sums != nullptr) add_row(w.out, x.columns, gate_sums);
        }
        if (wants_t_gate) {
            sum_of_products(dt_out, y, w.zeros, w.zeros, w.padded, w.out);
            if (x.d_t_gate) narrow_row(w.out, x.columns, x.d_t_gate[row]);
            if (t_gate_sums != nullptr) add_row(w.out, x.columns, t_gate_sums);
        }
    }
}
