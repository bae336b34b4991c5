// token_scatter on the CPU: memory-bound, each row read and written once; in place nothing is done
// to the rows that stay. A task is kRowsPerTask tokens of a sample. The kernel is
// token_scatter_body.h; rows that are neither gated nor added are copied.
#include "fewstep/ops/token_scatter.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

#define FEWSTEP_ISA_BODY "fewstep/cpu/token_scatter_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const T*, const T*, const T*, T*, std::int64_t);

template <typename T>
Kernel<T> choose_kernel(bool residual) {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) {
        return residual ? avx512::gated_row<T, true> : avx512::gated_row<T, false>;
    }
    if (isa() == Isa::kAvx2) {
        return residual ? avx2::gated_row<T, true> : avx2::gated_row<T, false>;
    }
#endif
    return residual ? portable::gated_row<T, true> : portable::gated_row<T, false>;
}

template <typename T>
void run(const TensorView& value, const TensorView& position, const TensorView* base,
         const TensorView* gate, const TensorView& y, bool residual) {
    using Acc = acc_t<T>;
    const std::int64_t batch = value.size(0), rows = value.size(1), columns = value.size(2);
    const std::int64_t tokens = y.size(1);
    const Kernel<T> kernel = choose_kernel<T>(residual);
    const bool copies = gate == nullptr && !residual;
    const TokenIndex places = TokenIndex::of(position);
    const std::vector<T> ones(columns, Convert<T>::from(1));
    const T unknown = Convert<T>::from(std::numeric_limits<Acc>::quiet_NaN());
    for_each_task<Acc>(batch, tokens, 0, [&](Acc*) {
        return [&](std::int64_t b, std::int64_t first, std::int64_t count) {
            const Rows<T> out = rows_of<T>(&y, b, first);
            const Rows<const T> kept = rows_of<const T>(base == nullptr ? &y : base, b, first);
            const Rows<const T> computed = rows_of<const T>(&value, b, 0);
            const T* const factor =
                gate == nullptr ? ones.data() : gate->ptr<const T>() + b * gate->stride(0);
            for (std::int64_t n = 0; n < count; ++n) {
                const std::int64_t p = places.at(b * tokens + first + n);
                if (p < 0) {
                    if (base != nullptr) std::copy_n(kept[n], columns, out[n]);
                } else if (p >= rows) {
                    std::fill_n(out[n], columns, unknown);
                } else if (copies) {
                    std::copy_n(computed[p], columns, out[n]);
                } else {
                    kernel(computed[p], factor, kept[n], out[n], columns);
                }
            }
        };
    });
}

}  // namespace

void token_scatter(const TensorView& value, const TensorView& position, const TensorView* base,
                   const TensorView* gate, const TensorView& y, bool residual) {
    check_token_scatter(value, position, base, gate, y);
    dispatch_float(value.dtype, "value",
                   [&](auto tag) { run<decltype(tag)>(value, position, base, gate, y, residual); });
}

}  // namespace fewstep::cpu
