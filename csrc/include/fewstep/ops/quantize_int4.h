// quantize_int4: symmetric 4-bit quantisation of a weight in groups of neighbours in a row.
//
//   s = round_to_bf16(max |w| / 7)     over a group of G neighbours
//   q = clamp(round(w / s), -8, 7)     to nearest, ties to even; float32 throughout
//
// With rotate, blocks of so many neighbours of w are rotated first (fewstep/cpu/prologue.h): 0 for
// none, or 16, 32, ... 256 that divides K.
//
// w [N, K] float32, bfloat16 or float16, unit stride in K; q [N, K / 2] uint8, two values a byte,
// the even column in the low half; scale [N, K / G] bfloat16, G even; q and scale contiguous. A
// group whose scale is below kQuantizeInt4Tiny counts as zero: that scale, q 0. A group that holds
// an infinity or a NaN: scale NaN, q 0.
#pragma once

#include "fewstep/tensor.h"

namespace fewstep {

constexpr float kQuantizeInt4Tiny = 0x1p-126f;
constexpr std::int64_t kQuantizeInt4MaxGroup = 128;

namespace cpu {
void quantize_int4(const TensorView& w, std::int64_t rotate, const TensorView& q,
                   const TensorView& scale);
}

}  // namespace fewstep
