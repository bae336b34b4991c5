// A tile of gemm_fp8 from operands to outputs: bf16_tiles.h's sums, then tile_finish.h once the
// last slice of K is in. The sums of earlier slices stay in the tile's memory.
#pragma once

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

}  // namespace fewstep::cpu::bf16
