// Few rows of activations by rows of a weight, both as they lie: the inner loops for products that
// read a weight about as long as they multiply.
//
//   acc[r][c] = sum_k a[r][k] b[c][k]      a int8, b uint8, int32 modulo 2^32, c in [0, 4)
//
// With kSigned the bytes of b are w and count as w + 128, so a sum is what int8_tiles.h makes of a
// panel. A tile is 4 x 4: for 64 bytes of k four loads of b and four of a feed 16 dot products, and
// the memory sees four rows of the weight at a time from their beginning to their end.
#pragma once

#include <cstdint>

#include "fewstep/cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::int8 {

constexpr int kDots = 4;  // rows and columns of a tile

struct Dots {
    const std::int8_t* a;
    std::int64_t lda;
    const std::uint8_t* b[kDots];
    std::int64_t K;
    int rows;           // 1..kDots
    std::int32_t* acc;  // row r at acc + r * ld
    std::int64_t ld;
    const void* coming;  // `lines` of 64 bytes from here per 64 k go to the second-level cache
    int lines;           // 0 for none
};

template <bool kSigned>
[[gnu::always_inline]] inline void dots(const Dots& d) {
    constexpr std::uint8_t kFlip = kSigned ? 0x80 : 0;
    for (int r = 0; r < d.rows; ++r) {
        const std::int8_t* a = d.a + r * d.lda;
        for (int c = 0; c < kDots; ++c) {
            const std::uint8_t* b = d.b[c];
            std::uint32_t sum = 0;
            for (std::int64_t k = 0; k < d.K; ++k) {
                sum += static_cast<std::uint32_t>(a[k] * static_cast<std::uint8_t>(b[k] ^ kFlip));
            }
            d.acc[r * d.ld + c] = static_cast<std::int32_t>(sum);
        }
    }
}

template <bool kSigned>
void dots_portable(const Dots& d) {
    dots<kSigned>(d);
}

#if defined(__x86_64__)
template <bool kSigned>
FEWSTEP_TARGET_AVX2 void dots_avx2(const Dots& d) {
    dots<kSigned>(d);
}

template <int kRows, bool kSigned>
FEWSTEP_TARGET_AVX512 void dots_avx512(const Dots& d) {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i acc[kRows][kDots];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kDots; ++c) acc[r][c] = _mm512_setzero_si512();
    }
    const auto step = [&](std::int64_t k, auto load) FEWSTEP_TARGET_AVX512
        __attribute__((always_inline)) {
            const char* coming = reinterpret_cast<const char*>(d.coming) + d.lines * k;
            for (int i = 0; i < d.lines; ++i) _mm_prefetch(coming + 64 * i, _MM_HINT_T1);
            __m512i b[kDots];
#pragma GCC unroll 4
            for (int c = 0; c < kDots; ++c) {
                b[c] = load(d.b[c] + k);
                if (kSigned) b[c] = _mm512_xor_si512(b[c], flip);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const __m512i a = load(d.a + r * d.lda + k);
#pragma GCC unroll 4
                for (int c = 0; c < kDots; ++c) {
                    asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][c]) : "v"(b[c]), "v"(a));
                }
            }
        };
    std::int64_t k = 0;
    for (; k + 64 <= d.K; k += 64) {
        step(k, [](const void* p) FEWSTEP_TARGET_AVX512
             __attribute__((always_inline)) { return _mm512_loadu_si512(p); });
    }
    if (k < d.K) {
        const __mmask64 mask = (1ull << (d.K - k)) - 1;
        step(k, [&](const void* p) FEWSTEP_TARGET_AVX512
             __attribute__((always_inline)) { return _mm512_maskz_loadu_epi8(mask, p); });
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
        // Four vectors to one of their four sums in every quarter, then the quarters.
        const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[r][0], acc[r][1]),
                                               _mm512_unpackhi_epi32(acc[r][0], acc[r][1]));
        const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(acc[r][2], acc[r][3]),
                                                _mm512_unpackhi_epi32(acc[r][2], acc[r][3]));
        const __m512i quarters = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second),
                                                  _mm512_unpackhi_epi64(first, second));
        const __m256i halves = _mm256_add_epi32(_mm512_castsi512_si256(quarters),
                                                _mm512_extracti64x4_epi64(quarters, 1));
        const __m128i sums =
            _mm_add_epi32(_mm256_castsi256_si128(halves), _mm256_extracti128_si256(halves, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(d.acc + r * d.ld), sums);
    }
}
#endif

using DotsFunction = void (*)(const Dots&);

template <bool kSigned>
DotsFunction choose_dots(Isa isa, int rows) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        constexpr DotsFunction table[] = {dots_avx512<1, kSigned>, dots_avx512<2, kSigned>,
                                          dots_avx512<3, kSigned>, dots_avx512<4, kSigned>};
        return table[rows - 1];
    }
    if (isa == Isa::kAvx2) return dots_avx2<kSigned>;
#endif
    (void)isa, (void)rows;
    return dots_portable<kSigned>;
}

}  // namespace fewstep::cpu::int8
