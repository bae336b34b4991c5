// quantize_int8: symmetric int8 quantisation of each row.
//
//   amax_r  = max_k |x_rk|
//   scale_r = amax_r / 127
//   q_rk    = round(x_rk * (127 / amax_r))      to nearest, ties to even; float32 throughout
//
// With an activation x becomes activation(x) first, rounded to its dtype: "gelu", "gelu_tanh" and
// "silu", or "geglu" and "swiglu" of rows twice as long, x_k activation(x_{K + k}). amax and q are
// of x' where there is a prologue: columns divided by smooth, then blocks of `rotate` neighbours
// rotated (fewstep/cpu/prologue.h has the arithmetic). With down, low = x down^T of the rows, after
// an activation and before the prologue, rounded once to x's dtype.
//
// x [R, K] (or [R, 2 K]) float32, bfloat16 or float16, unit stride in K; q [R, K] int8 and scale
// [R] float32, contiguous. A row below kQuantizeInt8Tiny (its scale would not be a normal number)
// counts as zero: scale 1, q 0. A row that holds an infinity or a NaN: scale NaN, q 0. smooth [K]
// float32, bfloat16 or float16, contiguous, or null; rotate 0 or 16, 32, ... 256 that divides K;
// down [D, K] and low [R, D] in x's dtype, contiguous, both or neither.
#pragma once

#include <string>

#include "fewstep/check.h"
#include "fewstep/tensor.h"

namespace fewstep {

constexpr float kQuantizeInt8Tiny = 127 * 0x1p-126f;

// Refuses a prologue that is none of rows of K values.
inline void check_prologue(const TensorView* smooth, std::int64_t rotate, std::int64_t K) {
    const bool is_power = (rotate & (rotate - 1)) == 0;
    FEWSTEP_CHECK(rotate == 0 || (is_power && 16 <= rotate && rotate <= 256 && K % rotate == 0),
                  "rotate: expected 0 or a power of two from 16 to 256 that divides K = ", K,
                  ", got ", rotate);
    if (smooth != nullptr) expect_contiguous(*smooth, "smooth", smooth->dtype, {K});
}

// Refuses rows that are none, or not what the activation makes the K columns of the outputs of.
inline void check_activated_rows(const TensorView& x, const std::string& activation,
                                 std::int64_t K) {
    const std::int64_t parts = activation == "geglu" || activation == "swiglu" ? 2 : 1;
    FEWSTEP_CHECK(x.ndim == 2, "x: expected 2 axes, got ", x.ndim);
    expect_rows(x, "x", x.dtype, {x.size(0), parts * K});
}

// Refuses a low-rank branch of rows [R, K] that is half one, or doesn't fit.
inline void check_low(const TensorView& x, const TensorView* down, const TensorView* low,
                      std::int64_t K) {
    if (down != nullptr) {
        FEWSTEP_CHECK(down->ndim == 2, "down: expected 2 axes, got ", down->ndim);
        expect_contiguous(*down, "down", x.dtype, {down->size(0), K});
    }
    FEWSTEP_CHECK((down == nullptr) == (low == nullptr), "low: expected one with down, got ",
                  low == nullptr ? "none" : "one without");
    if (down == nullptr) return;
    expect_contiguous(*low, "low", x.dtype, {x.size(0), down->size(0)});
}

namespace cpu {
void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const std::string& activation, const TensorView& q,
                   const TensorView& scale, const TensorView* low);
}
namespace cuda {
// At most 24,576 columns. low: of 16-bit rows of a multiple of 16 columns, 16 of which fit into
// shared memory, and ranks up to 64; x's rows, down and q at multiples of 16 bytes.
void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const std::string& activation, const TensorView& q,
                   const TensorView& scale, const TensorView* low, std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
