// A tile of int8_product.h from operands to outputs: int8_tiles.h's sums, then tile_finish.h. What
// the sums are too large by is the offset of the weights, 128 sum_k a_mk.
#pragma once

#include <cstdint>

#include "fewstep/cpu/int8_tiles.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/tile_finish.h"

namespace fewstep::cpu::int8 {

static_assert(kPanel == tile::kPanel);

using Finish = tile::Finish<std::int32_t>;

template <typename Out>
using TileFunction = void (*)(const Tile&, const Finish&, Out*);

template <typename Out>
void tile_portable(const Tile& t, const Finish& f, Out* out) {
    accumulate_portable(t);
    tile::finish(f, out);
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const Tile& t, const Finish& f, Out* out) {
    accumulate_avx2<kRows>(t);
    tile::finish(f, out);
}

template <int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, const Finish& f, Out* out) {
    tile::prefetch_rows<kRows, kVectors>(out, f.ldo);
    __m512i acc[kRows][kVectors];
    accumulate_avx512<kRows, kVectors>(t, acc);
    tile::finish_registers<kRows, kVectors>(acc, t.acc, f, out);
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

}  // namespace fewstep::cpu::int8
