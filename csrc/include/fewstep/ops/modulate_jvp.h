// modulate_jvp: a gated residual and its directional derivative.
//
//   out = x + gate y                        t_out = t_x + gate t_y + t_gate y
//
// gate absent (null) is one, an absent tangent is zero. x, y, gate, t_x, t_y, t_gate, out, t_out:
// [B, N, C], one floating dtype, unit stride in C; gate and t_gate may have stride 0 in B and N.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void modulate_jvp(const TensorView& x, const TensorView& y, const TensorView* gate,
                  const TensorView* t_x, const TensorView* t_y, const TensorView* t_gate,
                  const TensorView& out, const TensorView& t_out);
}

}  // namespace fewstep
