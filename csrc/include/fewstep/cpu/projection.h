// The low-rank branch's first product: low = x down^T of rows as they are given.
//
//   low_mr = round(sum_k x_mk down_rk)      float32 sums, rounded once to x's dtype
//
// A tile is kRows rows of x by kColumns rows of down, all read where they lie: 16 accumulators, of
// as many lanes as a register has, that are added up at the end. The order of a sum depends on K
// and the instruction set alone, so neither threads nor the rows around a row change a bit of it.
//
// bfloat16 goes through vdpbf16ps where the machine has it: exact products of pairs, and a quarter
// of the instructions of float32. It takes subnormal bfloat16 for zero. Everything else is widened
// to float32, down once and x by blocks of rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/prologue.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fewstep::cpu::projection {

constexpr int kRows = 4, kColumns = 4;

// sums[i][j] = x[i] . d[j] over K; rows of x at distance ldx, those of down at distance K.
template <typename T>
using TileFunction = void (*)(const T* x, std::int64_t ldx, const T* down, std::int64_t K,
                              float (*sums)[kColumns]);

// Lanes are added in halves, the same way for every tile.
template <int kLanes>
[[gnu::always_inline]] inline float add_lanes(const typename prologue::Lanes<kLanes>::Vector& v) {
    float lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = v[i];
#pragma GCC unroll 4
    for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

template <int kLanes, int kM, int kN>
[[gnu::always_inline]] inline void tile_floats(const float* x, std::int64_t ldx, const float* down,
                                               std::int64_t K, float (*sums)[kColumns]) {
    using Vector = typename prologue::Lanes<kLanes>::Vector;
    using Unaligned = typename prologue::Lanes<kLanes>::Unaligned;
    Vector acc[kM][kN] = {};
    const auto step = [&](const float* a, std::int64_t lda, const float* b,
                          std::int64_t ldb) __attribute__((always_inline)) {
        Vector columns[kN];
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) {
            columns[j] = *reinterpret_cast<const Unaligned*>(b + j * ldb);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kM; ++i) {
            const Vector row = *reinterpret_cast<const Unaligned*>(a + i * lda);
#pragma GCC unroll 4
            for (int j = 0; j < kN; ++j) acc[i][j] += row * columns[j];
        }
    };
    std::int64_t k = 0;
    for (; k + kLanes <= K; k += kLanes) step(x + k, ldx, down + k, K);
    if (k < K) {  // what is left, beside zeros
        float a[kM * kLanes] = {}, b[kN * kLanes] = {};
        for (std::int64_t n = 0; k + n < K; ++n) {
            for (int i = 0; i < kM; ++i) a[i * kLanes + n] = x[i * ldx + k + n];
            for (int j = 0; j < kN; ++j) b[j * kLanes + n] = down[j * K + k + n];
        }
        step(a, kLanes, b, kLanes);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) sums[i][j] = add_lanes<kLanes>(acc[i][j]);
    }
}

template <int kM, int kN>
void tile_portable(const float* x, std::int64_t ldx, const float* down, std::int64_t K,
                   float (*sums)[kColumns]) {
    tile_floats<4, kM, kN>(x, ldx, down, K, sums);
}

#if defined(__x86_64__)
template <int kM, int kN>
FEWSTEP_TARGET_AVX2 void tile_avx2(const float* x, std::int64_t ldx, const float* down,
                                   std::int64_t K, float (*sums)[kColumns]) {
    tile_floats<8, kM, kN>(x, ldx, down, K, sums);
}
template <int kM, int kN>
FEWSTEP_TARGET_AVX512 void tile_avx512(const float* x, std::int64_t ldx, const float* down,
                                       std::int64_t K, float (*sums)[kColumns]) {
    tile_floats<16, kM, kN>(x, ldx, down, K, sums);
}

template <int kM, int kN>
FEWSTEP_TARGET_AVX512_BF16 void tile_bf16(const bfloat16* x, std::int64_t ldx, const bfloat16* down,
                                          std::int64_t K, float (*sums)[kColumns]) {
    __m512 acc[kM][kN];
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) acc[i][j] = _mm512_setzero_ps();
    }
    const auto step = [&](std::int64_t k, __mmask32 mask) FEWSTEP_TARGET_AVX512_BF16
        __attribute__((always_inline)) {
            __m512bh columns[kN];
#pragma GCC unroll 4
            for (int j = 0; j < kN; ++j)
                columns[j] = (__m512bh)_mm512_maskz_loadu_epi16(mask, down + j * K + k);
#pragma GCC unroll 4
            for (int i = 0; i < kM; ++i) {
                const auto row = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + i * ldx + k);
#pragma GCC unroll 4
                for (int j = 0; j < kN; ++j) {
                    acc[i][j] = _mm512_dpbf16_ps(acc[i][j], row, columns[j]);
                }
            }
        };
    std::int64_t k = 0;
    for (; k + 32 <= K; k += 32) step(k, ~__mmask32{0});
    if (k < K) step(k, (__mmask32{1} << (K - k)) - 1);
