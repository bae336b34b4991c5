// 16 x 16 words of 32 bits in registers, transposed by 64 shuffles.
#pragma once

#include "fewstep/cpu/isa.h"
#if defined(__x86_64__)
#include <immintrin.h>

namespace fewstep::cpu {

// rows[i] holds 16 words of row i; afterwards of column i.
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void transpose_words(__m512i (&rows)[16]) {
    __m512i pairs[16], fours[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    // Lane l of fours[4 q + i] is column 4 l + i of rows 4 q to 4 q + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i even_low = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88);
        const __m512i odd_low = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
        const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
        const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(even_low, even_high, 0x88);
        rows[4 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(even_low, even_high, 0xdd);
        rows[12 + i] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
}

}  // namespace fewstep::cpu
#endif
