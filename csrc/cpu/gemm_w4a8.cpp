// gemm_w4a8 on the CPU: the product of int8_product.h with panels that a task expands from 4 bits.
//
//   byte = ((q f + 128) >> 8) + 128 = (u f + 0x8080 - 8 f) >> 8      u = q + 8, all in 16 bits
//
// u f <= 15 * 4096 and the sum is in [128, 61568], so 16-bit lanes hold it without a sign. On
// AVX-512 a lane has two values of a column: the even one is shifted down, the odd one stays where
// it is, and one ternary operation puts them together.
#include "fewstep/ops/gemm_w4a8.h"

#include <algorithm>
#include <limits>

#include "fewstep/cpu/int8_product.h"

namespace fewstep::cpu {
namespace {

using int8::kPanel;

// Columns of a panel, its groups and the eights of a group.
struct Shape {
    int width;
    std::int64_t groups, eights;
};

// From packed nibbles [groups * eights][width][4] and factors [groups][width] to bytes
// [2 * groups * eights][width][4].
using ExpandFunction = void (*)(const Shape&, const std::uint8_t* nibbles,
                                const std::int16_t* factors, std::uint8_t* bytes);

[[gnu::always_inline]] inline void expand(const Shape& s, const std::uint8_t* nibbles,
                                          const std::int16_t* factors, std::uint8_t* bytes) {
    const int row = 4 * s.width;
    std::uint16_t f[4 * kPanel], c[4 * kPanel];
    for (std::int64_t g = 0; g < s.groups; ++g, factors += s.width) {
        for (int i = 0; i < row; ++i) {
            f[i] = static_cast<std::uint16_t>(factors[i / 4]);
            c[i] = static_cast<std::uint16_t>(0x8080 - 8 * f[i]);
        }
        for (std::int64_t e = 0; e < s.eights; ++e, nibbles += row, bytes += 2 * row) {
            for (int i = 0; i < row; ++i) {
                const std::uint16_t low = static_cast<std::uint16_t>((nibbles[i] & 15) * f[i]);
                const std::uint16_t high = static_cast<std::uint16_t>((nibbles[i] >> 4) * f[i]);
                bytes[i] = static_cast<std::uint8_t>(static_cast<std::uint16_t>(low + c[i]) >> 8);
                bytes[row + i] =
                    static_cast<std::uint8_t>(static_cast<std::uint16_t>(high + c[i]) >> 8);
            }
        }
    }
}

void expand_portable(const Shape& s, const std::uint8_t* nibbles, const std::int16_t* factors,
                     std::uint8_t* bytes) {
    expand(s, nibbles, factors, bytes);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 void expand_avx2(const Shape& s, const std::uint8_t* nibbles,
                                     const std::int16_t* factors, std::uint8_t* bytes) {
    expand(s, nibbles, factors, bytes);
}

template <int kVectors>
FEWSTEP_TARGET_AVX512 void expand_avx512(const Shape& s, const std::uint8_t* nibbles,
                                         const std::int16_t* factors, std::uint8_t* bytes) {
    constexpr int kRow = 64 * kVectors;
    constexpr int kAhead = 2048;  // the loop takes in 10 bytes a cycle, too fast for the hardware
    const __m512i half = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(-256);
    for (std::int64_t g = 0; g < s.groups; ++g, factors += 16 * kVectors) {
        __m512i f[kVectors], c[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m256i words =
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(factors + 16 * v));
            const __m512i wide = _mm512_cvtepu16_epi32(words);
            f[v] = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
            c[v] = _mm512_sub_epi16(_mm512_set1_epi16(static_cast<short>(0x8080)),
                                    _mm512_slli_epi16(f[v], 3));
        }
        for (std::int64_t e = 0; e < s.eights; ++e, nibbles += kRow, bytes += 2 * kRow) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                const __m512i q = _mm512_loadu_si512(nibbles + 64 * v);
                _mm_prefetch(reinterpret_cast<const char*>(nibbles + 64 * v + kAhead), _MM_HINT_T0);
                const auto scaled = [&](__m512i u) FEWSTEP_TARGET_AVX512
                    __attribute__((always_inline)) {
                        return _mm512_add_epi16(_mm512_mullo_epi16(u, f[v]), c[v]);
                    };
                const auto join = [&](__m512i even, __m512i odd) FEWSTEP_TARGET_AVX512
                    __attribute__((always_inline)) {
                        // (even >> 8) | (odd & 0xff00)
                        return _mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 8), odd, upper,
                                                         0xf8);
                    };
                const auto shifted = [&](int bits) FEWSTEP_TARGET_AVX512
                    __attribute__((always_inline)) {
                        return _mm512_and_si512(_mm512_srli_epi16(q, bits), half);
                    };
                const __m512i first = join(scaled(_mm512_and_si512(q, half)), scaled(shifted(8)));
                const __m512i second = join(scaled(shifted(4)), scaled(_mm512_srli_epi16(q, 12)));
                _mm512_storeu_si512(bytes + 64 * v, first);
                _mm512_storeu_si512(bytes + kRow + 64 * v, second);
            }
        }
    }
}
#endif

