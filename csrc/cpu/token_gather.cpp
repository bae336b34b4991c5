// token_gather on the CPU: copies of rows, or the norm of norm_jvp over rows that are found by the
// index; each is read once and written once. A task is kRowsPerTask of the chosen rows of a sample.
#include "fewstep/ops/token_gather.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/norm_task.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

// The rows of a task: where each is, of one sample's tokens.
template <typename T>
struct ChosenRows {
    const T* data;  // of the sample
    std::int64_t stride, tokens;
    const T* unknown;  // a row of NaN
    TokenIndex index;
    std::int64_t first;  // of the task, in the index

    const T* operator[](std::int64_t row) const {
        const std::int64_t n = index.at(first + row);
        return n < 0 || n >= tokens ? unknown : data + n * stride;
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/token_gather_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const ChosenRows<T>&, NormTask<T>, const NormWorkspace<acc_t<T>>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::gather_norm_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::gather_norm_rows<T>;
#endif
    return portable::gather_norm_rows<T>;
}

template <typename T>
void run(const TensorView& x, const TensorView& index, const TensorView* scale,
         const TensorView* shift, const TensorView& y, bool normed, double eps) {
    using Acc = acc_t<T>;
    const std::int64_t batch = x.size(0), rows = index.size(1), columns = x.size(2);
    const Kernel<T> kernel = choose_kernel<T>();
    const std::vector<T> zeros(columns);
    const std::vector<T> unknown(columns, Convert<T>::from(std::numeric_limits<Acc>::quiet_NaN()));
    const auto chosen = [&](std::int64_t b, std::int64_t first) {
        return ChosenRows<T>{x.ptr<const T>() + b * x.stride(0),
                             x.stride(1),
                             x.size(1),
                             unknown.data(),
                             TokenIndex::of(index),
                             b * rows + first};
    };
    const auto to = [&](std::int64_t b, std::int64_t first) {
        return Rows<T>{y.ptr<T>() + (b * rows + first) * columns, columns};
    };
    if (!normed) {
        for_each_task<Acc>(batch, rows, 0, [&](Acc*) {
            return [&](std::int64_t b, std::int64_t first, std::int64_t count) {
                const ChosenRows<T> from = chosen(b, first);
                const Rows<T> out = to(b, first);
                for (std::int64_t m = 0; m < count; ++m) std::copy_n(from[m], columns, out[m]);
            };
        });
        return;
    }
    const auto row_of = [&](const TensorView* view, std::int64_t b) {
        return Rows<const T>{
            view == nullptr ? zeros.data() : view->ptr<const T>() + b * view->stride(0), 0};
    };
    const std::int64_t scratch = NormWorkspace<Acc>::kRows * pad_up(columns);
    for_each_task<Acc>(batch, rows, scratch, [&](Acc* base) {
        const NormWorkspace<Acc> workspace(base, columns, nullptr, nullptr);
        return [&, workspace](std::int64_t b, std::int64_t first, std::int64_t count) {
            const Rows<const T> absent{zeros.data(), 0};
            kernel(chosen(b, first),
                   {{},
                    absent,
                    row_of(scale, b),
                    row_of(shift, b),
                    absent,
                    absent,
                    to(b, first),
                    {},
                    nullptr,
                    count,
                    columns,
                    true,
                    eps},
                   workspace);
        };
    });
}

}  // namespace

void token_gather(const TensorView& x, const TensorView& index, const TensorView* scale,
                  const TensorView* shift, const TensorView& y, bool normed, double eps) {
    check_token_gather(x, index, scale, shift, y, normed);
    dispatch_float(x.dtype, "x",
                   [&](auto tag) { run<decltype(tag)>(x, index, scale, shift, y, normed, eps); });
}

}  // namespace fewstep::cpu
