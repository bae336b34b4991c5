// norm_jvp_backward: gradients of norm_jvp through y and t_y.
//
// With n, t_n, z, t_z, a as in norm_jvp.h, <v> the mean over a row, d_y and dt_y the cotangents:
//   d_z = (1 + scale) d_y + t_scale dt_y    d_tz = (1 + scale) dt_y
//   g = d_z weight    h = d_tz weight       J v = rstd (v - <v> - n <n v>), no <v> if not centred
//   d_t_x = J h       d_x = J g - rstd (n <h t_n> + a d_t_x + <n h> t_n)
//   d_scale = d_y z + dt_y t_z              d_t_scale = dt_y z
// and per column, of which the bits of `columns_wanted` ask some, the lowest bit first:
//   0: sum d_z n + d_tz t_n (weight)   1: sum d_z (bias)      2: sum d_scale
//   3: sum d_y (shift)                 4: sum d_t_scale       5: sum dt_y (t_shift)
//
// Everything may be absent (null) but x and stats; weight and 1 + scale are one then, the other
// inputs zero. x, t_x, d_y, dt_y, scale, t_scale and d_x, d_t_x, d_scale, d_t_scale: [B, N, C], one
// floating dtype, unit stride in C; inputs may have stride 0 in B and N. weight, bias [C] and stats
// [B, N, 4] (from norm_jvp): contiguous, float32 (float64 for float64). sums, of that dtype too:
// [B, ceil(N / kNormJvpBackwardRows), wanted, C] contiguous, the sums over so many rows at a time.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr std::int64_t kNormJvpBackwardRows = 64;
constexpr int kNormJvpColumnSums = 6;

namespace cpu {
void norm_jvp_backward(const TensorView* d_y, const TensorView* dt_y, const TensorView& x,
                       const TensorView* t_x, const TensorView& stats, const TensorView* weight,
                       const TensorView* bias, const TensorView* scale, const TensorView* t_scale,
                       const TensorView* d_x, const TensorView* d_t_x, const TensorView* d_scale,
                       const TensorView* d_t_scale, const TensorView* sums, int columns_wanted,
                       bool centred);
}

}  // namespace fewstep
