// Vectors of the storage types, widened where they are loaded and narrowed where they are stored,
// rounded as Convert in numeric.h rounds. Part of vector_body.h (hence no include guard).

[[gnu::always_inline]] inline Vec<double> load_as(const double* p) {
    return load(p);
}
[[gnu::always_inline]] inline void store_as(double* p, const Vec<double>& x) {
    store(p, x);
}
[[gnu::always_inline]] inline Vec<float> load_as(const float* p) {
    return load(p);
}
[[gnu::always_inline]] inline void store_as(float* p, const Vec<float>& x) {
    store(p, x);
}

typedef std::uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef std::uint16_t Halves __attribute__((vector_size(kVectorBytes / 2)));
typedef std::uint16_t UnalignedHalves
    __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

[[gnu::always_inline]] inline Vec<float> load_as(const bfloat16* p) {
#if FEWSTEP_BODY_BITS == \
    512  // one instruction, where GCC 12 makes five of a __builtin_convertvector
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const Words words = (Words)_mm512_maskz_cvtepu16_epi32(0xffff, halves);
#elif FEWSTEP_BODY_BITS == 256
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    const Words words = (Words)_mm256_cvtepu16_epi32(halves);
#else
    const Halves halves = *reinterpret_cast<const UnalignedHalves*>(p);
    const Words words = __builtin_convertvector(halves, Words);
#endif
    return (Vec<float>)(words << 16);
}
[[gnu::always_inline]] inline void store_as(bfloat16* p, const Vec<float>& x) {
    const Words bits = (Words)x;
    const Words top = bits >> 16;
    const Words rounded = (bits + 0x7fff + (top & 1)) >> 16;
    const Words chosen = x != x ? top | 0x40 : rounded;
    *reinterpret_cast<UnalignedHalves*>(p) = __builtin_convertvector(chosen, Halves);
}

// The conversions of F16C and AVX-512 neither read nor make float subnormals, so a process that
// flushes those changes nothing.
[[gnu::always_inline]] inline Vec<float> load_as(const float16* p) {
#if FEWSTEP_BODY_BITS == 512
    // Masked by all ones: GCC 12 warns of the plain ones' undefined registers.
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_maskz_cvtph_ps(0xffff, halves);
#elif FEWSTEP_BODY_BITS == 256
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    Vec<float> x;
    for (int i = 0; i < Lanes<float>::kCount; ++i) x[i] = to_acc(p[i]);
    return x;
#endif
}
[[gnu::always_inline]] inline void store_as(float16* p, const Vec<float>& x) {
#if FEWSTEP_BODY_BITS == 512
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m256i halves = _mm512_maskz_cvtps_ph(0xffff, x, kNearest);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
#elif FEWSTEP_BODY_BITS == 256
    const __m128i halves = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), halves);
#else
    for (int i = 0; i < Lanes<float>::kCount; ++i) p[i] = Convert<float16>::from(x[i]);
#endif
}

// Whole vectors, or with kTail the n elements that are left of a row, beside zeros.
template <bool kTail, typename T>
[[gnu::always_inline]] inline Vec<acc_t<T>> load_columns(const T* p, std::int64_t n) {
    if constexpr (!kTail) return load_as(p);
    T part[Lanes<acc_t<T>>::kCount] = {};
    for (std::int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load_as(part);
}
template <bool kTail, typename T>
[[gnu::always_inline]] inline void store_columns(T* p, const Vec<acc_t<T>>& x, std::int64_t n) {
    if constexpr (!kTail) {
        store_as(p, x);
    } else {
        T part[Lanes<acc_t<T>>::kCount];
        store_as(part, x);
        for (std::int64_t i = 0; i < n; ++i) p[i] = part[i];
    }
}

// Zero from lane n on.
template <bool kTail, typename Acc>
[[gnu::always_inline]] inline Vec<Acc> keep_columns(const Vec<Acc>& x, std::int64_t n) {
    if constexpr (!kTail) return x;
    Vec<Acc> kept = {};
    for (std::int64_t i = 0; i < n; ++i) kept[i] = x[i];
    return kept;
}
