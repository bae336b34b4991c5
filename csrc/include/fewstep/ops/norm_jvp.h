// norm_jvp: LayerNorm or RMSNorm with its modulation, and the directional derivative of both.
//
//   u = x - mean(x)  t_u = t_x - mean(t_x)  if `centred` (LayerNorm), else u = x, t_u = t_x
//   rstd = (mean(u^2) + eps)^-1/2           a = mean(n t_u)
//   n = rstd u                              t_n = rstd (t_u - n a)
//   z = n weight + bias                     t_z = t_n weight
//   y = z (1 + scale) + shift               t_y = (1 + scale) t_z + t_scale z + t_shift
//
// All but x and y may be absent (null): weight and 1 + scale are one then, the others zero; without
// t_y no tangent may be given. x, t_x, scale, shift, t_scale, t_shift, y, t_y: [B, N, C], one
// floating dtype, unit stride in C; scale, shift and their tangents may have stride 0 in B and N.
// weight, bias: [C] and stats: [B, N, 4], contiguous, float32 (float64 for float64). stats gets
// mean(x), rstd, mean(t_x) and a of each row, the means being 0 if not centred.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void norm_jvp(const TensorView& x, const TensorView* t_x, const TensorView* weight,
              const TensorView* bias, const TensorView* scale, const TensorView* shift,
              const TensorView* t_scale, const TensorView* t_shift, const TensorView& y,
              const TensorView* t_y, const TensorView& stats, bool centred, double eps);
}

}  // namespace fewstep
