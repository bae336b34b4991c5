// A tile's sums to outputs: scaled, with the bias and the low-rank branch, rounded once. The end of
// the int8 products' tiles (int32 sums) and of gemm_fp8's (float32).
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/vector_store.h"
#include "fewstep/dispatch.h"
#include "fewstep/numeric.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fewstep::cpu::tile {

constexpr int kPanel = 64;  // columns of a tile at most

// What turns the sums of a tile into outputs: scale, add the bias and the low-rank branch.
template <typename Sum>
struct Finish {
    const Sum* acc;               // row r at acc + r * kPanel
    const std::int32_t* offsets;  // of int32 sums: what each row's are too large by, modulo 2^32
    const float* a_scale;         // per row
    const float* w_scale;         // per column
    const float* bias;            // per column; may be null
    const float* low;             // row r at low + r * rank
    const float* up;              // [rank][kPanel]
    std::int64_t rank;
    std::int64_t ldo;  // distance of output rows
    int rows, columns;
    bool rounds_bf16 = false;  // whether there is an instruction for it: has_bf16_dots()
};

[[gnu::always_inline]] inline float widen_sum(const Finish<std::int32_t>& f, int r,
                                              std::int32_t sum) {
    const std::uint32_t offset = static_cast<std::uint32_t>(f.offsets[r]);
    return static_cast<float>(static_cast<std::int32_t>(static_cast<std::uint32_t>(sum) - offset));
}
[[gnu::always_inline]] inline float widen_sum(const Finish<float>&, int, float sum) {
    return sum;
}

template <typename Sum, typename Out>
[[gnu::always_inline]] inline void finish(const Finish<Sum>& f, Out* out) {
    for (int r = 0; r < f.rows; ++r) {
        float values[kPanel];
        // fma is spelled out: without it a compiler may or may not contract, per instruction set.
        for (int n = 0; n < f.columns; ++n) {
            const float scaled = widen_sum(f, r, f.acc[r * kPanel + n]) * f.a_scale[r];
            values[n] = f.bias == nullptr ? scaled * f.w_scale[n]
                                          : std::fma(scaled, f.w_scale[n], f.bias[n]);
        }
        for (std::int64_t i = 0; i < f.rank; ++i) {
            const float low = f.low[r * f.rank + i];
            const float* up = f.up + i * kPanel;
            for (int n = 0; n < f.columns; ++n) values[n] = std::fma(low, up[n], values[n]);
        }
        for (int n = 0; n < f.columns; ++n) out[r * f.ldo + n] = Convert<Out>::from(values[n]);
    }
}

template <typename Sum, typename Out>
using FinishFunction = void (*)(const Finish<Sum>&, Out*);

template <typename Sum, typename Out>
void finish_portable(const Finish<Sum>& f, Out* out) {
    finish(f, out);
}

#if defined(__x86_64__)
template <typename Sum, typename Out>
FEWSTEP_TARGET_AVX2 void finish_avx2(const Finish<Sum>& f, Out* out) {
    finish(f, out);
}
template <typename Sum, typename Out>
FEWSTEP_TARGET_AVX512 void finish_avx512(const Finish<Sum>& f, Out* out) {
    finish(f, out);
}

// Outputs are seldom in cache and stores retire in order: their lines are asked for before a tile
// is multiplied.
template <int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void prefetch_rows(const Out* out,
                                                                       std::int64_t ldo) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        const char* row = reinterpret_cast<const char*>(out + r * ldo);
        for (std::size_t i = 0; i < 16 * kVectors * sizeof(Out); i += 64) {
            _mm_prefetch(row + i, _MM_HINT_ET0);
        }
    }
}

FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline __m512 widen_sums(const Finish<std::int32_t>& f,
                                                                      int r, __m512i sums) {
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, _mm512_set1_epi32(f.offsets[r])));
}
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline __m512 widen_sums(const Finish<float>&, int,
                                                                      __m512 sums) {
    return sums;
}
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void store_sums(std::int32_t* to,
                                                                    __m512i sums) {
    _mm512_storeu_si512(to, sums);
}
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void store_sums(float* to, __m512 sums) {
    _mm512_storeu_ps(to, sums);
}

template <int kRows, int kVectors, typename Sum, typename Vector>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void store_tile(
    const Vector (&acc)[kRows][kVectors], Sum* to) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store_sums(to + r * kPanel + 16 * v, acc[r][v]);
    }
}

template <int kRows, int kVectors, typename Sum, typename Out>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void store_values(
    const __m512 (&values)[kRows][kVectors], const Finish<Sum>& f, Out* out) {
    // Rounding in integers is ten instructions for 16 values. The machine's own is one for 32, with
    // the same bits but for subnormals, which it takes for zero: the least magnitude tells.
    if constexpr (std::is_same_v<Out, bfloat16> && kVectors % 2 == 0) {
        __m512 least[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            least[v] = values[0][v];
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) least[v] = least_magnitude(least[v], values[r][v]);
        }
        __mmask16 subnormal = 0;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; v += 2) {
            const __m512 pair = least_magnitude(least[v], least[v + 1]);
            subnormal |= _mm512_cmp_ps_mask(pair, _mm512_set1_ps(0x1p-126f), _CMP_LT_OQ);
        }
        if (f.rounds_bf16 && subnormal == 0) {
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; v += 2) {
                    store_normal(out + r * f.ldo + 16 * v, values[r][v], values[r][v + 1]);
                }
            }
            return;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + r * f.ldo + 16 * v, values[r][v]);
    }
}

// The sums go from the accumulators straight to the output: 24 more stores in between overfill
// the store queue and stall the next tile. In the last, ragged panel they go through `memory`,
// which is f.acc.
template <int kRows, int kVectors, typename Sum, typename Vector, typename Out>
FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline void finish_registers(
    const Vector (&acc)[kRows][kVectors], Sum* memory, const Finish<Sum>& f, Out* out) {
    if (f.columns < 16 * kVectors) {
        store_tile(acc, memory);
        finish(f, out);
        return;
    }
    // Without bias -0 is added, which changes no bit.
    __m512 values[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v);
        const __m512 bias =
            f.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_loadu_ps(f.bias + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512 row =
                _mm512_mul_ps(widen_sums(f, r, acc[r][v]), _mm512_set1_ps(f.a_scale[r]));
            values[r][v] = _mm512_fmadd_ps(row, w_scale, bias);
        }
    }
    // The branch adds to the registers that hold the tile; written out for GCC's sake, as the
    // dot products are.
    const float* up = f.up;
    for (std::int64_t i = 0; i < f.rank; ++i, up += kPanel) {
        __m512 columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_ps(up + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512 low = _mm512_set1_ps(f.low[r * f.rank + i]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                asm("vfmadd231ps %2, %1, %0" : "+v"(values[r][v]) : "v"(columns[v]), "v"(low));
            }
        }
    }
    store_values<kRows, kVectors>(values, f, out);
}
#endif

// What finishes sums that are in memory, of any number of rows.
template <typename Sum, typename Out>
FinishFunction<Sum, Out> choose_finish(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return finish_avx512<Sum, Out>;
    if (isa == Isa::kAvx2) return finish_avx2<Sum, Out>;
#endif
    (void)isa;
    return finish_portable<Sum, Out>;
}

}  // namespace fewstep::cpu::tile
