// Vectors of what a ring's slots hold (slot.h), widened to float where they are loaded. Included by
// the bodies of foreach_isa.h (hence no include guard).

#include "fewstep/cpu/row_body.h"

typedef std::int32_t Ints __attribute__((vector_size(kVectorBytes)));

[[gnu::always_inline]] inline Vec<float> load_as(const std::int8_t* p) {
#if FEWSTEP_BODY_BITS == 512  // masked by all ones as in storage_body.h
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const Ints ints = (Ints)_mm512_maskz_cvtepi8_epi32(0xffff, codes);
#elif FEWSTEP_BODY_BITS == 256
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const Ints ints = (Ints)_mm256_cvtepi8_epi32(codes);
#else
    Ints ints = {};
    for (int i = 0; i < Lanes<float>::kCount; ++i) ints[i] = p[i];
#endif
    return __builtin_convertvector(ints, Vec<float>);
}

// Without float subnormals on the way, which a process may flush to zero. As float16 a code's
// exponent is 8 too small, also that of a subnormal; what is no number becomes none.
[[gnu::always_inline]] inline Vec<float> load_as(const e4m3* p) {
#if FEWSTEP_BODY_BITS == 512
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8);
    const __m256i magnitude = _mm256_and_si256(high, _mm256_set1_epi16(0x7f00));
    const __m256i sign = _mm256_xor_si256(high, magnitude);
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f00));
    const __m256i half = _mm256_or_si256(sign, _mm256_srli_epi16(magnitude, 1));
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, _mm256_or_si256(half, nan)) * 256.0f;
#elif FEWSTEP_BODY_BITS == 256
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m128i high = _mm_slli_epi16(_mm_cvtepu8_epi16(codes), 8);
    const __m128i magnitude = _mm_and_si128(high, _mm_set1_epi16(0x7f00));
    const __m128i sign = _mm_xor_si128(high, magnitude);
    const __m128i nan = _mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f00));
    const __m128i half = _mm_or_si128(sign, _mm_srli_epi16(magnitude, 1));
    return (Vec<float>)_mm256_cvtph_ps(_mm_or_si128(half, nan)) * 256.0f;
#else
    Ints ints = {};
    for (int i = 0; i < Lanes<float>::kCount; ++i) ints[i] = p[i].bits;
    const Ints magnitude = ints & 0x7f;
    const Ints small = (Ints)(__builtin_convertvector(magnitude, Vec<float>) * 0x1p-9f);
    const Ints normal = (magnitude << 20) + (120 << 23);
    const Ints finite = magnitude < 8 ? small : normal;
    const Ints bits = magnitude == 0x7f ? finite | 0x7fc00000 : finite;
    return (Vec<float>)(bits | (ints & 0x80) << 24);
#endif
}

// Each byte lies in 64 bits, of which the upper half gets its upper nibble; the sign comes with
// shifting up and down again.
[[gnu::always_inline]] inline Vec<float> load_as(const int4x2* p) {
#if FEWSTEP_BODY_BITS == 512
    const __m128i codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    const __m512i pairs = _mm512_maskz_cvtepu8_epi64(0xff, codes);
    const Ints ints = (Ints)_mm512_or_si512(pairs, _mm512_maskz_slli_epi64(0xff, pairs, 28));
#elif FEWSTEP_BODY_BITS == 256
    std::int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const __m256i pairs = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const Ints ints = (Ints)_mm256_or_si256(pairs, _mm256_slli_epi64(pairs, 28));
#else
    Ints ints = {};
    for (int i = 0; i < Lanes<float>::kCount; ++i) ints[i] = p[i / 2].bits >> i % 2 * 4;
#endif
    return __builtin_convertvector((ints << 28) >> 28, Vec<float>);
}

// Where value i of a run that starts at p lies; i is even for int4.
template <typename S>
[[gnu::always_inline]] inline const S* slot_at(const S* p, std::int64_t i) {
    return p + i;
}
[[gnu::always_inline]] inline const int4x2* slot_at(const int4x2* p, std::int64_t i) {
    return p + i / 2;
}

// Whole vectors, or with kTail n values and zeros.
template <bool kTail, typename S>
[[gnu::always_inline]] inline auto load_slot(const S* p, std::int64_t n) {
    if constexpr (!kTail) {
        return load_as(p);
    } else {
        constexpr int kHeld = std::is_same_v<S, int4x2> ? 2 : 1;
        S part[kVectorBytes] = {};
        for (std::int64_t i = 0; i < n; i += kHeld) part[i / kHeld] = p[i / kHeld];
        return load_as(part);
    }
}

// Calls run(first, n, factor) for the parts of columns [first, first + n) that share a factor,
// which is all of them with `scale` null. `scale` are those of the row.
template <typename Acc, typename Run>
[[gnu::always_inline]] inline void for_groups(Run& run, const float* scale, std::int64_t group,
                                              std::int64_t first, std::int64_t n) {
    if (scale == nullptr) return run(first, n, Acc(1));
    const std::int64_t end = first + n;
    for (std::int64_t g = first / group; first < end; ++g) {
        const std::int64_t next = std::min(end, (g + 1) * group);
        run(first, next - first, Acc(scale[g]));
        first = next;
    }
}
