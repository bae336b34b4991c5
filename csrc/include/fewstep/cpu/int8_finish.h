// A tile of int8_product.h from operands to outputs: int8_tiles.h's sums, scaled, with the bias and
// the low-rank branch, rounded once.
#pragma once

#include <cmath>
#include <cstdint>

#include "fewstep/cpu/int8_tiles.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/vector_store.h"
#include "fewstep/dispatch.h"
#include "fewstep/numeric.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fewstep::cpu::int8 {

// What turns the sums of a tile into outputs: undo the offset of the weights, scale, add the bias
// and the low-rank branch.
struct Finish {
    const std::int32_t* acc;      // row r at acc + r * kPanel
    const std::int32_t* offsets;  // 128 sum_k a_mk, per row
    const float* a_scale;         // per row
    const float* w_scale;         // per column
    const float* bias;            // per column; may be null
    const float* low;             // row r at low + r * rank
    const float* up;              // [rank][kPanel]
    std::int64_t rank;
    std::int64_t ldo;  // distance of output rows
    int rows, columns;
};

template <typename Out>
[[gnu::always_inline]] inline void finish(const Finish& f, Out* out) {
    for (int r = 0; r < f.rows; ++r) {
        const std::uint32_t offset = static_cast<std::uint32_t>(f.offsets[r]);
        float values[kPanel];
        // fma is spelled out: without it a compiler may or may not contract, per instruction set.
        for (int n = 0; n < f.columns; ++n) {
            const std::uint32_t sum = static_cast<std::uint32_t>(f.acc[r * kPanel + n]) - offset;
            const float scaled = static_cast<float>(static_cast<std::int32_t>(sum)) * f.a_scale[r];
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

// A tile from operands to outputs.
template <typename Out>
using TileFunction = void (*)(const Tile&, const Finish&, Out*);

template <typename Out>
void tile_portable(const Tile& t, const Finish& f, Out* out) {
    accumulate_portable(t);
    finish(f, out);
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const Tile& t, const Finish& f, Out* out) {
    accumulate_avx2<kRows>(t);
    finish(f, out);
}

// The sums go from the accumulators straight to the output: 24 more stores in between overfill
// the store queue and stall the next tile.
template <int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, const Finish& f, Out* out) {
    // Outputs are seldom in cache and stores retire in order: their lines are asked for now.
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        const char* row = reinterpret_cast<const char*>(out + r * f.ldo);
        for (std::size_t i = 0; i < 16 * kVectors * sizeof(Out); i += 64) {
            _mm_prefetch(row + i, _MM_HINT_ET0);
        }
    }
    __m512i acc[kRows][kVectors];
    accumulate_avx512<kRows, kVectors>(t, acc);
    if (f.columns < 16 * kVectors) {  // in the last, ragged panel
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                _mm512_store_si512(t.acc + r * kPanel + 16 * v, acc[r][v]);
            }
        }
        finish(f, out);
        return;
    }
    // Column n of row r before the branch; without bias -0 is added, which changes no bit.
    const auto scaled = [&](int r, __m512i sum, __m512 w_scale,
                            __m512 bias) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(f.offsets[r]));
        const __m512 row = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(f.a_scale[r]));
        return _mm512_fmadd_ps(row, w_scale, bias);
    };
    const auto load_bias = [&](int v) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
        return f.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_loadu_ps(f.bias + 16 * v);
    };
    if (f.rank == 0) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v), bias = load_bias(v);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
                store(out + r * f.ldo + 16 * v, scaled(r, acc[r][v], w_scale, bias));
            }
        }
        return;
    }
    // The branch adds to the registers that hold the tile; written out for GCC's sake, as the
    // dot products are.
    __m512 values[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v), bias = load_bias(v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) values[r][v] = scaled(r, acc[r][v], w_scale, bias);
    }
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
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + r * f.ldo + 16 * v, values[r][v]);
    }
}

template <int kRows, typename Out>
TileFunction<Out> choose_vectors(int vectors) {
    constexpr TileFunction<Out> table[] = {tile_avx512<kRows, 1, Out>, tile_avx512<kRows, 2, Out>,
                                           tile_avx512<kRows, 3, Out>, tile_avx512<kRows, 4, Out>};
    return table[vectors - 1];
}
#endif

template <typename Out>
TileFunction<Out> choose_tile(Isa isa, int rows, int vectors) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<1, Out>, choose_vectors<2, Out>, choose_vectors<3, Out>,
            choose_vectors<4, Out>, choose_vectors<5, Out>, choose_vectors<6, Out>};
        return table[rows - 1](vectors);
    }
    if (isa == Isa::kAvx2) {
        constexpr TileFunction<Out> table[] = {tile_avx2<1, Out>, tile_avx2<2, Out>,
                                               tile_avx2<3, Out>, tile_avx2<4, Out>};
        return table[rows - 1];
    }
#endif
    (void)isa, (void)rows, (void)vectors;
    return tile_portable<Out>;
}

inline int tile_rows(Isa isa) {
    return isa == Isa::kAvx512 ? 6 : 4;
}

template <typename Out>
using FinishFunction = void (*)(const Finish&, Out*);

template <typename Out>
void finish_portable(const Finish& f, Out* out) {
    finish(f, out);
}

#if defined(__x86_64__)
template <typename Out>
FEWSTEP_TARGET_AVX2 void finish_avx2(const Finish& f, Out* out) {
    finish(f, out);
}
template <typename Out>
FEWSTEP_TARGET_AVX512 void finish_avx512(const Finish& f, Out* out) {
    finish(f, out);
}
#endif

template <typename Out>
FinishFunction<Out> choose_finish(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return finish_avx512<Out>;
    if (isa == Isa::kAvx2) return finish_avx2<Out>;
#endif
    (void)isa;
    return finish_portable<Out>;
}

}  // namespace fewstep::cpu::int8
