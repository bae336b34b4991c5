// The kernel of modulate_jvp for the rows of one task; a body of foreach_isa.h. Every operand is a
// row of the accumulation type: widened into scratch, or of ones or zeros where it is absent.

#include "fewstep/cpu/row_body.h"

template <typename T>
void modulate_rows(const ModulateTask<T>& x, const ModulateWorkspace<acc_t<T>>& w) {
    using Acc = acc_t<T>;
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t row = 0; row < x.count; ++row) {
        const auto operand = [&](const Rows<const T>& from, Acc* scratch, const Acc* absent) {
            return modulation_row<T, Acc>(from, row, x.columns, w.padded, 0, scratch, absent);
        };
        const Acc* gate = operand(x.gate, w.gate, w.ones);
        const Acc* t_gate = operand(x.t_gate, w.t_gate, w.zeros);
        const Acc* t_y = operand(x.t_y, w.t_y, w.zeros);
        const Acc* t_x = operand(x.t_x, w.t_x, w.zeros);
        const Acc* y = operand(x.y, w.y, w.zeros);
        const Acc* base = operand(x.x, w.x, w.zeros);
        for (std::int64_t i = 0; i < w.padded; i += kWidth) {
            store(w.out + i, load(base + i) + load(gate + i) * load(y + i));
        }
        narrow_row(w.out, x.columns, x.out[row]);
        for (std::int64_t i = 0; i < w.padded; i += kWidth) {
            const Vec<Acc> t_gated =
                load(gate + i) * load(t_y + i) + load(t_gate + i) * load(y + i);
            store(w.out + i, load(t_x + i) + t_gated);
        }
        narrow_row(w.out, x.columns, x.t_out[row]);
    }
}
