// linear_attention_jvp: ReLU linear attention and its directional derivative.
//
//   f(x) = relu(x)                          t_f(x) = [x > 0] t_x
//   A  = sum_j f(k_j)^T [v_j, 1]            tA = sum_j t_f(k_j)^T [v_j, 1] + f(k_j)^T [t_v_j, 0]
//   [num, den] = f(q) A                     [t_num, t_den] = t_f(q) A + f(q) tA
//   o = num / (den + eps)                   t_o = (t_num - o t_den) / (den + eps)
//
// q, t_q: [B, H, Nq, D]; k, t_k: [B, H, Nk, D]; v, t_v: [B, H, Nk, Dv]; o, t_o: [B, H, Nq, Dv]; one
// floating dtype, any strides with unit stride in the last axis. A tangent may be absent (null): it
// is zero and its products are not computed. state (A), t_state (tA): [B, H, D, Dv + 1],
// contiguous, float32 (float64 for float64). D and Dv are multiples of 8, at most 128.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr std::int64_t kLinearAttentionMaxDim = 128;

namespace cpu {
void linear_attention_jvp(const TensorView& q, const TensorView& k, const TensorView& v,
                          const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                          const TensorView& o, const TensorView& t_o, const TensorView& state,
                          const TensorView& t_state, double eps);
}

}  // namespace fewstep
