// One row of symmetric int8 quantisation, shared by quantize_int8 and the int8 products. A row is
// read twice, the second time from cache. The maximum is taken on the bits without the sign, which
// order like the magnitudes and put infinity and NaN on top, so one integer maximum also answers
// whether the row is finite.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "fewstep/cpu/isa.h"
#include "fewstep/numeric.h"
#include "fewstep/ops/quantize_int8.h"

namespace fewstep::cpu::quantize {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
    using type = std::uint32_t;
    static constexpr type kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
};
template <>
struct Bits<bfloat16> {
    using type = std::uint16_t;
    static constexpr type kMagnitude = 0x7fff, kInfinity = 0x7f80;
};
template <>
struct Bits<float16> {
    using type = std::uint16_t;
    static constexpr type kMagnitude = 0x7fff, kInfinity = 0x7c00;
};

template <typename T>
[[gnu::always_inline]] inline typename Bits<T>::type max_magnitude(const T* x, std::int64_t n) {
    using Word = typename Bits<T>::type;
    const Word* words = reinterpret_cast<const Word*>(x);
    Word top = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const Word magnitude = words[i] & Bits<T>::kMagnitude;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

template <typename T>
[[gnu::always_inline]] inline float quantize_row(const T* x, std::int8_t* q, std::int64_t n) {
    const auto bits = max_magnitude(x, n);
    T top;
    std::memcpy(&top, &bits, sizeof top);
    const float amax = to_acc(top);
    const bool finite = bits < Bits<T>::kInfinity;
    if (!finite || amax < kQuantizeInt8Tiny) {
        if (n > 0) std::memset(q, 0, static_cast<std::size_t>(n));
        return finite ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const float inverse = 127.0f / amax;
    for (std::int64_t i = 0; i < n; ++i) {
        q[i] = static_cast<std::int8_t>(static_cast<int>(std::rint(to_acc(x[i]) * inverse)));
    }
    return amax / 127.0f;
}

#if defined(__x86_64__)
template <typename T>
FEWSTEP_TARGET_AVX512 float row_avx512(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}
template <typename T>
FEWSTEP_TARGET_AVX2 float row_avx2(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}
#endif
template <typename T>
float row_portable(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}

// Fills q[0 ... n) and returns the scale.
template <typename T>
using RowFunction = float (*)(const T* x, std::int8_t* q, std::int64_t n);

template <typename T>
RowFunction<T> choose_row() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return row_avx512<T>;
    if (isa() == Isa::kAvx2) return row_avx2<T>;
#endif
    return row_portable<T>;
}

}  // namespace fewstep::cpu::quantize
