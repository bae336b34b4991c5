// attention_jvp: softmax attention and its directional derivative in one pass over the keys.
//
//   S = scale q k^T        tS = scale (t_q k^T + q t_k^T)        P = softmax(S)
//   o = P v                t_o = P t_v + (P * (tS - mu)) v       mu = sum_j P tS
//   lse = log sum_j exp S
//
// q, t_q: [B, H, Nq, D]; k, t_k: [B, H, Nk, D]; v, t_v: [B, H, Nk, Dv]; o, t_o: [B, H, Nq, Dv]; one
// floating dtype, any strides with unit stride in the last axis; each tensor has its own strides.
// A tangent may be absent (null): it is zero and its products are not computed.
// lse, mu: [B, H, Nq], contiguous, float32 (float64 for float64): what merging two key ranges and
// the backward need. Nk = 0 gives o = t_o = 0, lse = -inf, mu = 0.
// D and Dv are multiples of 8, at most 256. Accumulation is in float32 (float64 for float64).
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void attention_jvp(const TensorView& q, const TensorView& k, const TensorView& v,
                   const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                   const TensorView& o, const TensorView& t_o, const TensorView& lse,
                   const TensorView& mu, double scale);
}

}  // namespace fewstep
