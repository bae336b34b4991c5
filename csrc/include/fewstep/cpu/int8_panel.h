// From rows of a weight as they lie, [N, K], to the panel that int8_tiles.h multiplies with.
//
//   panel[k / 4][n][k % 4] = w[n][k] + 128        n in [0, width), width a multiple of 16
//
// In units of four bytes this is a transposition: on AVX-512, 16 x 16 of them take 64 shuffles. One
// thread arranges 64 columns while it would multiply them with about 5 rows of activations, so with
// 256 rows or more a second, rearranged copy of the weight would save 1 to 3 % (measured:
// docs/ops/gemm_w8a8.md) and double its memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/transpose.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::int8 {

// Rows [0, columns) of a weight at distance ld. What a panel has for columns from there to its
// width, and for bytes behind the last k, may be anything.
struct WeightRows {
    const std::int8_t* w;
    std::int64_t ld;
    int columns;
    std::int64_t K;

    int width() const { return (columns + 15) / 16 * 16; }
};

[[gnu::always_inline]] inline void arrange(const WeightRows& p, std::uint8_t* panel) {
    const int step = 4 * p.width();
    const std::int64_t groups = p.K / 4, tail = p.K % 4;
    for (int n = 0; n < p.columns; ++n) {
        const std::int8_t* row = p.w + n * p.ld;
        std::uint8_t* out = panel + 4 * n;
        for (std::int64_t g = 0; g < groups; ++g) {
            std::uint32_t word;
            std::memcpy(&word, row + 4 * g, 4);
            word ^= 0x80808080u;
            std::memcpy(out + g * step, &word, 4);
        }
        for (std::int64_t i = 0; i < tail; ++i) {
            out[groups * step + i] = static_cast<std::uint8_t>(row[4 * groups + i] ^ 0x80);
        }
    }
}

inline void arrange_portable(const WeightRows& p, std::uint8_t* panel) {
    arrange(p, panel);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline void arrange_avx2(const WeightRows& p, std::uint8_t* panel) {
    arrange(p, panel);
}

FEWSTEP_TARGET_AVX512 inline void arrange_avx512(const WeightRows& p, std::uint8_t* panel) {
    const int step = 4 * p.width();
    const __m512i offset = _mm512_set1_epi8(static_cast<char>(0x80));
    // All columns of 64 k before the next: what is written then is one stretch of 4 KiB.
    for (std::int64_t k = 0; k < p.K; k += 64, panel += 16 * step) {
        const std::int64_t left = p.K - k;
        const __mmask64 mask = left >= 64 ? ~0ull : (1ull << left) - 1;
        for (int n = 0; n < p.columns; n += 16) {
            __m512i block[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const std::int8_t* row = p.w + std::min(n + i, p.columns - 1) * p.ld + k;
                block[i] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, row), offset);
            }
            transpose_words(block);
            std::uint8_t* const out = panel + 4 * n;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                if (4 * i >= left) break;
                _mm512_storeu_si512(out + i * step, block[i]);
            }
        }
    }
}
#endif

using ArrangeFunction = void (*)(const WeightRows&, std::uint8_t* panel);

inline ArrangeFunction choose_arrange(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return arrange_avx512;
    if (isa == Isa::kAvx2) return arrange_avx2;
#endif
    (void)isa;
    return arrange_portable;
}

}  // namespace fewstep::cpu::int8
