// quantize_fp8: symmetric e4m3 quantisation of each row, or of blocks of neighbours in it.
//
//   amax  = max_k |x_k|                 over a block
//   scale = amax / 448
//   q     = round_to_e4m3(x / scale)    to nearest, ties to even, at most 448; float32 throughout
//
// activation, smooth, rotate, down and low as in quantize_int8.h.
//
// x [R, K] (or [R, 2 K]) float32, bfloat16 or float16, unit stride in K; q [R, K] uint8, the bits,
// and scale [R, S] float32, contiguous; S = ceil(K / size) blocks of `size` values, the last one
// shorter, or one block of K = 0 values. A block below kQuantizeFp8Tiny (its scale would not be a
// normal number) counts as zero: scale 1, q 0. One that holds an infinity or a NaN: scale NaN, q 0.
#pragma once

#include <algorithm>
#include <string>

#include "fewstep/check.h"
#include "fewstep/tensor.h"

namespace fewstep {

constexpr float kQuantizeFp8Top = 448.0f;  // the largest e4m3 number
constexpr float kQuantizeFp8Tiny = kQuantizeFp8Top * 0x1p-126f;

// Refuses outputs for x's R rows that don't fit each other; K is the columns of q.
inline void check_quantize_fp8_outputs(const TensorView& x, const TensorView& q,
                                       const TensorView& scale, std::int64_t size) {
    FEWSTEP_CHECK(q.ndim == 2 && scale.ndim == 2, "q, scale: expected 2 axes, got ", q.ndim,
                  " and ", scale.ndim);
    const std::int64_t R = x.size(0), K = q.size(1), blocks = scale.size(1);
    FEWSTEP_CHECK(size > 0 && blocks == std::max<std::int64_t>((K + size - 1) / size, 1),
                  "scale: expected [R, ceil(K / size)] for K = ", K, " and size = ", size, ", got ",
                  blocks, " columns");
    expect_contiguous(q, "q", DType::kUInt8, {R, K});
    expect_contiguous(scale, "scale", DType::kFloat32, {R, blocks});
}

namespace cpu {
void quantize_fp8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                  const TensorView* down, const std::string& activation, const TensorView& q,
                  const TensorView& scale, std::int64_t size, const TensorView* low);
}
namespace cuda {
// size: 128, or all of a row. At most 24,576 columns; low as in quantize_int8.h.
void quantize_fp8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                  const TensorView* down, const std::string& activation, const TensorView& q,
                  const TensorView& scale, std::int64_t size, const TensorView* low,
                  std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
