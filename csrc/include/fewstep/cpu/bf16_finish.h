// A tile of gemm_fp8 from operands to outputs: bf16_tiles.h's sums, then tile_finish.h once the
// last slice of K is in. The sums of earlier slices stay in the tile's memory.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "fewstep/cpu/bf16_tiles.h"
#include "fewstep/cpu/e4m3_panel.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/tile_finish.h"

namespace fewstep::cpu::bf16 {

static_assert(kPanel == tile::kPanel);

using Finish = tile::Finish<float>;

// `last` says whether the outputs are to be made.
template <typename Out>
using TileFunction = void (*)(const Tile&, const Finish&, bool last, Out*);

template <typename Out>
void tile_portable(const Tile& t, const Finish& f, bool last, Out* out) {
    accumulate_portable(t);
    if (last) tile::finish(f, out);
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const Tile& t, const Finish& f, bool last, Out* out) {
    accumulate_avx2<kRows>(t);
    if (last) tile::finish(f, out);
}

template <bool kDots, int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, const Finish& f, bool last, Out* out) {
    if (last) tile::prefetch_rows<kRows, kVectors>(out, f.ldo);
    __m512 acc[kRows][kVectors];
    if constexpr (kDots) {
        multiply_avx512_bf16<kRows, kVectors>(t, acc);
    } else {
        multiply_avx512<kRows, kVectors>(t, acc);
    }
    if (last) {
        tile::finish_registers<kRows, kVectors>(acc, t.acc, f, out);
    } else {
        tile::store_tile(acc, t.acc);
    }
}

template <bool kDots, int kRows, typename Out>
TileFunction<Out> choose_vectors(int vectors) {
    constexpr TileFunction<Out> table[] = {
        tile_avx512<kDots, kRows, 1, Out>, tile_avx512<kDots, kRows, 2, Out>,
        tile_avx512<kDots, kRows, 3, Out>, tile_avx512<kDots, kRows, 4, Out>};
    return table[vectors - 1];
}
#endif

// The sums of a tile, to its memory.
using AccumulateFunction = void (*)(const Tile&);

// acc += (sum over a block) a_scale w_scale, block after block, where blocks have scales. Columns
// from `columns` on, of a ragged panel, have no scale and stay as they are.
[[gnu::always_inline]] inline void accumulate_blocks(const Tile& t, int columns,
                                                     AccumulateFunction accumulate) {
    alignas(64) float sums[kMaxRows * kPanel];
    if (!t.resume) std::memset(t.acc, 0, sizeof(float) * kPanel * t.rows);
    Tile part = t;
    part.acc = sums;
    part.resume = false;
    std::int64_t block = 0;
    for (std::int64_t first = 0; first < t.pairs; first += kBlockPairs, ++block) {
        part.a = t.a + first;
        part.b = t.b + first * t.vectors * 16;
        part.pairs = std::min(kBlockPairs, t.pairs - first);
        accumulate(part);
        const float* const w_scale = t.w_scale + block * t.ld_w_scale;
        for (int r = 0; r < t.rows; ++r) {
            const float a_scale = t.a_scale[r * t.ld_a_scale + block];
            float* const acc = t.acc + r * kPanel;
            for (int n = 0; n < columns; ++n) {
                acc[n] = std::fma(sums[r * kPanel + n] * a_scale, w_scale[n], acc[n]);
            }
        }
    }
}

using BlocksFunction = void (*)(const Tile&, int columns, AccumulateFunction);

inline void blocks_portable(const Tile& t, int columns, AccumulateFunction accumulate) {
    accumulate_blocks(t, columns, accumulate);
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline void blocks_avx2(const Tile& t, int columns,
                                            AccumulateFunction accumulate) {
    accumulate_blocks(t, columns, accumulate);
}
FEWSTEP_TARGET_AVX512 inline void blocks_avx512(const Tile& t, int columns,
                                                AccumulateFunction accumulate) {
    accumulate_blocks(t, columns, accumulate);
}

template <bool kDots, int kRows, int kVectors>
FEWSTEP_TARGET_AVX512 void accumulate_avx512(const Tile& t) {
    __m512 acc[kRows][kVectors];
    if constexpr (kDots) {
        multiply_avx512_bf16<kRows, kVectors>(t, acc);
    } else {
        multiply_avx512<kRows, kVectors>(t, acc);
    }
    tile::store_tile(acc, t.acc);
}

template <bool kDots, int kRows>
AccumulateFunction choose_vectors(int vectors) {
    constexpr AccumulateFunction table[] = {
        accumulate_avx512<kDots, kRows, 1>, accumulate_avx512<kDots, kRows, 2>,
        accumulate_avx512<kDots, kRows, 3>, accumulate_avx512<kDots, kRows, 4>};
    return table[vectors - 1];
}
#endif

// What a call runs on.
struct Machine {
    Isa isa = cpu::isa();
    bool dots = has_bf16_dots();
    e4m3::PanelFunction expand = e4m3::choose_panel(isa);

    int tile_rows() const { return dots ? 6 : 4; }
};

template <typename Out>
TileFunction<Out> choose_tile(const Machine& machine, int rows, int vectors) {
#if defined(__x86_64__)
    if (machine.dots) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<true, 1, Out>, choose_vectors<true, 2, Out>,
            choose_vectors<true, 3, Out>, choose_vectors<true, 4, Out>,
            choose_vectors<true, 5, Out>, choose_vectors<true, 6, Out>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx512) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<false, 1, Out>, choose_vectors<false, 2, Out>,
            choose_vectors<false, 3, Out>, choose_vectors<false, 4, Out>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx2) {
        constexpr TileFunction<Out> table[] = {tile_avx2<1, Out>, tile_avx2<2, Out>,
                                               tile_avx2<3, Out>, tile_avx2<4, Out>};
        return table[rows - 1];
    }
#endif
    (void)machine, (void)rows, (void)vectors;
    return tile_portable<Out>;
}

inline AccumulateFunction choose_accumulate(const Machine& machine, int rows, int vectors) {
#if defined(__x86_64__)
    if (machine.dots) {
        constexpr AccumulateFunction (*table[])(int) = {
            choose_vectors<true, 1>, choose_vectors<true, 2>, choose_vectors<true, 3>,
            choose_vectors<true, 4>, choose_vectors<true, 5>, choose_vectors<true, 6>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx512) {
        constexpr AccumulateFunction (*table[])(int) = {
            choose_vectors<false, 1>, choose_vectors<false, 2>, choose_vectors<false, 3>,
            choose_vectors<false, 4>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx2) {
        constexpr AccumulateFunction table[] = {accumulate_avx2<1>, accumulate_avx2<2>,
                                                accumulate_avx2<3>, accumulate_avx2<4>};
        return table[rows - 1];
    }
#endif
    (void)machine, (void)rows, (void)vectors;
    return accumulate_portable;
}

inline BlocksFunction choose_blocks(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return blocks_avx512;
    if (isa == Isa::kAvx2) return blocks_avx2;
#endif
    (void)isa;
    return blocks_portable;
}

}  // namespace fewstep::cpu::bf16
