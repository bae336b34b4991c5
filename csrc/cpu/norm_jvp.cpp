// norm_jvp on the CPU: memory-bound, each input read once and each output written once. A task is
// kRowsPerTask rows of one batch item, so a modulation that is broadcast along the tokens is
// widened once per task. Rows are independent: the result depends neither on the number of threads
// nor on scheduling. The kernel is norm_jvp_body.h.
#include "fewstep/ops/norm_jvp.h"

#include <cmath>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/norm_task.h"
#include "fewstep/dispatch.h"

#define FEWSTEP_ISA_BODY "fewstep/cpu/norm_jvp_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const NormTask<T>&, const NormWorkspace<acc_t<T>>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::norm_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::norm_rows<T>;
#endif
    return portable::norm_rows<T>;
}

}  // namespace

void norm_jvp(const TensorView& x, const TensorView* t_x, const TensorView* weight,
              const TensorView* bias, const TensorView* scale, const TensorView* shift,
              const TensorView* t_scale, const TensorView* t_shift, const TensorView& y,
              const TensorView* t_y, const TensorView& stats, bool centred, double eps) {
    FEWSTEP_CHECK(x.ndim == 3, "x: expected 3 axes, got ", x.ndim);
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    const DType acc = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto expect = [&](const TensorView* view, const char* argument) {
        if (view != nullptr) expect_rows(*view, argument, x.dtype, {batch, rows, columns});
    };
    expect(&x, "x");
    expect(t_x, "t_x");
    expect(scale, "scale");
    expect(shift, "shift");
    expect(t_scale, "t_scale");
    expect(t_shift, "t_shift");
    expect(&y, "y");
    expect(t_y, "t_y");
    if (weight != nullptr) expect_contiguous(*weight, "weight", acc, {columns});
    if (bias != nullptr) expect_contiguous(*bias, "bias", acc, {columns});
    expect_contiguous(stats, "stats", acc, {batch, rows, 4});
    dispatch_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        using Acc = acc_t<T>;
        const Kernel<T> kernel = choose_kernel<T>();
        const std::int64_t elements = NormWorkspace<Acc>::kRows * pad_up(columns);
        const std::vector<T> zeros(columns);
        for_each_task<Acc>(batch, rows, elements, [&](Acc* base) {
            const NormWorkspace<Acc> workspace(base, columns, weight, bias);
            return [&, workspace](std::int64_t b, std::int64_t first, std::int64_t count) {
                const NormTask<T> task{rows_of<const T>(&x, b, first),
                                       rows_or(t_x, b, first, zeros.data()),
                                       rows_or(scale, b, first, zeros.data()),
                                       rows_or(shift, b, first, zeros.data()),
                                       rows_or(t_scale, b, first, zeros.data()),
                                       rows_or(t_shift, b, first, zeros.data()),
                                       rows_of<T>(&y, b, first),
                                       rows_of<T>(t_y, b, first),
                                       stats.ptr<Acc>() + (b * rows + first) * 4,
                                       count,
                                       columns,
                                       centred,
                                       eps};
                kernel(task, workspace);
            };
        });
    });
}

}  // namespace fewstep::cpu
