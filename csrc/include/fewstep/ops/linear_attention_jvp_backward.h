// linear_attention_jvp_backward: gradients of linear_attention_jvp through o and t_o.
//
// With the names of linear_attention_jvp.h, den including eps, d_o and dt_o the cotangents and
// b_o = dt_o . o:
//   S = [dt_o, -b_o] / den                                            of [t_num, t_den]
//   R = [d_o - (t_den / den) dt_o, -(d_o . o + dt_o . t_o - (t_den / den) b_o)] / den
//   d_tA = f(q)^T S                    d_A = f(q)^T R + t_f(q)^T S
//   d_t_q = [q > 0] S A^T              d_q = [q > 0] (R A^T + S tA^T)
//   d_t_k = [k > 0] [v, 1] d_tA^T      d_k = [k > 0] ([v, 1] d_A^T + [t_v, 0] d_tA^T)
//   d_t_v = f(k) d_tA                  d_v = f(k) d_A + t_f(k) d_tA       (first Dv columns)
//
// d_o, dt_o [B, H, Nq, Dv], the tangents and each gradient (of the shape of what it belongs to) may
// be absent (null); an absent input is zero. One floating dtype, any strides with unit stride in
// the last axis. state (A) and t_state (tA) as linear_attention_jvp left them.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void linear_attention_jvp_backward(const TensorView* d_o, const TensorView* dt_o,
                                   const TensorView& q, const TensorView& k, const TensorView& v,
                                   const TensorView* t_q, const TensorView* t_k,
                                   const TensorView* t_v, const TensorView& state,
                                   const TensorView& t_state, const TensorView* d_q,
                                   const TensorView* d_k, const TensorView* d_v,
                                   const TensorView* d_t_q, const TensorView* d_t_k,
                                   const TensorView* d_t_v, double eps);
}

}  // namespace fewstep
