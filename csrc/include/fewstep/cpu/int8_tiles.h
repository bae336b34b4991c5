// The inner loops of int8_product.h, one per instruction set: a tile of a few rows by one panel.
//
//   acc[r][n] = sum_k a[r][k] * b[k][n]    a int8, b uint8 (w + 128), int32 modulo 2^32
//
// a: rows at distance lda, K = 4 * groups + tail bytes each; b: [groups (+ 1)][16 * vectors][4];
// acc: row r at acc + r * kPanel (the AVX-512 form leaves its sums in registers). The last,
// incomplete group of a is read byte by byte, so nothing behind a row is touched, and counts as
// zero.
#pragma once

#include <cstdint>
#include <cstring>

#include "fewstep/cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::int8 {

constexpr int kPanel = 64;
constexpr int kMaxRows = 6;

struct Tile {
    const std::int8_t* a;
    std::int64_t lda;
    const std::uint8_t* b;
    std::int64_t groups;
    int tail;     // 0..3
    int rows;     // 1..kernel's rows
    int vectors;  // panel width / 16
    std::int32_t* acc;
};

inline std::int32_t load_group(const std::int8_t* a, int bytes) {
    std::int32_t word = 0;
    std::memcpy(&word, a, static_cast<std::size_t>(bytes));
    return word;
}

inline void accumulate_portable(const Tile& t) {
    const int width = t.vectors * 16;
    for (int r = 0; r < t.rows; ++r) {
        std::uint32_t sums[kPanel] = {};
        const std::int8_t* a = t.a + r * t.lda;
        for (std::int64_t g = 0; g < t.groups + (t.tail != 0); ++g) {
            std::int8_t k[4] = {};
            std::memcpy(k, a + 4 * g, static_cast<std::size_t>(g < t.groups ? 4 : t.tail));
            const std::uint8_t* b = t.b + g * width * 4;
            for (int n = 0; n < width; ++n) {
                sums[n] += static_cast<std::uint32_t>(k[0] * b[4 * n] + k[1] * b[4 * n + 1] +
                                                      k[2] * b[4 * n + 2] + k[3] * b[4 * n + 3]);
            }
        }
        std::memcpy(t.acc + r * kPanel, sums, sizeof(std::int32_t) * width);
    }
}

#if defined(__x86_64__)

inline const __m128i* as_vector(const void* p) {
    return static_cast<const __m128i*>(p);
}

// AVX2 has vpmaddubsw for this shape of operands, but it saturates at 16 bits (255 * 127 * 2 does
// not fit), so both sides are widened to int16 and multiplied with vpmaddwd, which is exact.
// 4 rows x 8 columns; a lane pair holds k 0-1 and k 2-3 of one column until the end.
template <int kRows>
FEWSTEP_TARGET_AVX2 void accumulate_avx2(const Tile& t) {
    const int width = t.vectors * 16;
    for (int n = 0; n < width; n += 8) {
        __m256i acc[kRows][2];
        for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
        for (std::int64_t g = 0; g < t.groups + (t.tail != 0); ++g) {
            const std::uint8_t* b = t.b + (g * width + n) * 4;
            const __m256i b0 = _mm256_cvtepu8_epi16(_mm_loadu_si128(as_vector(b)));
            const __m256i b1 = _mm256_cvtepu8_epi16(_mm_loadu_si128(as_vector(b + 16)));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const std::int8_t* a = t.a + r * t.lda + 4 * g;
                const std::int32_t word = g < t.groups ? load_group(a, 4) : load_group(a, t.tail);
                const __m256i av = _mm256_cvtepi8_epi16(_mm_set1_epi32(word));
                acc[r][0] = _mm256_add_epi32(acc[r][0], _mm256_madd_epi16(av, b0));
                acc[r][1] = _mm256_add_epi32(acc[r][1], _mm256_madd_epi16(av, b1));
            }
        }
        for (int r = 0; r < kRows; ++r) {
            // hadd works within 128-bit halves: columns come out as 0 1 4 5 2 3 6 7.
            const __m256i pairs = _mm256_hadd_epi32(acc[r][0], acc[r][1]);
            const __m256i sums = _mm256_permute4x64_epi64(pairs, 0xd8);
            __m256i* const out = reinterpret_cast<__m256i*>(t.acc + r * kPanel + n);
            _mm256_storeu_si256(out, sums);
        }
    }
}

// AVX-512 VNNI: up to 6 rows x 64 columns in 24 accumulators; a group of four k costs 4 loads of b
// and 6 broadcasts of a for 24 vpdpbusd, so the dot product port is the only busy one.
// The instruction is written out because GCC 12 places a register copy before the intrinsic once
// more than 16 accumulators are live, which halves the rate; for the same reason the loop is not
// unrolled (both measured: docs/ops/gemm_w8a8.md).
template <int kRows, int kVectors>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void accumulate_avx512(
    const Tile& t, __m512i (&acc)[kRows][kVectors]) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            acc[r][v] = _mm512_setzero_si512();
        }
    }
    const std::int8_t* a = t.a;
    const std::uint8_t* b = t.b;
    const auto step = [&](auto load) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
        __m512i bv[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bv[v] = _mm512_loadu_si512(b + 64 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512i av = _mm512_set1_epi32(load(a + r * t.lda));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                asm("vpdpbusd %2, %1, %0" : "+v"(acc[r][v]) : "v"(bv[v]), "v"(av));
            }
        }
    };
    for (std::int64_t g = 0; g < t.groups; ++g) {
        step([](const std::int8_t* p) { return load_group(p, 4); });
        a += 4;
        b += 64 * kVectors;
    }
    if (t.tail != 0) step([&](const std::int8_t* p) { return load_group(p, t.tail); });
}

#endif

}  // namespace fewstep::cpu::int8