ExpandFunction choose_expand(Isa isa, int width) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        constexpr ExpandFunction table[] = {expand_avx512<1>, expand_avx512<2>, expand_avx512<3>,
                                            expand_avx512<4>};
        return table[width / 16 - 1];
    }
    if (isa == Isa::kAvx2) return expand_avx2;
#endif
    (void)isa, (void)width;
    return expand_portable;
}

template <typename Scale>
struct Packed {
    const std::uint8_t* packed;
    const Scale* scale;  // [N, groups]
    std::int64_t K, groups;

    static constexpr bool kMakes = true;

    const std::uint8_t* bytes(std::int64_t n, int columns, std::int64_t begin, std::int64_t end,
                              std::uint8_t* scratch) const {
        if (groups == 0) return scratch;
        const int width = (columns + 15) / 16 * 16;
        const std::int64_t group = K / groups;
        const std::uint8_t* const panel = packed + n * (K / 2 + 2 * groups);
        const auto* factors = reinterpret_cast<const std::int16_t*>(panel + width * (K / 2));
        choose_expand(isa(), width)({width, (end - begin) / group, group / 8},
                                    panel + width * (begin / 2), factors + width * (begin / group),
                                    scratch);
        return scratch;
    }

    const float* scales(std::int64_t n, int columns, float* scratch) const {
        for (int c = 0; c < columns; ++c) scratch[c] = column_scale(scale + (n + c) * groups);
        return scratch;
    }

    // The bits of scales, which are not negative, order like the scales; a NaN is put on top.
    float column_scale(const Scale* s) const {
        if (groups == 0) return 1.0f;
        std::int16_t top = std::numeric_limits<std::int16_t>::min();
        for (std::int64_t g = 0; g < groups; ++g) {
            const std::uint16_t magnitude = s[g].bits & 0x7fff;
            const bool nan = magnitude > quantize::Bits<Scale>::kInfinity;
            top = std::max(top, static_cast<std::int16_t>(nan ? magnitude : s[g].bits));
        }
        return to_acc(Scale{static_cast<std::uint16_t>(top)}) / 16.0f;
    }
};

}  // namespace

void gemm_w4a8(const TensorView& a, const TensorView* a_scale, const TensorView& packed,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out) {
    const std::int64_t N = w_scale.size(0), K = a.size(1), groups = w_scale.size(1);
    const std::int64_t group = groups > 0 ? K / groups : 0;
    FEWSTEP_CHECK(K == groups * group && (K == 0 || group == 32 || group == 64 || group == 128),
                  "w_scale: expected [N, K / G] with G 32, 64 or 128 and K = ", K, ", got ", groups,
                  " groups");
    expect_contiguous(packed, "packed", DType::kUInt8, {(N + 15) / 16 * 16, K / 2 + 2 * groups});
    expect_contiguous(w_scale, "w_scale", w_scale.dtype, {N, groups});
    const auto run = [&](auto tag) {
        using Scale = decltype(tag);
        const Packed<Scale> source{packed.ptr<std::uint8_t>(), w_scale.ptr<Scale>(), K, groups};
        int8::product(
            source, N,
            {a, a_scale, bias, low, up, smooth, rotate, activation, gate, residual, scale, out});
    };
    switch (w_scale.dtype) {
        case DType::kBFloat16: return run(bfloat16{});
        case DType::kFloat16: return run(float16{});
        default:
            FEWSTEP_CHECK(false, "w_scale: expected bfloat16 or float16, got ",
                          name(w_scale.dtype));
    }
}

}  // namespace fewstep::cpu
