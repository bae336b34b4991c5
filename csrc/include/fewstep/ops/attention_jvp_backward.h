// attention_jvp_backward: gradients through o and t_o of attention_jvp, for one direction.
//
//   P = exp((S - lse) - lse_rest)   tP = P (tS - mu)
//   X0 = dt_o v^T          X1 = d_o v^T + dt_o t_v^T
//   dS0 = P (X0 - delta0)  dS1 = P (X1 - delta1) + tP (X0 - delta0)
//   dt_q = scale dS0 k     d_q = scale (dS1 k + dS0 t_k)
//   dt_k = scale dS0^T q   d_k = scale (dS1^T q + dS0^T t_q)
//   dt_v = P^T dt_o        d_v = P^T d_o + tP^T dt_o
//
// q ... t_v, masks, offsets and is_causal as in attention_jvp, but all of them 4-d: one direction.
// d_o, dt_o: [B, H, Nq, Dv], like q. delta0, delta1, lse, mu, lse_rest: [B, H, Nq], contiguous,
// float32 (float64 for float64). What may be absent (null) is zero, and its products are not
// computed; without delta0 t_o and mu have no cotangent and dt_o is absent too. d_q ... dt_v: in
// the shapes and dtype of q, k, v, unit stride in the last axis; null where not wanted. Key heads
// get the sum over the query heads that read them. Accumulation is in float32 (float64 for
// float64), in an order that depends on shapes alone.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void attention_jvp_backward(const TensorView* d_o, const TensorView* dt_o, const TensorView* delta0,
                            const TensorView& delta1, const TensorView& q, const TensorView& k,
                            const TensorView& v, const TensorView* t_q, const TensorView* t_k,
                            const TensorView* t_v, const TensorView& lse, const TensorView* mu,
                            const TensorView* lse_rest, const TensorView* attn_mask,
                            const TensorView* t_attn_mask, const TensorView* cu_seqlens_q,
                            const TensorView* cu_seqlens_k, bool is_causal, const TensorView* d_q,
                            const TensorView* d_k, const TensorView* d_v, const TensorView* dt_q,
                            const TensorView* dt_k, const TensorView* dt_v, double scale);
}

namespace cuda {
// The same with float16 or bfloat16, D and Dv up to 128, all of d_o, dt_o and t_q, both or none of
// t_k and t_v, an additive mask only without them. query_sums, or null: a workspace in which d_q
// and dt_q are added up in any order, which saves products. Float32 zeros [2, B, H, rows, columns]:
// 64 or 128 columns, the first that holds D and Dv, and 64 rows more than Nq for each packed
// sequence (without any, 64).
void attention_jvp_backward_sm90(
    const TensorView* d_o, const TensorView* dt_o, const TensorView* delta0,
    const TensorView& delta1, const TensorView& q, const TensorView& k, const TensorView& v,
    const TensorView* t_q, const TensorView* t_k, const TensorView* t_v, const TensorView& lse,
    const TensorView* mu, const TensorView* lse_rest, const TensorView* attn_mask,
    const TensorView* t_attn_mask, const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k,
    bool is_causal, const TensorView* d_q, const TensorView* d_k, const TensorView* d_v,
    const TensorView* dt_q, const TensorView* dt_k, const TensorView* dt_v,
    const TensorView* query_sums, double scale, std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
