// quantize_fp8: symmetric e4m3 quantisation of each row, or of blocks of neighbours in it.
//
//   amax  = max_k |x_k|                 over a block
//   scale = amax / 448
//   q     = round_to_e4m3(x / scale)    to nearest, ties to even, at most 448; float32 throughout
//
// amax and q are of x' where there is a prologue, and with down there is low = x down^T: smooth,
// rotate, down and low as in quantize_int8.h.
//
// x [R, K] float32, bfloat16 or float16, unit stride in K; q [R, K] uint8, the bits, and scale
// [R, S] float32, contiguous; S = ceil(K / size) blocks of `size` values, the last one shorter, or
// one block of K = 0 values. A block below kQuantizeFp8Tiny (its scale would not be a normal
// number) counts as zero: scale 1, q 0. One that holds an infinity or a NaN: scale NaN, q 0.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr float kQuantizeFp8Top = 448.0f;  // the largest e4m3 number
constexpr float kQuantizeFp8Tiny = kQuantizeFp8Top * 0x1p-126f;

namespace cpu {
void quantize_fp8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                  const TensorView* down, const TensorView& q, const TensorView& scale,
                  std::int64_t size, const TensorView* low);
}

}  // namespace fewstep