#pragma GCC unroll 4
    for (int i = 0; i < kM; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kN; ++j) sums[i][j] = _mm512_reduce_add_ps(acc[i][j]);
    }
}
#endif

// One of the 16 tiles of 1 to 4 rows by 1 to 4 columns.
#define FEWSTEP_TILES(tile)                                     \
    {                                                           \
        {tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},       \
            {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},   \
            {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}, { \
            tile<4, 1>, tile<4, 2>, tile<4, 3>, tile<4, 4>      \
        }                                                       \
    }

template <typename T>
using TileTable = TileFunction<T>[kRows][kColumns];

inline const TileTable<float>& choose_tiles(const float*) {
#if defined(__x86_64__)
    static constexpr TileTable<float> avx512 = FEWSTEP_TILES(tile_avx512);
    static constexpr TileTable<float> avx2 = FEWSTEP_TILES(tile_avx2);
    if (isa() == Isa::kAvx512) return avx512;
    if (isa() == Isa::kAvx2) return avx2;
#endif
    static constexpr TileTable<float> portable = FEWSTEP_TILES(tile_portable);
    return portable;
}
#if defined(__x86_64__)
inline const TileTable<bfloat16>& choose_tiles(const bfloat16*) {
    static constexpr TileTable<bfloat16> bf16 = FEWSTEP_TILES(tile_bf16);
    return bf16;
}
#endif
#undef FEWSTEP_TILES

// Rows of K values against down [R, K] of the same dtype, contiguous, or null for none.
template <typename T>
class Projection {
  public:
    Projection(const TensorView* down, std::int64_t K)
        : K_(K), widen_(prologue::choose_widen<T>(isa())) {
        if (down == nullptr) return;
        rank_ = down->size(0);
        down_ = down->ptr<T>();
        if constexpr (std::is_same_v<T, bfloat16>) pairs_ = has_bf16_dots();
        if (std::is_same_v<T, float> || pairs_) return;
        wide_.reset(new float[static_cast<std::size_t>(rank_ * K_)]);
        widen_(down_, nullptr, wide_.get(), rank_ * K_);
    }

    explicit operator bool() const { return down_ != nullptr; }
    std::int64_t rank() const { return rank_; }
    // Floats that operator() wants lent.
    std::int64_t scratch() const { return wide_ == nullptr ? 0 : kRows * K_; }

    // Calls put(m, r, low) for `count` rows, at most kRows, at distance `stride`; the first is row
    // m = `first`.
    template <typename Put>
    void operator()(const T* rows, std::int64_t stride, std::int64_t first, int count,
                    float* scratch, const Put& put) const {
#if defined(__x86_64__)
        if constexpr (std::is_same_v<T, bfloat16>) {
            if (pairs_) return multiply(rows, stride, down_, first, count, put);
        }
#endif
        if constexpr (std::is_same_v<T, float>) {
            multiply(rows, stride, down_, first, count, put);
        } else {
            for (int i = 0; i < count; ++i) {
                widen_(rows + i * stride, nullptr, scratch + i * K_, K_);
            }
            multiply(scratch, K_, wide_.get(), first, count, put);
        }
    }

  private:
    template <typename Value, typename Put>
    void multiply(const Value* rows, std::int64_t ldx, const Value* down, std::int64_t first,
                  int count, const Put& put) const {
        const TileTable<Value>& tiles = choose_tiles(down);
        float sums[kRows][kColumns];
        for (std::int64_t r = 0; r < rank_; r += kColumns) {
            const int columns = static_cast<int>(std::min<std::int64_t>(kColumns, rank_ - r));
            tiles[count - 1][columns - 1](rows, ldx, down + r * K_, K_, sums);
            for (int i = 0; i < count; ++i) {
                for (int j = 0; j < columns; ++j) {
                    put(first + i, r + j, Convert<T>::from(sums[i][j]));
                }
            }
        }
    }

    std::int64_t K_;
    prologue::WidenFunction<T> widen_;
    const T* down_ = nullptr;
    std::int64_t rank_ = 0;
    bool pairs_ = false;
    std::unique_ptr<float[]> wide_;
};

}  // namespace fewstep::cpu::projection
