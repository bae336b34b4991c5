// What may happen to a row before it is quantised: columns divided by smoothing factors, then
// blocks of B neighbours multiplied by the orthonormal Hadamard matrix (Sylvester's order).
//
//   x'_k = float(x_k) * (1 / float(smooth_k))
//   x''  = x' H_B / sqrt(B)      butterflies (a + b, a - b) at distance 1, 2, ... B / 2, then one
//                                product by float32(B^-1/2)
//
// float32 and in this order everywhere, so all instruction sets return the same bits. A row comes
// out as floats in a buffer of K, which stays in the first-level cache for what follows. Smoothing
// and rotation are passes of their own over it, the second behind a function pointer: a compiler
// that saw both would contract a product of the one with a sum of the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/numeric.h"
#include "fewstep/ops/quantize_int8.h"

namespace fewstep::cpu::prologue {

// out[k] = x[k] or, with factors, x[k] * inverse[k].
template <typename T>
[[gnu::always_inline]] inline void widen_row(const T* x, const float* inverse, float* out,
                                             std::int64_t n) {
    if (inverse == nullptr) {
        for (std::int64_t k = 0; k < n; ++k) out[k] = to_acc(x[k]);
    } else {
        for (std::int64_t k = 0; k < n; ++k) out[k] = to_acc(x[k]) * inverse[k];
    }
}

template <int kLanes>
struct Lanes {
    typedef float Vector __attribute__((vector_size(4 * kLanes)));
    typedef float Unaligned __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
    typedef std::int32_t Bits __attribute__((vector_size(4 * kLanes)));
};

// The butterflies inside one vector: a + b is the partner, lane i ^ distance, plus the lane itself,
// a - b the partner plus the lane with its sign turned. Initialisers of whole vectors, which
// compilers make one permutation and one constant of.
template <int kLanes, int kDistance, int... I>
[[gnu::always_inline]] inline void mix_lanes(typename Lanes<kLanes>::Vector& v,
                                             std::integer_sequence<int, I...> lanes) {
    using Vector = typename Lanes<kLanes>::Vector;
    using Bits = typename Lanes<kLanes>::Bits;
    const Vector partner{v[I ^ kDistance]...};
    const Bits turned{(I & kDistance ? INT32_MIN : 0)...};
    v = partner + (Vector)((Bits)v ^ turned);
    if constexpr (2 * kDistance < kLanes) mix_lanes<kLanes, 2 * kDistance>(v, lanes);
}

// Rotates n / B blocks of x in place.
template <int kLanes, int kBlock>
[[gnu::always_inline]] inline void rotate_row(float* x, std::int64_t n) {
    using Vector = typename Lanes<kLanes>::Vector;
    using Unaligned = typename Lanes<kLanes>::Unaligned;
    constexpr int kVectors = kBlock / kLanes;
    const float factor = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kBlock)));
    for (std::int64_t start = 0; start < n; start += kBlock) {
        auto* block = reinterpret_cast<Unaligned*>(x + start);
        Vector v[kVectors];
#pragma GCC unroll 64
        for (int i = 0; i < kVectors; ++i) {
            v[i] = block[i];
            mix_lanes<kLanes, 1>(v[i], std::make_integer_sequence<int, kLanes>{});
        }
#pragma GCC unroll 8
        for (int distance = 1; distance < kVectors; distance *= 2) {
#pragma GCC unroll 64
            for (int i = 0; i < kVectors; ++i) {
                if (i & distance) continue;
                const Vector a = v[i], b = v[i + distance];
                v[i] = a + b;
                v[i + distance] = a - b;
            }
        }
#pragma GCC unroll 64
        for (int i = 0; i < kVectors; ++i) block[i] = v[i] * factor;
    }
}

using RotateFunction = void (*)(float* x, std::int64_t n);

#if defined(__x86_64__)
template <int kBlock>
FEWSTEP_TARGET_AVX512 void rotate_avx512(float* x, std::int64_t n) {
    rotate_row<16, kBlock>(x, n);
}
template <int kBlock>
FEWSTEP_TARGET_AVX2 void rotate_avx2(float* x, std::int64_t n) {
    rotate_row<8, kBlock>(x, n);
}
template <typename T>
FEWSTEP_TARGET_AVX512 void widen_avx512(const T* x, const float* inverse, float* out,
                                        std::int64_t n) {
    widen_row(x, inverse, out, n);
}
template <typename T>
FEWSTEP_TARGET_AVX2 void widen_avx2(const T* x, const float* inverse, float* out, std::int64_t n) {
    widen_row(x, inverse, out, n);
}
#endif
template <int kBlock>
void rotate_portable(float* x, std::int64_t n) {
    rotate_row<4, kBlock>(x, n);
}
template <typename T>
void widen_portable(const T* x, const float* inverse, float* out, std::int64_t n) {
    widen_row(x, inverse, out, n);
}

template <int kBlock>
RotateFunction choose_rotate(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return rotate_avx512<kBlock>;
    if (isa == Isa::kAvx2) return rotate_avx2<kBlock>;
#endif
    (void)isa;
    return rotate_portable<kBlock>;
}

inline RotateFunction choose_rotate(Isa isa, std::int64_t block) {
    switch (block) {
        case 16: return choose_rotate<16>(isa);
        case 32: return choose_rotate<32>(isa);
        case 64: return choose_rotate<64>(isa);
        case 128: return choose_rotate<128>(isa);
        case 256: return choose_rotate<256>(isa);
        default: return nullptr;
    }
}

template <typename T>
using WidenFunction = void (*)(const T* x, const float* inverse, float* out, std::int64_t n);

template <typename T>
WidenFunction<T> choose_widen(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return widen_avx512<T>;
    if (isa == Isa::kAvx2) return widen_avx2<T>;
#endif
    (void)isa;
    return widen_portable<T>;
}

// smooth [K] float32, bfloat16 or float16, contiguous, or null; block 0 for no rotation.
template <typename T>
class Prologue {
  public:
    Prologue(const TensorView* smooth, std::int64_t block, std::int64_t K)
        : K_(K), widen_(choose_widen<T>(isa())) {
        check_prologue(smooth, block, K);
        if (block != 0) rotate_ = choose_rotate(isa(), block);
        if (smooth == nullptr) return;
        inverse_.reset(new float[static_cast<std::size_t>(K)]);
        widen(*smooth, "smooth", 0, K, inverse_.get());
        for (std::int64_t k = 0; k < K; ++k) inverse_[k] = 1.0f / inverse_[k];
    }

    // Whether a row has to go through apply(): else it can be taken as it is.
    bool active() const { return rotate_ != nullptr || inverse_ != nullptr; }

    void apply(const T* x, float* out) const {
        widen_(x, inverse_.get(), out, K_);
        if (rotate_ != nullptr) rotate_(out, K_);
    }

  private:
    std::int64_t K_;
    WidenFunction<T> widen_;
    RotateFunction rotate_ = nullptr;
    std::unique_ptr<float[]> inverse_;
};

}  // namespace fewstep::cpu::prologue
