// What gemm_w4a16 and gemv_w4a16_grouped share on the CPU: rows of x by columns of a 4-bit weight.
//
// x is widened once, the even k of every 32 before the odd ones, so that 16 bytes of the weight
// become the factors of two neighbouring vectors: a lane's low half and its high half each pick q s
// from a table of 16 products that a group makes of its scale (exact: 4 bits times 11). A tile is
// 4 rows x 4 columns. Every output is computed by one tile in one order, whatever its neighbours
// are, so neither threads nor other rows, columns or problems change a bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/numeric.h"
#include "fewstep/tensor.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewstep::cpu::w4a16 {

constexpr int kLanes = 16;  // partial sums of an output
constexpr int kRows = 4, kColumns = 4;
constexpr std::int64_t kChunk = 2 * kLanes;  // k that 16 bytes hold
constexpr std::int64_t kPanel = 64;

inline std::int64_t pad(std::int64_t n) {
    return (n + kLanes - 1) / kLanes * kLanes;
}

// Rows of x and low, columns of the weight, its scales and up. Floats are widened; low and up are
// padded with zeros to whole vectors.
struct Tile {
    const float* x;
    std::int64_t ldx;
    const std::uint8_t* w[kColumns];
    const float* scale[kColumns];
    std::int64_t groups, chunks;  // chunks of a group
    const float* low;
    const float* up[kColumns];
    std::int64_t rank;   // padded
    std::int64_t ahead;  // bytes to the columns after these
    int rows;
};

using Sums = float[kRows][kColumns];

[[gnu::always_inline]] inline float add_lanes(float* lanes) {
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

[[gnu::always_inline]] inline void multiply_add(const float* a, const float* b, float* acc) {
    for (int i = 0; i < kLanes; ++i) acc[i] = std::fma(a[i], b[i], acc[i]);
}

[[gnu::always_inline]] inline void multiply_tile(const Tile& t, Sums& sums) {
    float acc[kRows][kColumns][kLanes] = {};
    std::int64_t at = 0;
    for (std::int64_t g = 0; g < t.groups; ++g) {
        for (std::int64_t e = 0; e < t.chunks; ++e, ++at) {
            for (int c = 0; c < kColumns; ++c) {
                const std::uint8_t* const w = t.w[c] + at * kLanes;
                const float scale = t.scale[c][g];
                float even[kLanes], odd[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    even[i] = static_cast<float>(((w[i] & 15) ^ 8) - 8) * scale;
                    odd[i] = static_cast<float>(((w[i] >> 4) ^ 8) - 8) * scale;
                }
                for (int r = 0; r < t.rows; ++r) {
                    const float* const x = t.x + r * t.ldx + at * kChunk;
                    multiply_add(x, even, acc[r][c]);
                    multiply_add(x + kLanes, odd, acc[r][c]);
                }
            }
        }
    }
    for (int r = 0; r < t.rows; ++r) {
        for (int c = 0; c < kColumns; ++c) {
            for (std::int64_t i = 0; i < t.rank; i += kLanes) {
                multiply_add(t.low + r * t.rank + i, t.up[c] + i, acc[r][c]);
            }
            sums[r][c] = add_lanes(acc[r][c]);
        }
    }
}

using TileFunction = void (*)(const Tile&, Sums&);

inline void tile_portable(const Tile& t, Sums& sums) {
    multiply_tile(t, sums);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline void tile_avx2(const Tile& t, Sums& sums) {
    multiply_tile(t, sums);
}

FEWSTEP_TARGET_AVX512 [[gnu::always_inline]] inline float add_lanes(__m512 lanes) {
    const __m256 eight =
        _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

template <int kTileRows>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, Sums& sums) {
    const __m512 values = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
    __m512 acc[kTileRows][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) acc[r][c] = _mm512_setzero_ps();
    }
    const float* x = t.x;
    std::int64_t at = 0;  // byte of the columns
    for (std::int64_t g = 0; g < t.groups; ++g) {
        __m512 table[kColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            table[c] = _mm512_mul_ps(values, _mm512_set1_ps(t.scale[c][g]));
        }
        for (std::int64_t e = 0; e < t.chunks; ++e, at += kLanes, x += kChunk) {
            __m512 even_x[kTileRows], odd_x[kTileRows];
#pragma GCC unroll 4
            for (int r = 0; r < kTileRows; ++r) {
                even_x[r] = _mm512_loadu_ps(x + r * t.ldx);
                odd_x[r] = _mm512_loadu_ps(x + r * t.ldx + kLanes);
            }
            if (at % 64 == 0) {  // four streams of a few KiB each: too short for the hardware
#pragma GCC unroll 4
                for (int c = 0; c < kColumns; ++c) {
                    _mm_prefetch(reinterpret_cast<const char*>(t.w[c] + at + t.ahead), _MM_HINT_T0);
                }
            }
#pragma GCC unroll 4
            for (int c = 0; c < kColumns; ++c) {
                // The permutation reads the low four bits of a lane alone.
                const __m512i even = _mm512_maskz_cvtepu8_epi32(
                    0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(t.w[c] + at)));
                const __m512 even_w = _mm512_permutexvar_ps(even, table[c]);
                const __m512 odd_w = _mm512_permutexvar_ps(_mm512_srli_epi32(even, 4), table[c]);
#pragma GCC unroll 4
                for (int r = 0; r < kTileRows; ++r) {
                    acc[r][c] = _mm512_fmadd_ps(even_x[r], even_w, acc[r][c]);
                    acc[r][c] = _mm512_fmadd_ps(odd_x[r], odd_w, acc[r][c]);
                }
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kColumns; ++c) {
            for (std::int64_t i = 0; i < t.rank; i += kLanes) {
                acc[r][c] = _mm512_fmadd_ps(_mm512_loadu_ps(t.low + r * t.rank + i),
                                            _mm512_loadu_ps(t.up[c] + i), acc[r][c]);
            }
            sums[r][c] = add_lanes(acc[r][c]);
        }
    }
}
#endif

inline TileFunction choose_tile(Isa isa, int rows) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        constexpr TileFunction table[] = {tile_avx512<1>, tile_avx512<2>, tile_avx512<3>,
                                          tile_avx512<4>};
        return table[rows - 1];
    }
    if (isa == Isa::kAvx2) return tile_avx2;
