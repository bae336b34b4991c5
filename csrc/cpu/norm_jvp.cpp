// norm_jvp on the CPU: memory-bound, each input read once and each output written once. A task is
// kRowsPerTask rows of one batch item, so a modulation that is broadcast along the tokens is
// widened once per task. Rows are independent: the result depends neither on the number of threads
// nor on scheduling. The kernel is norm_jvp_body.h.
#include "fewstep/ops/norm_jvp.h"

#include <cmath>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct NormTask {
    Rows<const T> x, t_x, scale, shift, t_scale, t_shift;
    Rows<T> y, t_y;
    void* stats;  // [count, 4] of the accumulation type
    std::int64_t count, columns;
    bool centred;
    double eps;
};

// The scratch of one thread, each a row; `ones` and `zeros` stand for what is absent.
template <typename Acc>
struct NormWorkspace {
    static constexpr std::int64_t kRows = 11;
    Acc *n, *t, *out, *factor, *shift, *t_scale, *t_shift, *weight, *bias, *ones, *zeros;
    std::int64_t padded;

    // `base` holds zeros.
    NormWorkspace(Acc* base, std::int64_t columns, const TensorView* weight_view,
                  const TensorView* bias_view)
        : padded(pad_up(columns)) {
        for (Acc** row :
             {&n, &t, &out, &factor, &shift, &t_scale, &t_shift, &weight, &bias, &ones, &zeros}) {
            *row = base;
            base += padded;
        }
        std::fill_n(ones, padded, Acc(1));
        std::copy_n(weight_view == nullptr ? ones : weight_view->ptr<Acc>(), columns, weight);
        std::copy_n(bias_view == nullptr ? zeros : bias_view->ptr<Acc>(), columns, bias);
    }
};

}  // namespace
}  // namespace fewstep::cpu

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
        for_each_task<Acc>(batch, rows, elements, [&](Acc* base) {
            const NormWorkspace<Acc> workspace(base, columns, weight, bias);
            return [=, &x, &y, &stats](std::int64_t b, std::int64_t first, std::int64_t count) {
                const NormTask<T> task{rows_of<const T>(&x, b, first),
                                       rows_of<const T>(t_x, b, first),
                                       rows_of<const T>(scale, b, first),
                                       rows_of<const T>(shift, b, first),
                                       rows_of<const T>(t_scale, b, first),
                                       rows_of<const T>(t_shift, b, first),
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
