// gemm_fp8: e4m3 x e4m3 product with float32 sums, scaled per row and per column.
//
//   acc_mn = sum_k a_mk w_nk                              every product exact, float32 sums
//   out_mn = fma(acc_mn * a_scale_m, w_scale_n, bias_n)   with bias
//   out_mn = (acc_mn * a_scale_m) * w_scale_n             without
//   out_mn = fma(low_mr, up_nr, out_mn), r = 0, 1, ...    with a low-rank branch
//
// float32, rounded once to out's dtype at the end. a [M, K] uint8, the bits, unit stride in K;
// a_scale [M], w_scale [N] float32 and bias [N] floating, contiguous; w [N, K] uint8, the bits,
// unit stride in K; low [M, R] and up [N, R] float32, bfloat16 or float16, contiguous, both or
// neither; out [M, N] float32, bfloat16 or float16, contiguous. Or a is floating and a_scale null:
// its rows are quantised first, to the bit as by quantize_fp8, with smooth and rotate if given.
//
// a_scale [M, ceil(K / 128)] and w_scale [N] or [ceil(N / 128), ceil(K / 128)]: for b = k / 128
//
//   sum_mn = fma((sum_{k in b} a_mk w_nk) * a_scale_mb, w_scale_nb or 1, sum_mn), b = 0, 1, ...
//
// from 0, and 1 in the place of the scales above that are of blocks. Floating a is quantised in
// blocks where w_scale has them.
//
// activation, gate, residual and scale, which makes out int8, are those of gemm_w8a8.h.
//
// The sums are taken in order of k by pairs, the odd one of a pair first, one rounding each: the
// same bits on every instruction set.
#pragma once

#include <string>

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void gemm_fp8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
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
void gemm_fp8_sm90(const TensorView& a, const TensorView* a_scale, const TensorView& w,
                   const TensorView& w_scale, const TensorView* bias, const TensorView* low,
                   const TensorView* up, const TensorView* smooth, std::int64_t rotate,
                   const std::string& activation, const TensorView* gate,
                   const TensorView* residual, const TensorView* scale, const TensorView& out,
                   std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
