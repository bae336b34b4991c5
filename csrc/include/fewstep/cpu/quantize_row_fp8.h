// One block of symmetric e4m3 quantisation, shared by quantize_fp8 and gemm_fp8. As in
// quantize_row.h the maximum is taken on the bits without the sign. The loops are plain and
// vectorised by the compiler, once for every instruction set that calls them; the division is a
// real one, because the contract is to the bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "fewstep/cpu/quantize_row.h"
#include "fewstep/ops/quantize_fp8.h"

namespace fewstep::cpu::quantize {

// The bits of x in e4m3, to nearest even, at most 448. Both roundings, so that there is no branch.
[[gnu::always_inline]] inline std::uint8_t round_to_e4m3(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const std::uint32_t sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    bits = bits > 0x43e00000 ? 0x43e00000 : bits;  // 448
    const std::uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    // Below 2^-6 the step is 2^-9, as it is for float32 from 2^14 on.
    const float shifted = magnitude + 0x1p14f;
    std::uint32_t small;
    std::memcpy(&small, &shifted, sizeof small);
    small -= 0x46800000;
    return static_cast<std::uint8_t>((bits < 0x3c800000 ? small : normal) | sign);
}

// Fills q[0 ... n) and returns the scale.
template <typename T>
[[gnu::always_inline]] inline float quantize_block_fp8(const T* x, std::uint8_t* q,
                                                       std::int64_t n) {
    const auto bits = max_magnitude(x, n);
    T top;
    std::memcpy(&top, &bits, sizeof top);
    const float amax = to_acc(top);
    const bool finite = bits < Bits<T>::kInfinity;
    if (!finite || amax < kQuantizeFp8Tiny) {
        if (n > 0) std::memset(q, 0, static_cast<std::size_t>(n));
        return finite ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const float scale = amax / kQuantizeFp8Top;
    for (std::int64_t i = 0; i < n; ++i) q[i] = round_to_e4m3(to_acc(x[i]) / scale);
    return scale;
}

}  // namespace fewstep::cpu::quantize
