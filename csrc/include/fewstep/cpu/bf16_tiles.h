// The inner loops of gemm_fp8, one per instruction set: a tile of a few rows by one panel.
//
//   acc[r][n] = sum_k a[r][k] * b[k][n]      bfloat16 operands whose products are exact in float32
//
// k comes in pairs (2 p, 2 p + 1). a: rows of `pairs` words at distance lda, the even k in the low
// half; b: [pairs][16 * vectors] such words; acc: row r at acc + r * kPanel (the form with dot
// products leaves its sums in registers). The odd k of a pair is added before the even one, each
// rounded to float32: the order of vdpbf16ps (Intel's manual; found alike on Zen 4), so every
// instruction set returns the same bits. With `resume` the sums go on from what acc holds: K may
// come in slices.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fewstep/cpu/isa.h"
#include "fewstep/numeric.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::bf16 {

constexpr int kPanel = 64;
constexpr int kMaxRows = 6;

struct Tile {
    const std::uint32_t* a;
    std::int64_t lda;
    const std::uint32_t* b;
    std::int64_t pairs;
    int rows;     // 1..tile_rows()
    int vectors;  // panel width / 16
    float* acc;
    bool resume;
    // Scales of blocks of kBlockPairs, the first of them the tile's; null where there are none.
    // Of row r: a_scale[r * ld_a_scale + block]. Of column n: w_scale[block * ld_w_scale + n].
    const float* a_scale = nullptr;
    const float* w_scale = nullptr;
    std::int64_t ld_a_scale = 0, ld_w_scale = 0;
};

constexpr std::int64_t kBlockPairs = 64;

inline float even_of(std::uint32_t pair) {
    return bits_to_float(pair << 16);
}
inline float odd_of(std::uint32_t pair) {
    return bits_to_float(pair & 0xffff0000u);
}

inline void accumulate_portable(const Tile& t) {
    const int width = t.vectors * 16;
    for (int r = 0; r < t.rows; ++r) {
        float sums[kPanel] = {};
        if (t.resume) std::memcpy(sums, t.acc + r * kPanel, sizeof(float) * width);
        const std::uint32_t* const a = t.a + r * t.lda;
        for (std::int64_t p = 0; p < t.pairs; ++p) {
            const float even = even_of(a[p]), odd = odd_of(a[p]);
            const std::uint32_t* const b = t.b + p * width;
            // Products are exact, so a compiler may fuse them or not.
            for (int n = 0; n < width; ++n) {
                sums[n] += odd * odd_of(b[n]);
                sums[n] += even * even_of(b[n]);
            }
        }
        std::memcpy(t.acc + r * kPanel, sums, sizeof(float) * width);
    }
}

#if defined(__x86_64__)

// 4 rows x 16 columns: 8 sums, 4 vectors of weights, 2 of activations.
template <int kRows>
FEWSTEP_TARGET_AVX2 void accumulate_avx2(const Tile& t) {
    const int width = t.vectors * 16;
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    for (int n = 0; n < width; n += 16) {
        __m256 acc[kRows][2];
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < 2; ++v) {
                const float* const from = t.acc + r * kPanel + n + 8 * v;
                acc[r][v] = t.resume ? _mm256_loadu_ps(from) : _mm256_setzero_ps();
            }
        }
        for (std::int64_t p = 0; p < t.pairs; ++p) {
            __m256 even[2], odd[2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const __m256i b = _mm256_loadu_si256(
                    reinterpret_cast<const __m256i*>(t.b + p * width + n + 8 * v));
                even[v] = _mm256_castsi256_ps(_mm256_slli_epi32(b, 16));
                odd[v] = _mm256_castsi256_ps(_mm256_and_si256(b, high));
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                const std::uint32_t pair = t.a[r * t.lda + p];
                const __m256 odd_a = _mm256_set1_ps(odd_of(pair));
                const __m256 even_a = _mm256_set1_ps(even_of(pair));
#pragma GCC unroll 2
                for (int v = 0; v < 2; ++v) {
                    acc[r][v] = _mm256_fmadd_ps(odd_a, odd[v], acc[r][v]);
                    acc[r][v] = _mm256_fmadd_ps(even_a, even[v], acc[r][v]);
                }
            }
        }
        for (int r = 0; r < kRows; ++r) {
            for (int v = 0; v < 2; ++v) {
                _mm256_storeu_ps(t.acc + r * kPanel + n + 8 * v, acc[r][v]);
            }
        }
    }
}

template <int kRows, int kVectors>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void load_sums(const Tile& t,
                                                                   __m512 (&acc)[kRows][kVectors]) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            acc[r][v] =
                t.resume ? _mm512_loadu_ps(t.acc + r * kPanel + 16 * v) : _mm512_setzero_ps();
        }
    }
}

// Without bfloat16 dot products: up to 4 rows x 64 columns, words taken apart in registers.
template <int kRows, int kVectors>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void multiply_avx512(
    const Tile& t, __m512 (&acc)[kRows][kVectors]) {
    load_sums(t, acc);
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    const std::uint32_t* b = t.b;
    for (std::int64_t p = 0; p < t.pairs; ++p, b += 16 * kVectors) {
        __m512 even_a[kRows], odd_a[kRows];
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
            const std::uint32_t pair = t.a[r * t.lda + p];
            even_a[r] = _mm512_set1_ps(even_of(pair));
            odd_a[r] = _mm512_set1_ps(odd_of(pair));
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m512i bv = _mm512_loadu_si512(b + 16 * v);
            const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(bv, 16));
            const __m512 odd = _mm512_castsi512_ps(_mm512_and_si512(bv, high));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
                acc[r][v] = _mm512_fmadd_ps(odd_a[r], odd, acc[r][v]);
                acc[r][v] = _mm512_fmadd_ps(even_a[r], even, acc[r][v]);
            }
        }
    }
}

// With them: up to 6 rows x 64 columns in 24 accumulators; a pair costs 4 loads of b and 6
// broadcasts of a for 24 products. Written out and not unrolled for the reason in int8_tiles.h.
template <int kRows, int kVectors>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void multiply_avx512_bf16(
    const Tile& t, __m512 (&acc)[kRows][kVectors]) {
    load_sums(t, acc);
    const std::uint32_t* a = t.a;
    const std::uint32_t* b = t.b;
    for (std::int64_t p = 0; p < t.pairs; ++p, ++a, b += 16 * kVectors) {
        __m512i bv[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) bv[v] = _mm512_loadu_si512(b + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512i av = _mm512_set1_epi32(static_cast<int>(a[r * t.lda]));
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                asm("vdpbf16ps %2, %1, %0" : "+v"(acc[r][v]) : "v"(bv[v]), "v"(av));
            }
        }
    }
}

#endif

}  // namespace fewstep::cpu::bf16
