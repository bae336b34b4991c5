// attention_jvp: softmax attention and its directional derivative in one pass over the keys.
//
//   S = scale q k^T + M    tS = scale (t_q k^T + q t_k^T) + tM   P = softmax(S)
//   o = P v                t_o = P t_v + (P * (tS - mu)) v       mu = sum_j P tS
//   lse = log sum_j exp S
//
// q: [B, H, Nq, D]; k: [B, G, Nk, D]; v: [B, G, Nk, Dv]; o: [B, H, Nq, Dv]; one floating dtype, any
// strides with unit stride in the last axis; each tensor has its own strides. G divides H: query
// head h reads key head h / (H / G). D and Dv are multiples of 8, at most 256.
// t_q, t_k, t_v: R directions, [R, ...] of their primal. One may be absent (null): it is zero and
// its products are not computed. t_o: [R, B, H, Nq, Dv]. R = 0: no tangents, t_o and mu are empty.
// attn_mask: [B, H, Nq, Nk], bool (true: they meet) or of q's dtype (M), any strides, 0 among them;
// t_attn_mask: tM, [R, B, H, Nq, Nk], beside an additive mask.
// cu_seqlens_q, cu_seqlens_k: int32 [S + 1], both or none; rows cu[s] ... cu[s + 1] are sequence s
// and see only themselves; B is 1 and there is no mask.
// is_causal: key j is seen by query i if j <= i, counted from the start of their sequence.
// lse: [B, H, Nq] and mu: [R, B, H, Nq], contiguous, float32 (float64 for float64): what merging
// two key ranges and the backward need. A query without keys gets o = t_o = mu = 0, lse = -inf.
// lse_rest: what rounding took from lse, log l - (lse - m), like lse; null where not wanted. Only
// an additive mask makes lse so large that exp(S - lse) misses it. Accumulation is in float32
// (float64 for float64).
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void attention_jvp(const TensorView& q, const TensorView& k, const TensorView& v,
                   const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                   const TensorView* attn_mask, const TensorView* t_attn_mask,
                   const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k, bool is_causal,
                   const TensorView& o, const TensorView& t_o, const TensorView& lse,
                   const TensorView& mu, const TensorView* lse_rest, double scale);
}

namespace cuda {
// The same with float16 or bfloat16, R = 1, t_q, D and Dv up to 128, and t_k and t_v both or none.
// q8, k8, rows8: null, or memory for scores from 8-bit operands (docs/ops/attention_jvp.md),
// without an additive mask and with scale > 0. With W = 64 or 128, the least that D and Dv fit: q8
// [B, H, Nq, 2 W], k8 [B, G, Nk, 2 W] ([..., W] without t_k), int8, or uint8 for the bits of e4m3,
// which says what the operands are rounded to; rows8: float32 [3 B H Nq + B G (Nk + 2 W + 4)],
// scales and sums. All contiguous; what they hold is nobody's.
void attention_jvp_sm90(const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                        const TensorView* attn_mask, const TensorView* t_attn_mask,
                        const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k,
                        bool is_causal, const TensorView& o, const TensorView& t_o,
                        const TensorView& lse, const TensorView& mu, const TensorView* lse_rest,
                        const TensorView* q8, const TensorView* k8, const TensorView* rows8,
                        double scale, std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
