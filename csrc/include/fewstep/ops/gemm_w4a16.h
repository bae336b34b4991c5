// gemm_w4a16: activations as they are x 4-bit weights, for few rows.
//
//   y_mn = sum_k x_mk (q_nk s_ng(k)) + sum_r low_mr up_nr + bias_n               float32
//   out  = y rounded to x's dtype, or what cpu/epilogue.h makes of it
//
// x [M, K] float32, bfloat16 or float16, unit stride in K; w [N, K / 2] uint8, two values of a row
// a byte, the even k in the low half, two's complement; w_scale [N, K / G] bfloat16 or float16, G a
// multiple of 32; bias [N] floating; low [M, R] and up [N, R] float32, bfloat16 or float16, both or
// neither; out [M, N'] of x's dtype. All these but x contiguous. activation (gelu, gelu_tanh, silu,
// geglu, swiglu or ""), gate and residual: cpu/epilogue.h; N' = N / 2 with geglu and swiglu.
//
// Sixteen partial sums per output, of k modulo 16 within 32 (evens first, then odds), then the
// branch's r modulo 16, added up as a tree: the same bits on every instruction set.
#pragma once

#include <string>

#include "fewstep/tensor.h"

namespace fewstep::cpu {
void gemm_w4a16(const TensorView& x, const TensorView& w, const TensorView& w_scale,
                const TensorView* bias, const TensorView* low, const TensorView* up,
                const std::string& activation, const TensorView* gate, const TensorView* residual,
                const TensorView& out);
}
