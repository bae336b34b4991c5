// quantize_int4 on the CPU: rows over threads, a group at a time. As in quantize_row.h the maximum
// is taken on the bits without the sign. The loops are plain and vectorised by the compiler, once
// for every instruction set; the division is a real one, because the contract is to the bit.
#include "fewstep/ops/quantize_int4.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/quantize_rows.h"

namespace fewstep::cpu {
namespace {

// Fills q[0 ... n / 2) and returns the scale.
template <typename T>
[[gnu::always_inline]] inline bfloat16 quantize_group(const T* w, std::uint8_t* q, std::int64_t n) {
    const auto bits = quantize::max_magnitude(w, n);
    T top;
    std::memcpy(&top, &bits, sizeof top);
    const bfloat16 rounded = Convert<bfloat16>::from(to_acc(top) / 7.0f);
    const float scale = to_acc(rounded);
    const bool finite = bits < quantize::Bits<T>::kInfinity;
    if (!finite || scale < kQuantizeInt4Tiny) {
        std::memset(q, 0, static_cast<std::size_t>(n / 2));
        return Convert<bfloat16>::from(finite ? kQuantizeInt4Tiny
                                              : std::numeric_limits<float>::quiet_NaN());
    }
    std::int32_t values[kQuantizeInt4MaxGroup];
    for (std::int64_t i = 0; i < n; ++i) {
        const float value = std::rint(to_acc(w[i]) / scale);
        values[i] = static_cast<std::int32_t>(value > 7.0f ? 7.0f : value);  // -8 is out of reach
    }
    for (std::int64_t i = 0; i < n / 2; ++i) {
        q[i] = static_cast<std::uint8_t>((values[2 * i] & 15) | (values[2 * i + 1] & 15) << 4);
    }
    return rounded;
}

template <typename T>
[[gnu::always_inline]] inline void quantize_row(const T* w, std::uint8_t* q, bfloat16* scale,
                                                std::int64_t groups, std::int64_t group) {
    for (std::int64_t g = 0; g < groups; ++g) {
        scale[g] = quantize_group(w + g * group, q + g * group / 2, group);
    }
}

template <typename T>
using RowFunction = void (*)(const T*, std::uint8_t*, bfloat16*, std::int64_t, std::int64_t);

#if defined(__x86_64__)
template <typename T>
FEWSTEP_TARGET_AVX512 void row_avx512(const T* w, std::uint8_t* q, bfloat16* scale,
                                      std::int64_t groups, std::int64_t group) {
    quantize_row(w, q, scale, groups, group);
}
template <typename T>
FEWSTEP_TARGET_AVX2 void row_avx2(const T* w, std::uint8_t* q, bfloat16* scale, std::int64_t groups,
                                  std::int64_t group) {
    quantize_row(w, q, scale, groups, group);
}
#endif
template <typename T>
void row_portable(const T* w, std::uint8_t* q, bfloat16* scale, std::int64_t groups,
                  std::int64_t group) {
    quantize_row(w, q, scale, groups, group);
}

template <typename T>
RowFunction<T> choose_row() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return row_avx512<T>;
    if (isa() == Isa::kAvx2) return row_avx2<T>;
#endif
    return row_portable<T>;
}

}  // namespace

void quantize_int4(const TensorView& w, std::int64_t rotate, const TensorView& q,
                   const TensorView& scale) {
    const std::int64_t N = w.size(0), K = w.size(1), groups = scale.size(1);
    const std::int64_t group = groups > 0 ? K / groups : 0;
    FEWSTEP_CHECK(
        groups > 0 && group * groups == K && group % 2 == 0 && group <= kQuantizeInt4MaxGroup,
        "scale: expected [N, K / G] for an even G <= ", kQuantizeInt4MaxGroup,
        " that divides K = ", K, ", got ", groups, " groups");
    expect_rows(w, "w", w.dtype, {N, K});
    expect_contiguous(q, "q", DType::kUInt8, {N, K / 2});
    expect_contiguous(scale, "scale", DType::kBFloat16, {N, groups});
    const quantize::Steps steps{nullptr, rotate};
    quantize::each_row(w, "w", K, steps, [&](auto tag) {
        return [&, row = choose_row<decltype(tag)>()](std::int64_t r, const decltype(tag)* values) {
            row(values, q.ptr<std::uint8_t>() + r * K / 2, scale.ptr<bfloat16>() + r * groups,
                groups, group);
        };
    });
}

}  // namespace fewstep::cpu
