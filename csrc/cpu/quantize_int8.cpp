// quantize_int8 on the CPU: a row is read twice, the second time from cache. The maximum is taken
// on the bits without the sign, which order like the magnitudes and put infinity and NaN on top, so
// one integer maximum also answers whether the row is finite.
#include "fewstep/ops/quantize_int8.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
    using type = std::uint32_t;
    static constexpr type kMagnitude = 0x7fffffff, kInfinity = 0x7f800000;
};
template <>
struct Bits<bfloat16> {
    using type = std::uint16_t;
    static constexpr type kMagnitude = 0x7fff, kInfinity = 0x7f80;
};
template <>
struct Bits<float16> {
    using type = std::uint16_t;
    static constexpr type kMagnitude = 0x7fff, kInfinity = 0x7c00;
};

template <typename T>
[[gnu::always_inline]] inline typename Bits<T>::type max_magnitude(const T* x, std::int64_t n) {
    using Word = typename Bits<T>::type;
    const Word* words = reinterpret_cast<const Word*>(x);
    Word top = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const Word magnitude = words[i] & Bits<T>::kMagnitude;
        top = magnitude > top ? magnitude : top;
    }
    return top;
}

template <typename T>
[[gnu::always_inline]] inline float quantize_row(const T* x, std::int8_t* q, std::int64_t n) {
    const auto bits = max_magnitude(x, n);
    T top;
    std::memcpy(&top, &bits, sizeof top);
    const float amax = to_acc(top);
    const bool finite = bits < Bits<T>::kInfinity;
    if (!finite || amax < kQuantizeInt8Tiny) {
        if (n > 0) std::memset(q, 0, static_cast<std::size_t>(n));
        return finite ? 1.0f : std::numeric_limits<float>::quiet_NaN();
    }
    const float inverse = 127.0f / amax;
    for (std::int64_t i = 0; i < n; ++i) {
        q[i] = static_cast<std::int8_t>(static_cast<int>(std::rint(to_acc(x[i]) * inverse)));
    }
    return amax / 127.0f;
}

#if defined(__x86_64__)
template <typename T>
FEWSTEP_TARGET_AVX512 float row_avx512(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}
template <typename T>
FEWSTEP_TARGET_AVX2 float row_avx2(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}
#endif
template <typename T>
float row_portable(const T* x, std::int8_t* q, std::int64_t n) {
    return quantize_row(x, q, n);
}

template <typename T>
using RowFunction = float (*)(const T*, std::int8_t*, std::int64_t);

template <typename T>
RowFunction<T> choose_row() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return row_avx512<T>;
    if (isa() == Isa::kAvx2) return row_avx2<T>;
#endif
    return row_portable<T>;
}

template <typename T>
void quantize_rows(const TensorView& x, const TensorView& q, const TensorView& scale) {
    constexpr std::int64_t kWorthThreads = 1 << 15;
    const RowFunction<T> row = choose_row<T>();
    const std::int64_t rows = x.size(0), columns = x.size(1);
#pragma omp parallel for schedule(static) if (rows * columns > kWorthThreads)
    for (std::int64_t r = 0; r < rows; ++r) {
        scale.ptr<float>()[r] =
            row(x.ptr<T>() + r * x.stride(0), q.ptr<std::int8_t>() + r * columns, columns);
    }
}

}  // namespace

void quantize_int8(const TensorView& x, const TensorView& q, const TensorView& scale) {
    expect_rows(x, "x", x.dtype, {x.size(0), x.size(1)});
    expect_contiguous(q, "q", DType::kInt8, {x.size(0), x.size(1)});
    expect_contiguous(scale, "scale", DType::kFloat32, {x.size(0)});
    switch (x.dtype) {
        case DType::kFloat32: return quantize_rows<float>(x, q, scale);
        case DType::kBFloat16: return quantize_rows<bfloat16>(x, q, scale);
        case DType::kFloat16: return quantize_rows<float16>(x, q, scale);
        default:
            FEWSTEP_CHECK(false, "x: expected float32, bfloat16 or float16, got ", name(x.dtype));
    }
}

}  // namespace fewstep::cpu
