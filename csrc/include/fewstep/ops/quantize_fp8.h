// quantize_fp8: symmetric e4m3 quantisation of each row, or of blocks of neighbours in it.
//
//   amax  = max_k |x_k|                 over a block
//   scale = amax / 448
//   q     = round_to_e4m3(x / scale)    to nearest, ties to even, at most 448; float32 throughout
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
void quantize_fp8(const TensorView& x, const TensorView& q, const TensorView& scale,
                  std::int64_t size);
}

}  // namespace fewstep
