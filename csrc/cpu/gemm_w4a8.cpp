// gemm_w4a8 on the CPU: the product of int8_product.h with rows that a task expands from 4 bits, to
// a panel as below, or for few rows of activations to rows of bytes (int4_rows.h).
//
//   byte = ((q f + 128) >> 8) + 128 = (u f + 0x8080 - 8 f) >> 8      u = q + 8, all in 16 bits
//
// u is the four bits with the top one flipped. u f <= 15 * 4096 and the sum is in [128, 61568], so
// 16-bit lanes hold it without a sign. A lane of w has k 0-3 of one row; on AVX-512 its four
// products go by twos into one lane again: the even one is shifted down, the odd one stays where it
// is, and one ternary operation puts them together.
#include "fewstep/ops/gemm_w4a8.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "fewstep/cpu/int4_rows.h"
#include "fewstep/cpu/int8_product.h"
#include "fewstep/cpu/transpose.h"

namespace fewstep::cpu {
namespace {

using int4::Rows;
using int8::kDots;
using int8::kPanel;

// As int8_tiles.h reads a panel.
[[gnu::always_inline]] inline void expand_panel(const Rows& p, std::uint8_t* panel) {
    const int group = p.group();
    const std::int64_t step = 4 * ((p.columns + 15) / 16 * 16);
    for (int n = 0; n < p.columns; ++n) {
        const std::uint8_t* row = p.w + n * p.ld;
        std::uint8_t* out = panel + 4 * n;
        for (std::int64_t g = 0; g < p.groups; ++g) {
            const std::int16_t f = p.factors[n * p.groups + g];
            for (int four = 0; four < group / 4; ++four, row += 2, out += step) {
                out[0] = int4::expand_value(row[0] & 15, f);
                out[1] = int4::expand_value(row[0] >> 4, f);
                out[2] = int4::expand_value(row[1] & 15, f);
                out[3] = int4::expand_value(row[1] >> 4, f);
            }
        }
    }
}

void expand_panel_portable(const Rows& p, std::uint8_t* panel) {
    expand_panel(p, panel);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 void expand_panel_avx2(const Rows& p, std::uint8_t* panel) {
    expand_panel(p, panel);
}

// Expands 128 weights at a time. `low` has, in its quarters of 128 bits, k 0-15 of 32 each, and
// `high` k 16-31.
class Expander {
  public:
    FEWSTEP_TARGET_AVX512 explicit Expander(const Rows& p)
        : p_(p), group_(p.group()), known_((1u << (128 / group_)) - 1) {
        alignas(64) std::int16_t lanes[32];
        for (int i = 0; i < 32; ++i) lanes[i] = static_cast<std::int16_t>(4 * i / group_);
        group_of_lane_ = _mm512_load_si512(lanes);
    }

    FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void block(int n, std::int64_t k,
                                                                   __m512i& low,
                                                                   __m512i& high) const {
        const __m512i nibble = _mm512_set1_epi16(15), upper = _mm512_set1_epi16(-256);
        const std::int64_t left = p_.K - k;
        const __mmask64 inside = left >= 128 ? ~0ull : (1ull << (left / 2)) - 1;
        const __mmask32 known = left >= 128 ? known_ : (1u << (left / group_)) - 1;
        const __m512i f = _mm512_permutexvar_epi16(
            group_of_lane_,
            _mm512_maskz_loadu_epi16(known, p_.factors + n * p_.groups + k / group_));
        const __m512i c = _mm512_sub_epi16(_mm512_set1_epi16(static_cast<short>(0x8080)),
                                           _mm512_slli_epi16(f, 3));
        const __m512i q =
            _mm512_xor_si512(_mm512_maskz_loadu_epi8(inside, p_.w + n * p_.ld + k / 2),
                             _mm512_set1_epi8(static_cast<char>(0x88)));
        const auto scaled = [&](__m512i u) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
            return _mm512_add_epi16(_mm512_mullo_epi16(u, f), c);
        };
        const auto shifted = [&](int bits) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
            return _mm512_and_si512(_mm512_srli_epi16(q, bits), nibble);
        };
        const auto join = [&](__m512i even, __m512i odd) FEWSTEP_TARGET_AVX512
            __attribute__((always_inline)) {
                // (even >> 8) | (odd & 0xff00)
                return _mm512_ternarylogic_epi32(_mm512_srli_epi16(even, 8), odd, upper, 0xf8);
            };
        const __m512i first = join(scaled(_mm512_and_si512(q, nibble)), scaled(shifted(4)));
        const __m512i second = join(scaled(shifted(8)), scaled(_mm512_srli_epi16(q, 12)));
        low = _mm512_unpacklo_epi16(first, second);
        high = _mm512_unpackhi_epi16(first, second);
    }

