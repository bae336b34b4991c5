// gemm_w4a8: int8 activations x 4-bit weights, the scales of the groups folded into int8.
//
//   top_n = max_g s_ng     f_ng = round(4096 (s_ng / top_n))     w8_nk = (q_nk f_ng + 128) >> 8
//   out   = gemm_w8a8 with w8 in place of w and top / 16 in place of w_scale
//
// All but w and w_scale as in gemm_w8a8.h. w [N, K / 2] uint8, unit stride: q in two's complement,
// the even k in the low half of a byte. w_scale is s, [N, K / G] bfloat16 or float16, contiguous,
// G 32, 64 or 128. A scale that is NaN makes its column NaN; without groups
// (K = 0) top is 16.
#pragma once

#include <string>

#include "fewstep/tensor.h"

namespace fewstep {

namespace cpu {
void gemm_w4a8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out);
}
namespace cuda {
// The same for GPUs of capability 9.0, of rows that are quantised already: as gemm_w8a8.h says, and
// rows of w start at multiples of 16 bytes.
void gemm_w4a8_sm90(const TensorView& a, const TensorView* a_scale, const TensorView& w,
                    const TensorView& w_scale, const TensorView* bias, const TensorView* low,
                    const TensorView* up, const TensorView* smooth, std::int64_t rotate,
                    const std::string& activation, const TensorView* gate,
                    const TensorView* residual, const TensorView* scale, const TensorView& out,
                    std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