#endif
    (void)isa, (void)rows;
    return tile_portable;
}

struct Weight {
    const TensorView& w;
    const TensorView& w_scale;
    const TensorView* up;  // null where rank is 0
    const float* bias;     // may be null
    std::int64_t K, groups, rank;
};

// Columns [n, n + columns) of the weight, what is widened of them.
struct Columns {
    const float* scales;  // rows of `groups`
    const float* up;      // rows of the padded rank
    std::int64_t n, columns;
};

// Rows of a tile (t.x, t.low and t.rows are set) by all columns of a panel: sums and bias, row r at
// y + r * kPanel.
inline void multiply_columns(const Weight& p, const Columns& panel, Tile& t,
                             TileFunction multiply_tile, float* y) {
    for (std::int64_t at = 0; at < panel.columns; at += kColumns) {
        const int count = static_cast<int>(std::min<std::int64_t>(kColumns, panel.columns - at));
        for (int c = 0; c < kColumns; ++c) {
            // Columns beyond the last are the last again, and not stored.
            const std::int64_t n = at + std::min(c, count - 1);
            t.w[c] = p.w.ptr<std::uint8_t>() + (panel.n + n) * (p.K / 2);
            t.scale[c] = panel.scales + n * p.groups;
            t.up[c] = panel.up + n * t.rank;
        }
        Sums sums;
        multiply_tile(t, sums);
        for (int r = 0; r < t.rows; ++r) {
            for (int c = 0; c < count; ++c) {
                y[r * kPanel + at + c] =
                    p.bias ? sums[r][c] + p.bias[panel.n + at + c] : sums[r][c];
            }
        }
    }
}

// The widened columns [n, n + columns) of a panel: scales and up, rows of `groups` and pad(rank).
inline void widen_panel(const Weight& p, std::int64_t n, std::int64_t columns, float* scales,
                        float* up) {
    widen(p.w_scale, "w_scale", n * p.groups, columns * p.groups, scales);
    for (std::int64_t c = 0; c < columns && p.rank > 0; ++c, up += pad(p.rank)) {
        widen(*p.up, "up", (n + c) * p.rank, p.rank, up);
        std::fill(up + p.rank, up + pad(p.rank), 0.0f);
    }
}

// A tile of a weight, still without rows and columns.
inline Tile tile_of(const Weight& weight) {
    Tile tile{};
    tile.ldx = weight.K;
    tile.groups = weight.groups;
    tile.chunks = weight.groups > 0 ? weight.K / weight.groups / kChunk : 0;
    tile.rank = pad(weight.rank);
    tile.ahead = kColumns * weight.K / 2;
    return tile;
}

// A row of K in the order of the tiles.
template <typename T>
void widen_row(const T* from, std::int64_t K, float* to) {
    for (std::int64_t k = 0; k < K; ++k) {
        to[k / kChunk * kChunk + k % 2 * kLanes + k % kChunk / 2] =
            static_cast<float>(to_acc(from[k]));
    }
}

// Refuses scales that are not 16-bit [N, groups] of groups of a multiple of 32, and w likewise.
inline void expect_weight(const TensorView& w, const TensorView& w_scale, std::int64_t N,
                          std::int64_t K) {
    const std::int64_t groups = w_scale.size(1);
    FEWSTEP_CHECK(K == 0 ? groups == 0 : groups > 0 && K % (kChunk * groups) == 0,
                  "w_scale: expected [N, K / G] with G a multiple of 32 and K = ", K, ", got ",
                  groups, " groups");
    expect_contiguous(w, "w", DType::kUInt8, {N, K / 2});
    FEWSTEP_CHECK(w_scale.dtype == DType::kBFloat16 || w_scale.dtype == DType::kFloat16,
                  "w_scale: expected bfloat16 or float16, got ", name(w_scale.dtype));
    expect_contiguous(w_scale, "w_scale", w_scale.dtype, {N, groups});
}

}  // namespace fewstep::cpu::w4a16