  private:
    const Rows& p_;
    int group_;
    __mmask32 known_;  // the groups of 128 weights
    __m512i group_of_lane_;
};

FEWSTEP_TARGET_AVX512 void expand_panel_avx512(const Rows& p, std::uint8_t* panel) {
    const Expander expander(p);
    const std::int64_t step = 4 * ((p.columns + 15) / 16 * 16);
    for (std::int64_t k = 0; k < p.K; k += 128, panel += 32 * step) {
        const std::int64_t fours = (p.K - k) / 4;
        for (int n = 0; n < p.columns; n += 16) {
            __m512i low[16], high[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                expander.block(std::min(n + i, p.columns - 1), k, low[i], high[i]);
            }
            transpose_words(low);
            transpose_words(high);
            std::uint8_t* const out = panel + 4 * n;
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                const int four = i / 4 * 8 + i % 4;
                if (four >= fours) break;
                _mm512_storeu_si512(out + four * step, low[i]);
                _mm512_storeu_si512(out + (four + 4) * step, high[i]);
            }
        }
    }
}
#endif

// The bits of scales, which are not negative, order like the scales; a NaN is put on top.
template <typename Scale>
[[gnu::always_inline]] inline float top_scale(const Scale* s, std::int64_t groups) {
    std::int16_t top = std::numeric_limits<std::int16_t>::min();
    for (std::int64_t g = 0; g < groups; ++g) {
        const std::uint16_t magnitude = s[g].bits & 0x7fff;
        const bool nan = magnitude > quantize::Bits<Scale>::kInfinity;
        top = std::max(top, static_cast<std::int16_t>(nan ? magnitude : s[g].bits));
    }
    return to_acc(Scale{static_cast<std::uint16_t>(top)});
}

// The factors of `rows` rows of scales.
template <typename Scale>
using FactorFunction = void (*)(const Scale* s, int rows, std::int64_t groups, std::int16_t* f);

template <typename Scale>
[[gnu::always_inline]] inline void factor(const Scale* s, int rows, std::int64_t groups,
                                          std::int16_t* f) {
    for (int n = 0; n < rows; ++n, s += groups, f += groups) {
        const float top = top_scale(s, groups);
        const bool used = top > 0.0f && top < std::numeric_limits<float>::infinity();
        for (std::int64_t g = 0; g < groups; ++g) {
            const float exact = used ? 4096.0f * (to_acc(s[g]) / top) : 0.0f;
            f[g] = static_cast<std::int16_t>(static_cast<int>(std::rint(exact)));
        }
    }
}

template <typename Scale>
void factor_portable(const Scale* s, int rows, std::int64_t groups, std::int16_t* f) {
    factor(s, rows, groups, f);
}
#if defined(__x86_64__)
template <typename Scale>
FEWSTEP_TARGET_AVX2 void factor_avx2(const Scale* s, int rows, std::int64_t groups,
                                     std::int16_t* f) {
    factor(s, rows, groups, f);
}
template <typename Scale>
FEWSTEP_TARGET_AVX512 void factor_avx512(const Scale* s, int rows, std::int64_t groups,
                                         std::int16_t* f) {
    factor(s, rows, groups, f);
}
#endif

