// The kernel of norm_quantize_int8 for the rows of one task; a body of foreach_isa.h. kNormBlock
// rows of the norm are written to scratch that stays in the first-level cache, and quantised there.

#include "fewstep/cpu/norm_jvp_body.h"

template <typename T>
struct QuantizeNorm {
    const NormTask<T>& x;
    const NormWorkspace<acc_t<T>>& w;
    const NormQuantizeTask<T>& to;

    template <int kRows>
    void at(std::int64_t row) const {
        norm_block<T, false, kRows>(x, w, row, x.y);
        for (int k = 0; k < kRows; ++k) {
            std::int8_t* const q = to.q + (row + k) * x.columns;
            if (to.prepare->active()) {
                to.prepare->apply(x.y[k], to.prepared);
                to.scale[row + k] = to.quantize_prepared(to.prepared, q, x.columns);
            } else {
                to.scale[row + k] = to.quantize(x.y[k], q, x.columns);
            }
        }
    }
};

template <typename T>
void norm_quantize_rows(const NormTask<T>& x, const NormWorkspace<acc_t<T>>& w,
                        const NormQuantizeTask<T>& to) {
    for_blocks<T, false>(x, w, QuantizeNorm<T>{x, w, to});
}
