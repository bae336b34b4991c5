// modulate_jvp_backward on the CPU: memory-bound, one pass. A task is kRowsPerTask rows of one
// batch item; its part of what is summed over rows is a partial sum of its own, so the result
// depends neither on the number of threads nor on scheduling. The caller adds the partial sums. The
// kernel is modulate_jvp_backward_body.h.
#include "fewstep/ops/modulate_jvp_backward.h"

#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/rows.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

static_assert(kModulateJvpBackwardRows == kRowsPerTask, "a task is what one partial sum covers");

// An input that is absent is a row of ones or zeros, an output that is not wanted null.
template <typename T>
struct ModulateBackwardTask {
    Rows<const T> d_out, dt_out, y, gate, t_y, t_gate;
    Rows<T> d_y, d_t_y, d_gate, d_t_gate;
    bool wants_gates;
    std::int64_t count, columns;
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/modulate_jvp_backward_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const ModulateBackwardTask<T>&, acc_t<T>*, acc_t<T>*);

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
        const std::vector<T> zeros(columns), ones(columns, Convert<T>::from(1));
        const bool wants_gates = d_gate != nullptr || d_t_gate != nullptr || gate_sums != nullptr ||
                                 t_gate_sums != nullptr;
        const std::int64_t padded = pad_up(columns);
        for_each_task<Acc>(batch, rows, 2 * padded, [&](Acc* sums) {
            return [&, sums](std::int64_t b, std::int64_t first, std::int64_t count) {
                const ModulateBackwardTask<T> task{rows_or(d_out, b, first, zeros.data()),
                                                   rows_or(dt_out, b, first, zeros.data()),
                                                   rows_of<const T>(&y, b, first),
                                                   rows_or(gate, b, first, ones.data()),
                                                   rows_or(t_y, b, first, zeros.data()),
                                                   rows_or(t_gate, b, first, zeros.data()),
                                                   rows_of<T>(d_y, b, first),
                                                   rows_of<T>(d_t_y, b, first),
                                                   rows_of<T>(d_gate, b, first),
                                                   rows_of<T>(d_t_gate, b, first),
                                                   wants_gates,
                                                   count,
                                                   columns};
                std::fill_n(sums, 2 * padded, Acc(0));
                kernel(task, gate_sums == nullptr ? nullptr : sums,
                       t_gate_sums == nullptr ? nullptr : sums + padded);
                const std::int64_t at = (b * chunks + first / kRowsPerTask) * columns;
                if (gate_sums != nullptr) {
                    std::copy_n(sums, columns, gate_sums->ptr<Acc>() + at);
                }
                if (t_gate_sums != nullptr) {
                    std::copy_n(sums + padded, columns, t_gate_sums->ptr<Acc>() + at);
                }
            };
        });
    });
}

}  // namespace fewstep::cpu
