// Vectors of float or double as wide as the registers of the instruction set at hand, and a fast
// exp. Included by the bodies of foreach_isa.h (hence no include guard): arithmetic is that of the
// compilers' vector extensions, so one source serves every set.

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
    typedef float Vector __attribute__((vector_size(kVectorBytes)));
    typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
    typedef std::int32_t Bits __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCount = kVectorBytes / 4;
};
template <>
struct Lanes<double> {
    typedef double Vector __attribute__((vector_size(kVectorBytes)));
    typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
    typedef std::int64_t Bits __attribute__((vector_size(kVectorBytes)));
    static constexpr int kCount = kVectorBytes / 8;
};

template <typename T>
using Vec = typename Lanes<T>::Vector;

template <typename T>
[[gnu::always_inline]] inline Vec<T> load(const T* p) {
    return *reinterpret_cast<const typename Lanes<T>::Unaligned*>(p);
}

template <typename T>
[[gnu::always_inline]] inline void store(T* p, const Vec<T>& x) {
    *reinterpret_cast<typename Lanes<T>::Unaligned*>(p) = x;
}

template <typename T>
[[gnu::always_inline]] inline Vec<T> broadcast(T value) {
    Vec<T> x;
    for (int i = 0; i < Lanes<T>::kCount; ++i) x[i] = value;
    return x;
}

// The sum over lanes, of halves.
template <typename Acc>
[[gnu::always_inline]] inline Acc add_lanes(const Vec<Acc>& x) {
    Acc lanes[Lanes<Acc>::kCount];
    store(lanes, x);
#pragma GCC unroll 4
    for (int half = Lanes<Acc>::kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

// a b + c d with the same rounding wherever it is compiled: the compiler may contract either
// product with the sum, and the zero, which it must not drop, decides for a b.
template <typename T>
[[gnu::always_inline]] inline Vec<T> sum_of_products(const Vec<T>& a, const Vec<T>& b,
                                                     const Vec<T>& c, const Vec<T>& d) {
    const Vec<T> second = c * d + T(0);
    return a * b + second;
}

// exp(r) on |r| <= log(2) / 2. float: 1 + r + r^2 p(r), p of degree 4 fitted for the least largest
// relative error (3e-9 before rounding). double: the Taylor sum of degree 13 (4e-18).
[[gnu::always_inline]] inline Vec<float> exp_reduced(const Vec<float>& r) {
    Vec<float> p = r * 0.001381454f + 0.008368745f;
    p = p * r + 0.04166839f;
    p = p * r + 0.16666521f;
    p = p * r + 0.49999994f;
    return (p * r) * r + r + 1.0f;
}
[[gnu::always_inline]] inline Vec<double> exp_reduced(const Vec<double>& r) {
    constexpr double kInverseFactorial[] = {
        1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320,
        1.0 / 5040,       1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2};
    Vec<double> p = broadcast(kInverseFactorial[0]);
    for (int i = 1; i < 12; ++i) p = p * r + kInverseFactorial[i];
    return (p * r) * r + r + 1.0;
}

template <typename T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
    static constexpr float kRound =
        0x1.8p23f;  // adding it leaves the nearest integer in the low bits
    static constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
    static constexpr float kSmallest = -87.33654f;  // below, the result is not a normal number
    static constexpr int kBias = 127, kMantissa = 23;
};
template <>
struct ExpConstants<double> {
    static constexpr double kRound = 0x1.8p52;
    static constexpr double kLog2High = 0x1.62e42fee00000p-1, kLog2Low = 0x1.a39ef35793c76p-33;
    static constexpr double kSmallest = -708.3964185322641;
    static constexpr int kBias = 1023, kMantissa = 52;
};

// exp(x) for x <= 0, within 1 ulp in float and 2 in double; exactly 0 for -inf and wherever the
// result would be subnormal; NaN stays NaN.
template <typename T>
[[gnu::always_inline]] inline Vec<T> exp_nonpositive(const Vec<T>& x) {
    using Constants = ExpConstants<T>;
    using Bits = typename Lanes<T>::Bits;
    const Vec<T> clamped = x < Constants::kSmallest ? broadcast(Constants::kSmallest) : x;
    const Vec<T> shifted = clamped * static_cast<T>(1.4426950408889634) + Constants::kRound;
    const Vec<T> n = shifted - Constants::kRound;
    const Vec<T> r = (clamped - n * Constants::kLog2High) - n * Constants::kLog2Low;
    const Bits exponent = (Bits)shifted - (Bits)broadcast(Constants::kRound) + Constants::kBias;
    const Vec<T> power = (Vec<T>)(exponent << Constants::kMantissa);
    const Vec<T> y = exp_reduced(r) * power;
    return x < Constants::kSmallest ? Vec<T>{} : y;
}

#include "fewstep/cpu/storage_body.h"
