// e4m3 to bfloat16, which holds it exactly: rows as they lie, and weights [N, K] in natural order
// as the panels that bf16_tiles.h multiplies with.
//
//   words[p][n] = w[n][2 p] | w[n][2 p + 1] << 16      n in [0, width), width a multiple of 16
//
// In units of a pair of k it is a transposition: on AVX-512 one of 16 x 16 words takes 64 shuffles
// and expanding them 100 more operations, as long as the products of 10 rows. So a layer needs no
// second, rearranged copy of its weight.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/transpose.h"
#include "fewstep/numeric.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::e4m3 {

// The bits in bfloat16. Branch-free so that it vectorises, and without float subnormals on the way,
// which a process may flush to zero.
[[gnu::always_inline]] inline std::uint32_t widen(std::uint32_t q) {
    const std::uint32_t magnitude = q & 0x7f;
    const float small = static_cast<float>(static_cast<std::int32_t>(magnitude)) * 0x1p-9f;
    const std::uint32_t normal = (magnitude << 4) + ((127 - 7) << 7);
    std::uint32_t bits = magnitude < 8 ? float_to_bits(small) >> 16 : normal;
    bits = magnitude == 0x7f ? 0x7fc0 : bits;
    return bits | (q & 0x80) << 8;
}

// A row of n values as (n + 1) / 2 words; what would be behind an odd last value is zero.
[[gnu::always_inline]] inline void widen_row(const std::uint8_t* q, std::int64_t n,
                                             std::uint32_t* words) {
    for (std::int64_t p = 0; p < n / 2; ++p) words[p] = widen(q[2 * p]) | widen(q[2 * p + 1]) << 16;
    if (n % 2 != 0) words[n / 2] = widen(q[n - 1]);
}

// Rows of the weight, `length` values each at distance ld. Columns of the panel from `columns` to
// its width hold anything finite or not; what is behind an odd last k is zero.
struct Panel {
    const std::uint8_t* w;
    std::int64_t ld;
    int columns;
    std::int64_t length;

    int width() const { return (columns + 15) / 16 * 16; }
};

[[gnu::always_inline]] inline void expand(const Panel& p, std::uint32_t* words) {
    const int width = p.width();
    for (int n = 0; n < width; ++n) {
        const std::uint8_t* const row = p.w + std::min(n, p.columns - 1) * p.ld;
        for (std::int64_t k = 0; k + 1 < p.length; k += 2) {
            words[k / 2 * width + n] = widen(row[k]) | widen(row[k + 1]) << 16;
        }
        if (p.length % 2 != 0) words[p.length / 2 * width + n] = widen(row[p.length - 1]);
    }
}

using RowFunction = void (*)(const std::uint8_t*, std::int64_t, std::uint32_t*);
using PanelFunction = void (*)(const Panel&, std::uint32_t*);

inline void row_portable(const std::uint8_t* q, std::int64_t n, std::uint32_t* words) {
    widen_row(q, n, words);
}
inline void panel_portable(const Panel& p, std::uint32_t* words) {
    expand(p, words);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline void row_avx2(const std::uint8_t* q, std::int64_t n,
                                         std::uint32_t* words) {
    widen_row(q, n, words);
}
FEWSTEP_TARGET_AVX2 inline void panel_avx2(const Panel& p, std::uint32_t* words) {
    expand(p, words);
}

// All 128 magnitudes in four registers: two permutations look 32 values up.
struct Table {
    __m512i magnitude[4];

    FEWSTEP_TARGET_AVX512 Table() {
        alignas(64) std::uint16_t bits[128];
        for (std::uint32_t q = 0; q < 128; ++q) bits[q] = static_cast<std::uint16_t>(widen(q));
        for (int i = 0; i < 4; ++i) magnitude[i] = _mm512_load_si512(bits + 32 * i);
    }

    FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline __m512i widen32(__m256i q) const {
        constexpr int kMerge = 0xf8;  // first | (second & third)
        const __m512i wide = _mm512_cvtepu8_epi16(q);
        const __mmask32 upper = _mm512_test_epi16_mask(wide, _mm512_set1_epi16(0x40));
        // The permutation reads the low six bits of a value alone.
        const __m512i low = _mm512_permutex2var_epi16(magnitude[0], wide, magnitude[1]);
        const __m512i high = _mm512_permutex2var_epi16(magnitude[2], wide, magnitude[3]);
        return _mm512_ternarylogic_epi32(_mm512_mask_mov_epi16(low, upper, high),
                                         _mm512_slli_epi16(wide, 8),
                                         _mm512_set1_epi16(static_cast<short>(0x8000)), kMerge);
    }
};

FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline __m256i load_part(const std::uint8_t* q,
                                                                      std::int64_t left) {
    const __mmask32 mask = left >= 32 ? ~0u : (1u << left) - 1;
    return _mm256_maskz_loadu_epi8(mask, q);
}

FEWSTEP_TARGET_AVX512 inline void row_avx512(const std::uint8_t* q, std::int64_t n,
                                             std::uint32_t* words) {
    const Table table;
    for (std::int64_t k = 0; k < n; k += 32, words += 16) {
        const std::int64_t pairs = std::min<std::int64_t>(16, (n - k + 1) / 2);
        const __mmask16 mask = static_cast<__mmask16>((1u << pairs) - 1);
        _mm512_mask_storeu_epi32(words, mask, table.widen32(load_part(q + k, n - k)));
    }
}

FEWSTEP_TARGET_AVX512 inline void panel_avx512(const Panel& p, std::uint32_t* words) {
    constexpr std::int64_t kAhead = 512;
    const Table table;
    const int width = p.width();
    for (int n = 0; n < p.columns; n += 16) {
        const std::uint8_t* row[16];
        for (int i = 0; i < 16; ++i) row[i] = p.w + std::min(n + i, p.columns - 1) * p.ld;
        std::uint32_t* out = words + n;
        for (std::int64_t k = 0; k < p.length; k += 32, out += 16 * width) {
            __m512i block[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                _mm_prefetch(reinterpret_cast<const char*>(row[i] + k + kAhead), _MM_HINT_T0);
                block[i] = table.widen32(load_part(row[i] + k, p.length - k));
            }
            transpose_words(block);
            const int pairs = static_cast<int>(std::min<std::int64_t>(16, (p.length - k + 1) / 2));
            if (pairs == 16) {
#pragma GCC unroll 16
                for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * width, block[i]);
            } else {
                for (int i = 0; i < pairs; ++i) _mm512_storeu_si512(out + i * width, block[i]);
            }
        }
    }
}
#endif

inline RowFunction choose_row(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return row_avx512;
    if (isa == Isa::kAvx2) return row_avx2;
#endif
    (void)isa;
    return row_portable;
}

inline PanelFunction choose_panel(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return panel_avx512;
    if (isa == Isa::kAvx2) return panel_avx2;
#endif
    (void)isa;
    return panel_portable;
}

}  // namespace fewstep::cpu::e4m3
