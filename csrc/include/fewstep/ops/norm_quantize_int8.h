// norm_quantize_int8: LayerNorm or RMSNorm with its modulation, quantised to int8 per row.
//
//   u = x - mean(x) if `centred` (LayerNorm), else x
//   n = u (mean(u^2) + eps)^-1/2
//   z = (n weight + bias) (1 + scale) + shift         rounded to x's type
//   q, q_scale as by quantize_int8 of z with smooth and rotate (quantize_int8.h)
//
// All but x may be absent (null): weight, 1 + scale and smooth are one then, the others zero. x,
// scale, shift: [B, N, C], one of float32, bfloat16 and float16, unit stride in C; scale and shift
// may have stride 0 in B and N. weight, bias: [C] float32; q: [B, N, C] int8 and q_scale: [B, N]
// float32, smooth: [C] of a floating type, all contiguous. z has the bits of norm_jvp's y, so q has
// those of quantize_int8 of it.
#pragma once

#include "fewstep/check.h"
#include "fewstep/tensor.h"

namespace fewstep {

inline void check_norm_quantize_int8(const TensorView& x, const TensorView* weight,
                                     const TensorView* bias, const TensorView* scale,
                                     const TensorView* shift, const TensorView& q,
                                     const TensorView& q_scale) {
    FEWSTEP_CHECK(x.ndim == 3, "x: expected 3 axes, got ", x.ndim);
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    expect_rows(x, "x", x.dtype, {batch, rows, columns});
    if (scale != nullptr) expect_rows(*scale, "scale", x.dtype, {batch, rows, columns});
    if (shift != nullptr) expect_rows(*shift, "shift", x.dtype, {batch, rows, columns});
    if (weight != nullptr) expect_contiguous(*weight, "weight", DType::kFloat32, {columns});
    if (bias != nullptr) expect_contiguous(*bias, "bias", DType::kFloat32, {columns});
    expect_contiguous(q, "q", DType::kInt8, {batch, rows, columns});
    expect_contiguous(q_scale, "q_scale", DType::kFloat32, {batch, rows});
}

namespace cpu {
void norm_quantize_int8(const TensorView& x, const TensorView* weight, const TensorView* bias,
                        const TensorView* scale, const TensorView* shift, const TensorView* smooth,
                        std::int64_t rotate, const TensorView& q, const TensorView& q_scale,
                        bool centred, double eps);
}
namespace cuda {
// At most 24,576 columns. z is that of norm_jvp up to float32's own error.
void norm_quantize_int8(const TensorView& x, const TensorView* weight, const TensorView* bias,
                        const TensorView* scale, const TensorView* shift, const TensorView* smooth,
                        std::int64_t rotate, const TensorView& q, const TensorView& q_scale,
                        bool centred, double eps, std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
