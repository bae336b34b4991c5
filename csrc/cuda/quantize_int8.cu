// quantize_int8 on the GPU: quantize_rows.cuh. Bytes: one read of x and one write of q; a row stays
// in registers between its largest value and its rounding, so the copy rate is the limit.
#include "fewstep/cuda/quantize_low.cuh"
#include "fewstep/ops/quantize_int8.h"

namespace fewstep::cuda {

void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const std::string& activation, const TensorView& q,
                   const TensorView& scale, const TensorView* low, std::uintptr_t stream) {
    const std::int64_t R = x.size(0), K = q.size(1);
    expect_contiguous(q, "q", DType::kInt8, {R, K});
    expect_contiguous(scale, "scale", DType::kFloat32, {R});
    const quantize::Plan plan = quantize::make_plan(smooth, rotate, q, scale, R, K, 0);
    quantize::quantize_given<quantize::Int8>(x, plan, activation, down, low, "quantize_int8",
                                             as_stream(stream));
}

}  // namespace fewstep::cuda
