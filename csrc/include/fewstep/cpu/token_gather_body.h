// The norm of token_gather for the rows of one task, which share their modulation; a body of
// foreach_isa.h. Rows lie anywhere, so each goes through the norm's block of one.

#include "fewstep/cpu/norm_jvp_body.h"

template <typename T>
void gather_norm_rows(const ChosenRows<T>& from, NormTask<T> x, const NormWorkspace<acc_t<T>>& w) {
    fold_modulation<T, false>(x, 0, w);
    for (std::int64_t m = 0; m < x.count; ++m) {
        x.x = {from[m], 0};
        norm_block<T, false, 1>(x, w, 0, Rows<T>{x.y[m], 0});
    }
}
