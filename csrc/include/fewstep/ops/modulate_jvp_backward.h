// modulate_jvp_backward: gradients of modulate_jvp through out and t_out, those of x and t_x aside,
// which are the cotangents d_out and dt_out themselves.
//
//   d_y = gate d_out + t_gate dt_out        d_gate = d_out y + dt_out t_y
//   d_t_y = gate dt_out                     d_t_gate = dt_out y
//
// Everything may be absent (null) but y; gate is one then, the other inputs zero. y, d_out, dt_out,
// gate, t_y, t_gate and d_y, d_t_y, d_gate, d_t_gate: [B, N, C], one floating dtype, unit stride in
// C; inputs may have stride 0 in B and N. gate_sums, t_gate_sums: sums of d_gate and d_t_gate over
// kModulateJvpBackwardRows rows at a time, [B, ceil(N / rows), C] contiguous, float32 (float64 for
// float64).
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr std::int64_t kModulateJvpBackwardRows = 64;

namespace cpu {
void modulate_jvp_backward(const TensorView* d_out, const TensorView* dt_out, const TensorView& y,
                           const TensorView* gate, const TensorView* t_y, const TensorView* t_gate,
                           const TensorView* d_y, const TensorView* d_t_y, const TensorView* d_gate,
                           const TensorView* d_t_gate, const TensorView* gate_sums,
                           const TensorView* t_gate_sums);
}

}  // namespace fewstep