template <typename Scale>
struct Expand {
    FactorFunction<Scale> factors;
    int4::ExpandFunction rows, panel;
};

template <typename Scale>
Expand<Scale> choose_expand(std::int64_t group) {
    const int4::ExpandFunction rows = int4::choose_expand_rows(isa(), group);
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return {factor_avx512<Scale>, rows, expand_panel_avx512};
    if (isa() == Isa::kAvx2) return {factor_avx2<Scale>, rows, expand_panel_avx2};
#endif
    return {factor_portable<Scale>, rows, expand_panel_portable};
}

template <typename Scale>
struct Weight {
    const std::uint8_t* w;
    std::int64_t ld;
    const Scale* scale;  // [N, groups]
    std::int64_t K, groups;
    Expand<Scale> expand;

    // Factors in front, then bytes.
    std::int64_t factor_bytes() const { return (kPanel * groups * 2 + 63) / 64 * 64; }
    std::int64_t scratch() const { return factor_bytes() + kPanel * length(); }

    const std::uint8_t* panel(std::int64_t n, int columns, std::uint8_t* scratch) const {
        return make(expand.panel, n, columns, scratch);
    }

    static constexpr bool kSigned = false, kReorders = true;
    std::int64_t length() const { return int4::padded(K); }
    void reorder(const std::int8_t* a, std::int8_t* to) const { int4::reorder(a, K, to); }
    void rows(std::int64_t n, int columns, std::uint8_t* scratch,
              const std::uint8_t** pointers) const {
        const std::uint8_t* bytes = make(expand.rows, n, columns, scratch);
        for (int c = 0; c < kDots; ++c) pointers[c] = bytes + std::min(c, columns - 1) * length();
    }

    const std::uint8_t* make(int4::ExpandFunction function, std::int64_t n, int columns,
                             std::uint8_t* scratch) const {
        std::uint8_t* const bytes = scratch + factor_bytes();
        if (groups == 0) return bytes;
        auto* const factors = reinterpret_cast<std::int16_t*>(scratch);
        expand.factors(scale + n * groups, columns, groups, factors);
        function({w + n * ld, ld, factors, groups, K, columns}, bytes);
        return bytes;
    }

    const float* scales(std::int64_t n, int columns, float* scratch) const {
        for (int c = 0; c < columns; ++c) {
            const float top = groups == 0 ? 16.0f : top_scale(scale + (n + c) * groups, groups);
            scratch[c] = top / 16.0f;
        }
        return scratch;
    }

    const std::uint8_t* row(std::int64_t n) const { return w + n * ld; }
    std::int64_t row_bytes() const { return K / 2; }
};

}  // namespace

void gemm_w4a8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out) {
    const product::Rows rows(a, a_scale, scale, out);
    const std::int64_t N = w.size(0), K = rows.a.size(1), groups = w_scale.size(1);
    const std::int64_t group = groups > 0 ? K / groups : 0;
    FEWSTEP_CHECK(K == groups * group && (K == 0 || group == 32 || group == 64 || group == 128),
                  "w_scale: expected [N, K / G] with G 32, 64 or 128 and K = ", K, ", got ", groups,
                  " groups");
    expect_rows(w, "w", DType::kUInt8, {N, K / 2});
    expect_contiguous(w_scale, "w_scale", w_scale.dtype, {N, groups});
    const auto run = [&](auto tag) {
        using Scale = decltype(tag);
        const Weight<Scale> weight{
            w.ptr<std::uint8_t>(),      w.stride(0), w_scale.ptr<Scale>(), K, groups,
            choose_expand<Scale>(group)};
        int8::multiply(weight, N,
                       {rows.a, rows.a_scale, w, w_scale, bias, low, up, smooth, rotate, activation,
                        gate, residual, rows.scale, rows.out});
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
