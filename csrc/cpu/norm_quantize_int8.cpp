// norm_quantize_int8 on the CPU: the norm of norm_jvp and the row of quantize_int8, one after the
// other while the row is in cache, so x is read once and q written once. Tasks, modulation and
// independence of threads are those of norm_jvp. The kernel is norm_quantize_int8_body.h.
#include "fewstep/ops/norm_quantize_int8.h"

#include <cmath>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/norm_task.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/quantize_row.h"

namespace fewstep::cpu {
namespace {

// Where the rows of a task go, and what fills one and returns its scale: at once, or of floats from
// what comes before (prologue.h).
template <typename T>
struct NormQuantizeTask {
    std::int8_t* q;  // [count, columns]
    float* scale;    // [count]
    quantize::RowFunction<T> quantize;
    quantize::RowFunction<float> quantize_prepared;
    const prologue::Prologue<T>* prepare;
    float* prepared;  // [columns], scratch
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/norm_quantize_int8_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using Kernel = void (*)(const NormTask<T>&, const NormWorkspace<float>&,
                        const NormQuantizeTask<T>&);

template <typename T>
Kernel<T> choose_kernel() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::norm_quantize_rows<T>;
    if (isa() == Isa::kAvx2) return avx2::norm_quantize_rows<T>;
#endif
    return portable::norm_quantize_rows<T>;
}

struct Arguments {
    const TensorView &x, *weight, *bias, *scale, *shift, *smooth;
    std::int64_t rotate;
    const TensorView &q, &q_scale;
    bool centred;
    double eps;
};

template <typename T>
void run(const Arguments& a) {
    const std::int64_t batch = a.x.size(0), rows = a.x.size(1), columns = a.x.size(2);
    const Kernel<T> kernel = choose_kernel<T>();
    const auto quantize = quantize::choose_row<T>();
    const auto quantize_prepared = quantize::choose_row<float>();
    const prologue::Prologue<T> prepare(a.smooth, a.rotate, columns);
    const std::int64_t row_size = pad_up(columns);
    const std::int64_t workspace_size = NormWorkspace<float>::kRows * row_size;
    const std::int64_t normed_size = kNormBlock * row_size;  // of T, which is no longer than float
    const std::vector<T> zeros(columns);
    const std::int64_t scratch_size = workspace_size + normed_size + row_size;
    for_each_task<float>(batch, rows, scratch_size, [&](float* base) {
        const NormWorkspace<float> workspace(base, columns, a.weight, a.bias);
        float* const normed = base + workspace_size;
        return [&, workspace, normed](std::int64_t b, std::int64_t first, std::int64_t count) {
            const Rows<const T> absent{zeros.data(), 0};
            const NormTask<T> task{rows_of<const T>(&a.x, b, first),
                                   absent,
                                   rows_or(a.scale, b, first, zeros.data()),
                                   rows_or(a.shift, b, first, zeros.data()),
                                   absent,
                                   absent,
                                   Rows<T>{reinterpret_cast<T*>(normed), row_size},
                                   {},
                                   nullptr,
                                   count,
                                   columns,
                                   a.centred,
                                   a.eps};
            const std::int64_t row = b * rows + first;
            kernel(task, workspace,
                   {a.q.ptr<std::int8_t>() + row * columns, a.q_scale.ptr<float>() + row, quantize,
                    quantize_prepared, &prepare, normed + normed_size});
        };
    });
}

}  // namespace

void norm_quantize_int8(const TensorView& x, const TensorView* weight, const TensorView* bias,
                        const TensorView* scale, const TensorView* shift, const TensorView* smooth,
                        std::int64_t rotate, const TensorView& q, const TensorView& q_scale,
                        bool centred, double eps) {
    check_norm_quantize_int8(x, weight, bias, scale, shift, q, q_scale);
    const Arguments arguments{x,      weight, bias,    scale,   shift, smooth,
                              rotate, q,      q_scale, centred, eps};
    switch (x.dtype) {
        case DType::kFloat32: return run<float>(arguments);
        case DType::kBFloat16: return run<bfloat16>(arguments);
        case DType::kFloat16: return run<float16>(arguments);
        default:
            FEWSTEP_CHECK(false, "x: expected float32, bfloat16 or float16, got ", name(x.dtype));
    }
}

}  // namespace fewstep::cpu
