// norm_jvp_backward on the CPU: memory-bound, one pass. A task is kRowsPerTask rows of one batch
// item; it adds what is summed over rows in scratch and writes it as a partial sum of its own, so
// the result depends neither on the number of threads nor on scheduling. The caller adds the
// partial sums. The kernel is norm_jvp_backward_body.h.
#include "fewstep/ops/norm_jvp_backward.h"

#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

static_assert(kNormJvpBackwardRows == kRowsPerTask, "a task is what one partial sum covers");

// An input that is absent is a row of zeros, an output that is not wanted null.
template <typename T>
struct NormBackwardTask {
    Rows<const T> d_y, dt_y, x, t_x, scale, t_scale;
    Rows<T> d_x, d_t_x, d_scale, d_t_scale;
    const void* stats;  // [count, 4] of the accumulation type
    std::int64_t count, columns;
    bool centred;
};

// The scratch of one thread, each a row: the parameters, the modulation of a row or of all, P, R
// and the sums s of the kernel, and the task's part of the sums over columns.
template <typename Acc>
struct NormBackwardWorkspace {
    static constexpr std::int64_t kRows = 12 + kNormJvpColumnSums;
    Acc *weight, *bias, *ones, *zeros, *factor, *t_factor, *p, *r;
    Acc* s[4];
    Acc* sums[kNormJvpColumnSums];  // null where not wanted
    std::int64_t padded;

    // `base` holds zeros.
    NormBackwardWorkspace(Acc* base, std::int64_t columns, const TensorView* weight_view,
                          const TensorView* bias_view, int columns_wanted)
        : padded(pad_up(columns)) {
        const auto take = [&] {
            Acc* const row = base;
            base += padded;
            return row;
        };
        for (Acc** row : {&weight, &bias, &ones, &zeros, &factor, &t_factor, &p, &r}) *row = take();
        for (Acc*& row : s) row = take();
        for (int i = 0; i < kNormJvpColumnSums; ++i) {
            sums[i] = columns_wanted >> i & 1 ? take() : nullptr;
        }
        std::fill_n(ones, columns, Acc(1));
        std::copy_n(weight_view == nullptr ? ones : weight_view->ptr<Acc>(), columns, weight);
        if (bias_view != nullptr) std::copy_n(bias_view->ptr<Acc>(), columns, bias);
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/norm_jvp_backward_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const NormBackwardTask<T>&, const NormBackwardWorkspace<acc_t<T>>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::norm_backward_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::norm_backward_rows<T>;
#endif
    return portable::norm_backward_rows<T>;
}

}  // namespace

void norm_jvp_backward(const TensorView* d_y, const TensorView* dt_y, const TensorView& x,
                       const TensorView* t_x, const TensorView& stats, const TensorView* weight,
                       const TensorView* bias, const TensorView* scale, const TensorView* t_scale,
                       const TensorView* d_x, const TensorView* d_t_x, const TensorView* d_scale,
                       const TensorView* d_t_scale, const TensorView* sums, int columns_wanted,
                       bool centred) {
    FEWSTEP_CHECK(x.ndim == 3, "x: expected 3 axes, got ", x.ndim);
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    const DType acc = x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto expect = [&](const TensorView* view, const char* argument) {
        if (view != nullptr) expect_rows(*view, argument, x.dtype, {batch, rows, columns});
    };
    expect(d_y, "d_y");
    expect(dt_y, "dt_y");
    expect(&x, "x");
    expect(t_x, "t_x");
    expect(scale, "scale");
    expect(t_scale, "t_scale");
    expect(d_x, "d_x");
    expect(d_t_x, "d_t_x");
    expect(d_scale, "d_scale");
    expect(d_t_scale, "d_t_scale");
    if (weight != nullptr) expect_contiguous(*weight, "weight", acc, {columns});
    if (bias != nullptr) expect_contiguous(*bias, "bias", acc, {columns});
    expect_contiguous(stats, "stats", acc, {batch, rows, 4});
    FEWSTEP_CHECK(columns_wanted >> kNormJvpColumnSums == 0, "columns_wanted: expected ",
                  kNormJvpColumnSums, " bits, got ", columns_wanted);
    std::int64_t wanted = 0;
    for (int i = 0; i < kNormJvpColumnSums; ++i) wanted += columns_wanted >> i & 1;
    const std::int64_t chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    FEWSTEP_CHECK((sums != nullptr) == (wanted > 0), "sums: expected it where columns are wanted");
    if (sums != nullptr) expect_contiguous(*sums, "sums", acc, {batch, chunks, wanted, columns});

    dispatch_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        using Acc = acc_t<T>;
        const Kernel<T> kernel = choose_kernel<T>();
        const std::int64_t elements = NormBackwardWorkspace<Acc>::kRows * pad_up(columns);
        const std::vector<T> zeros(columns);
        for_each_task<Acc>(batch, rows, elements, [&](Acc* base) {
            const NormBackwardWorkspace<Acc> workspace(base, columns, weight, bias, columns_wanted);
            return [&, workspace](std::int64_t b, std::int64_t first, std::int64_t count) {
                const NormBackwardTask<T> task{rows_or(d_y, b, first, zeros.data()),
                                               rows_or(dt_y, b, first, zeros.data()),
                                               rows_of<const T>(&x, b, first),
                                               rows_or(t_x, b, first, zeros.data()),
                                               rows_or(scale, b, first, zeros.data()),
                                               rows_or(t_scale, b, first, zeros.data()),
                                               rows_of<T>(d_x, b, first),
                                               rows_of<T>(d_t_x, b, first),
                                               rows_of<T>(d_scale, b, first),
                                               rows_of<T>(d_t_scale, b, first),
                                               stats.ptr<Acc>() + (b * rows + first) * 4,
                                               count,
                                               columns,
                                               centred};
                for (Acc* sum : workspace.sums) {
                    if (sum != nullptr) std::fill_n(sum, columns, Acc(0));
                }
                kernel(task, workspace);
                if (sums == nullptr) return;
                Acc* to = sums->ptr<Acc>() + (b * chunks + first / kRowsPerTask) * wanted * columns;
                for (const Acc* sum : workspace.sums) {
                    if (sum != nullptr) to = std::copy_n(sum, columns, to);
                }
            };
        });
    });
}

}  // namespace fewstep::cpu
