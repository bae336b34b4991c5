// 16 float32 values to memory, rounded to nearest, ties to even, as Convert<Out> does.
#pragma once

#include "fewstep/cpu/isa.h"
#include "fewstep/numeric.h"
#if defined(__x86_64__)
#include <immintrin.h>

namespace fewstep::cpu {

FEWSTEP_TARGET_AVX512 inline void store(float* out, __m512 value) {
    _mm512_storeu_ps(out, value);
}
FEWSTEP_TARGET_AVX512 inline void store(float16* out, __m512 value) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(value, kNearest));
}
FEWSTEP_TARGET_AVX512 inline void store(bfloat16* out, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// For each of 16 lanes the smaller magnitude of two, that of a number if the other is NaN.
FEWSTEP_TARGET_AVX512 inline __m512 least_magnitude(__m512 a, __m512 b) {
    return _mm512_range_ps(a, b, 0b1010);
}

// 32 values, none of them subnormal: the bits of two store(). Needs avx512bf16, which the functions
// around it are not compiled for; a zero among the values is kept.
FEWSTEP_TARGET_AVX512 inline void store_normal(bfloat16* out, __m512 first, __m512 second) {
    __m512i rounded;
    asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(rounded) : "v"(first), "v"(second));
    _mm512_storeu_si512(out, rounded);
}

}  // namespace fewstep::cpu
#endif
