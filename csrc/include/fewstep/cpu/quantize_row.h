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
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

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

// q = the integers nearest to x * inverse, which are at most 127.
template <typename T>
[[gnu::always_inline]] inline void round_row(const T* x, float inverse, std::int8_t* q,
                                             std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) {
        q[i] = static_cast<std::int8_t>(static_cast<int>(std::rint(to_acc(x[i]) * inverse)));
    }
}

// `Way` has a form of round_row.
template <typename Way, typename T>
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
    Way::round(x, 127.0f / amax, q, n);
    return amax / 127.0f;
}

struct Plain {
    template <typename T>
    [[gnu::always_inline]] static void round(const T* x, float inverse, std::int8_t* q,
                                             std::int64_t n) {
        round_row(x, inverse, q, n);
    }
};

#if defined(__x86_64__)
// bfloat16 written out: a compiler takes vectors of half the width, rounds to floats before it
// converts, and narrows in more steps: 6 cycles for 16 values with GCC 12 instead of 4.
struct Avx512 : Plain {
    using Plain::round;

    FEWSTEP_TARGET_AVX512 static void round(const bfloat16* x, float inverse, std::int8_t* q,
                                            std::int64_t n) {
        const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
        const __m512 factor = _mm512_set1_ps(inverse);
        std::int64_t i = 0;
        for (; i + 32 <= n; i += 32) {
            // Values at even places and at odd ones, and their integers as words in order again.
            const __m512i pairs = _mm512_loadu_si512(x + i);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, upper));
            const __m512i words = _mm512_mask_blend_epi16(
                0xaaaaaaaa, _mm512_cvtps_epi32(_mm512_mul_ps(even, factor)),
                _mm512_slli_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(odd, factor)), 16));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + i), _mm512_cvtepi16_epi8(words));
        }
        round_row(x + i, inverse, q + i, n - i);
    }
};

template <typename T>
FEWSTEP_TARGET_AVX512 float row_avx512(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row<Avx512>(x, q, n);
}
template <typename T>
FEWSTEP_TARGET_AVX2 float row_avx2(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row<Plain>(x, q, n);
}
#endif
template <typename T>
float row_portable(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row<Plain>(x, q, n);
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
