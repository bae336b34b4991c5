// gemm_w8a8: int8 x int8 product with exact integer accumulation, scaled per row and per column.
//
//   acc_mn = sum_k a_mk w_nk                                     exact in int32
//   out_mn = fma(float(acc_mn) * a_scale_m, w_scale_n, bias_n)   with bias
//   out_mn = (float(acc_mn) * a_scale_m) * w_scale_n             without
//   out_mn = fma(low_mr, up_nr, out_mn), r = 0, 1, ...           with a low-rank branch
//
// Scaling is float32, rounded once to out's dtype at the end; K < kGemmW8A8MaxK.
// a [M, K] and w [N, K] int8, unit stride in K; a_scale [M], w_scale [N] float32 and bias [N]
// floating, contiguous; low [M, R] and up [N, R] float32, bfloat16 or float16, contiguous, both or
// neither; out [M, N] float32, bfloat16 or float16, contiguous. Or a is floating and a_scale null:
// its rows are quantised first, to the bit as by quantize_int8, with smooth and rotate if given.
//
// activation (gelu, gelu_tanh, silu, geglu, swiglu or ""), gate [G, N'] and residual [M, N']:
// cpu/epilogue.h; out is then [M, N'], N' = N / 2 with geglu and swiglu. With scale [M] float32 out
// is int8: quantize_int8 of what would be out in a's dtype if it is floating, else in bfloat16.
//
// On the CPU M may stand for several axes of a, a_scale, scale and out, where they lie like one.
#pragma once

#include <string>

#include "fewstep/tensor.h"

namespace fewstep {

// 128 * 128 * K stays below 2^31.
constexpr std::int64_t kGemmW8A8MaxK = std::int64_t{1} << 17;

namespace cpu {
void gemm_w8a8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out);
}
namespace cuda {
// The same for GPUs of capability 9.0, of rows that are quantised already: a_scale [M] and w_scale
// [N] are given, smooth and scale are null, rotate 0; K and both row strides are multiples of 16,
// as are the addresses of a and w; low and up are both bfloat16 or both float16, in rows that start
// at multiples of 16 bytes, of any rank.
void gemm_w8a8_sm90(const TensorView& a, const TensorView* a_scale, const TensorView& w,
                    const TensorView& w_scale, const TensorView* bias, const TensorView* low,
                    const TensorView* up, const TensorView* smooth, std::int64_t rotate,
                    const std::string& activation, const TensorView* gate,
                    const TensorView* residual, const TensorView* scale, const TensorView& out,
                    std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
