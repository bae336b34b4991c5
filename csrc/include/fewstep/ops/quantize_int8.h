// quantize_int8: symmetric int8 quantisation of each row.
//
//   amax_r  = max_k |x_rk|
//   scale_r = amax_r / 127
//   q_rk    = round(x_rk * (127 / amax_r))      to nearest, ties to even; float32 throughout
//
// amax and q are of x' where there is a prologue: columns divided by smooth, then blocks of
// `rotate` neighbours rotated (fewstep/cpu/prologue.h has the arithmetic). With down, low = x
// down^T of the rows as they are given, rounded once to x's dtype.
//
// x [R, K] float32, bfloat16 or float16, unit stride in K; q [R, K] int8 and scale [R] float32,
// contiguous. A row below kQuantizeInt8Tiny (its scale would not be a normal number) counts as
// zero: scale 1, q 0. A row that holds an infinity or a NaN: scale NaN, q 0. smooth [K] float32,
// bfloat16 or float16, contiguous, or null; rotate 0 or 16, 32, ... 256 that divides K; down [D, K]
// and low [R, D] in x's dtype, contiguous, both or neither.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr float kQuantizeInt8Tiny = 127 * 0x1p-126f;

namespace cpu {
void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const TensorView& q, const TensorView& scale,
                   const TensorView* low);
}

}  // namespace fewstep
