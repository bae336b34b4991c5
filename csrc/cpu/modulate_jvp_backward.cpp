// modulate_jvp_backward on the CPU: memory-bound, one pass. A task is kRowsPerTask rows of one
// batch item; its part of what is summed over rows is a partial sum of its own, so the result
// depends neither on the number of threads nor on scheduling. The caller adds the partial sums. The
// kernel is modulate_jvp_backward_body.h.
#include "fewstep/ops/modulate_jvp_backward.h"

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

static_assert(kModulateJvpBackwardRows == kRowsPerTask, "a task is what one partial sum covers");

template <typename T>
struct ModulateBackwardTask {
    Rows<const T> d_out, dt_out, y, gate, t_y, t_gate;
    Rows<T> d_y, d_t_y, d_gate, d_t_gate;
    void *gate_sums, *t_gate_sums;  // [columns] of the accumulation type, or null
    std::int64_t count, columns;
};

// The scratch of one thread, each a row; `ones` and `zeros` stand for what is absent.
template <typename Acc>
struct ModulateBackwardWorkspace {
    static constexpr std::int64_t kRows = 9;
    Acc *d_out, *dt_out, *y, *gate, *t_y, *t_gate, *out, *ones, *zeros;
    std::int64_t padded;

    // `base` holds zeros.
    ModulateBackwardWorkspace(Acc* base, std::int64_t columns) : padded(pad_up(columns)) {
        for (Acc** row : {&d_out, &dt_out, &y, &gate, &t_y, &t_gate, &out, &ones, &zeros}) {
            *row = base;
            base += padded;
        }
        std::fill_n(ones, padded, Acc(1));
    }
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/modulate_jvp_backward_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const ModulateBackwardTask<T>&, const ModulateBackwardWorkspace<acc_t<T>>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::modulate_backward_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::modulate_backward_rows<T>;
#endif
    return portable::modulate_backward_rows<T>;
}

}  // namespace

void modulate_jvp_backward(const TensorView* d_out, const TensorView* dt_out, const TensorView& y,
                           const TensorView* gate, const TensorView* t_y, const TensorView* t_gate,
                           const TensorView* d_y, const TensorView* d_t_y, const TensorView* d_gate,
                           const TensorView* d_t_gate, const TensorView* gate_sums,
                           const TensorView* t_gate_sums) {
    FEWSTEP_CHECK(y.ndim == 3, "y: expected 3 axes, got ", y.ndim);
    const std::int64_t batch = y.size(0), rows = y.size(1), columns = y.size(2);
    const std::int64_t chunks = (rows + kRowsPerTask - 1) / kRowsPerTask;
    const DType acc = y.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
    const auto expect = [&](const TensorView* view, const char* argument) {
        if (view != nullptr) expect_rows(*view, argument, y.dtype, {batch, rows, columns});
    };
    expect(d_out, "d_out");
    expect(dt_out, "dt_out");
    expect(&y, "y");
    expect(gate, "gate");
    expect(t_y, "t_y");
    expect(t_gate, "t_gate");
    expect(d_y, "d_y");
    expect(d_t_y, "d_t_y");
    expect(d_gate, "d_gate");
    expect(d_t_gate, "d_t_gate");
    const auto expect_sums = [&](const TensorView* view, const char* argument) {
        if (view != nullptr) expect_contiguous(*view, argument, acc, {batch, chunks, columns});
    };
    expect_sums(gate_sums, "gate_sums");
    expect_sums(t_gate_sums, "t_gate_sums");
    dispatch_float(y.dtype, "y", [&](auto tag) {
        using T = decltype(tag);
        using Acc = acc_t<T>;
        const Kernel<T> kernel = choose_kernel<T>();
        const std::int64_t elements = ModulateBackwardWorkspace<Acc>::kRows * pad_up(columns);
        for_each_task<Acc>(batch, rows, elements, [&](Acc* base) {
            const ModulateBackwardWorkspace<Acc> workspace(base, columns);
            return [=, &y](std::int64_t b, std::int64_t first, std::int64_t count) {
                // The partial sum of this task, zeroed; null stays null.
                const auto partial = [&](const TensorView* view) -> Acc* {
                    if (view == nullptr) return nullptr;
                    Acc* const to =
                        view->ptr<Acc>() + (b * chunks + first / kRowsPerTask) * columns;
                    std::fill_n(to, columns, Acc(0));
                    return to;
                };
                const ModulateBackwardTask<T> task{rows_of<const T>(d_out, b, first),
                                                   rows_of<const T>(dt_out, b, first),
                                                   rows_of<const T>(&y, b, first),
                                                   rows_of<const T>(gate, b, first),
                                                   rows_of<const T>(t_y, b, first),
                                                   rows_of<const T>(t_gate, b, first),
                                                   rows_of<T>(d_y, b, first),
                                                   rows_of<T>(d_t_y, b, first),
                                                   rows_of<T>(d_gate, b, first),
                                                   rows_of<T>(d_t_gate, b, first),
                                                   partial(gate_sums),
                                                   partial(t_gate_sums),
                                                   count,
                                                   columns};
                kernel(task, workspace);
            };
        });
    });
}

}  // namespace fewstep::cpu
