// Rows of a 4-bit weight as the bytes that gemm_w4a8's dot products take, for few rows of
// activations: there is no time to put neighbours side by side, so activations are reordered
// instead.
//
//   128 k of a row are 64 bytes of those with even k, then 64 of those with odd k
//
// A group has 16 values at most: its bytes are a table, made once and looked up 32 at a time in
// each 128 bits of a register.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fewstep/cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::int4 {

constexpr std::int64_t kBlock = 128;  // k that are reordered among themselves

// Rows [0, columns) of the weight, two k in a byte, and the factors of their groups.
struct Rows {
    const std::uint8_t* w;
    std::int64_t ld;
    const std::int16_t* factors;  // [columns][groups]
    std::int64_t groups, K;
    int columns;

    int group() const { return static_cast<int>(K / groups); }
};

// Bytes of a row once it is expanded.
inline std::int64_t padded(std::int64_t K) {
    return (K + kBlock - 1) / kBlock * kBlock;
}

// ((q f + 128) >> 8) + 128 of the four bits of q
[[gnu::always_inline]] inline std::uint8_t expand_value(int bits, std::int16_t factor) {
    const std::uint16_t f = static_cast<std::uint16_t>(factor);
    const std::uint16_t c = static_cast<std::uint16_t>(0x8080 - 8 * f);
    return static_cast<std::uint8_t>(static_cast<std::uint16_t>((bits ^ 8) * f + c) >> 8);
}

// A row of activations in the order of the weight's, with zeros for k behind the last.
inline void reorder(const std::int8_t* a, std::int64_t K, std::int8_t* to) {
    for (std::int64_t k = 0; k < K; k += kBlock, to += kBlock) {
        const std::int64_t pairs = std::min(kBlock, K - k) / 2;
        if (pairs < kBlock / 2) std::memset(to, 0, kBlock);
        for (std::int64_t i = 0; i < pairs; ++i) {
            to[i] = a[k + 2 * i];
            to[kBlock / 2 + i] = a[k + 2 * i + 1];
        }
    }
}

// Row n to bytes + n * padded(K). What they hold for k behind the last may be anything.
[[gnu::always_inline]] inline void expand_rows(const Rows& p, std::uint8_t* bytes) {
    const std::int64_t half = p.group() / 2;
    for (int n = 0; n < p.columns; ++n, bytes += padded(p.K)) {
        const std::uint8_t* const row = p.w + n * p.ld;
        for (std::int64_t g = 0; g < p.groups; ++g) {
            const std::int64_t first = g * half;
            std::uint8_t* const out = bytes + first / (kBlock / 2) * kBlock + first % (kBlock / 2);
            const std::int16_t f = p.factors[n * p.groups + g];
            for (std::int64_t i = 0; i < half; ++i) {
                out[i] = expand_value(row[first + i] & 15, f);
                out[kBlock / 2 + i] = expand_value(row[first + i] >> 4, f);
            }
        }
    }
}

using ExpandFunction = void (*)(const Rows&, std::uint8_t* bytes);

inline void expand_rows_portable(const Rows& p, std::uint8_t* bytes) {
    expand_rows(p, bytes);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline void expand_rows_avx2(const Rows& p, std::uint8_t* bytes) {
    expand_rows(p, bytes);
}

// The bytes of all values of four groups, 16 in each quarter.
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline __m512i make_tables(const std::int16_t* factors,
                                                                        std::int64_t left) {
    const __m512i quarter = _mm512_set_epi16(3, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1,
                                             1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    const __m512i values = _mm512_set_epi16(7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0, 7, 6, 5,
                                            4, 3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0);
    const __mmask8 known = left >= 4 ? 15 : static_cast<__mmask8>((1 << left) - 1);
    const __m128i four = _mm_maskz_loadu_epi16(known, factors);
    const __m512i f = _mm512_permutexvar_epi16(quarter, _mm512_castsi128_si512(four));
    // q f + 128, and 128 in the upper byte: of 0 to 7, and of the bits 8 to 15, which are -8 to -1.
    const __m512i upper = _mm512_add_epi16(_mm512_mullo_epi16(values, f),
                                           _mm512_set1_epi16(static_cast<short>(0x8080)));
    const __m512i lower = _mm512_sub_epi16(upper, _mm512_slli_epi16(f, 3));
    return _mm512_packus_epi16(_mm512_srli_epi16(upper, 8), _mm512_srli_epi16(lower, 8));
}

template <int kGroup>
FEWSTEP_TARGET_AVX512 void expand_rows_avx512(const Rows& p, std::uint8_t* bytes) {
    constexpr int kBlocks = 4 * kGroup / kBlock;  // that four groups span
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int n = 0; n < p.columns; ++n, bytes += padded(p.K)) {
        const std::uint8_t* const row = p.w + n * p.ld;
        const std::int16_t* const factors = p.factors + n * p.groups;
        for (std::int64_t g = 0; g < p.groups; g += 4) {
            const __m512i tables = make_tables(factors + g, p.groups - g);
            const auto block = [&](std::int64_t k, __m512i table) FEWSTEP_TARGET_AVX512
                __attribute__((always_inline)) {
                    const std::int64_t left = p.K - k;
                    if (left <= 0) return;
                    const __mmask64 inside = left >= kBlock ? ~0ull : (1ull << (left / 2)) - 1;
                    const __m512i q = _mm512_maskz_loadu_epi8(inside, row + k / 2);
                    const __m512i even = _mm512_and_si512(q, nibble);
                    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(q, 4), nibble);
                    _mm512_storeu_si512(bytes + k, _mm512_shuffle_epi8(table, even));
                    _mm512_storeu_si512(bytes + k + kBlock / 2, _mm512_shuffle_epi8(table, odd));
                };
            const std::int64_t k = g * kGroup;
            if constexpr (kBlocks == 1) {
                block(k, tables);
            } else if constexpr (kBlocks == 2) {
                block(k, _mm512_shuffle_i64x2(tables, tables, 0x50));
                block(k + kBlock, _mm512_shuffle_i64x2(tables, tables, 0xfa));
            } else {
                block(k, _mm512_shuffle_i64x2(tables, tables, 0x00));
                block(k + kBlock, _mm512_shuffle_i64x2(tables, tables, 0x55));
                block(k + 2 * kBlock, _mm512_shuffle_i64x2(tables, tables, 0xaa));
                block(k + 3 * kBlock, _mm512_shuffle_i64x2(tables, tables, 0xff));
            }
        }
    }
}
#endif

// `group` is the number of k that share a factor.
inline ExpandFunction choose_expand_rows(Isa isa, std::int64_t group) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        return group == 32   ? expand_rows_avx512<32>
               : group == 64 ? expand_rows_avx512<64>
                             : expand_rows_avx512<128>;
    }
    if (isa == Isa::kAvx2) return expand_rows_avx2;
#endif
    (void)isa, (void)group;
    return expand_rows_portable;
}

}  // namespace fewstep::cpu::int4
