// Hopper's products of 8-bit rows, as arithmetic that also runs on the host, so that it is tested
// without a GPU: tiles, which of them a product takes, in which order, and where an end's scratch
// keeps its elements.
//
// A block of threads owns an SM, and takes tile after tile. Two warpgroups multiply: both a half of
// the rows of one tile ("together"), or each a tile of its own ("in turns"), so that one's end runs
// beside the other's products. A slab is 128 k: one row of the 128-byte swizzle.
#pragma once

#include <cstdint>

#include "fewstep/cuda/hopper_layout.h"

namespace fewstep::cuda::gemm8 {

constexpr int kSlab = 128;       // k of a slot, in bytes
constexpr int kPartRows = 64;    // of one matrix instruction
constexpr int kWarpRows = 16;    // of an accumulator, that one warp holds
constexpr int kChunk = 32;       // columns that go through a warp's scratch at once
constexpr int kMultipliers = 2;  // warpgroups

// `parts` instructions of 64 rows x `columns` for each multiplying warpgroup. The cycles are
// estimates, to be replaced by what is measured: of a slab the larger of its products at 4096 a
// cycle and its (rows + columns) * 128 bytes at 32 a cycle from the second-level cache; of an end
// a tenth of a cycle for each output. `group`: tiles of rows walked before the next of columns,
// so that those of 132 SMs make about a square.
struct Tile {
    int parts, columns;
    bool in_turns;
    int slab_cycles, end_cycles, group;

    FEWSTEP_HOST_DEVICE constexpr int rows() const {
        return parts * kPartRows * (in_turns ? 1 : kMultipliers);
    }
    FEWSTEP_HOST_DEVICE constexpr int slot_bytes() const { return (rows() + columns) * kSlab; }
};

// 8-bit integers need one accumulator. Hopper adds e4m3 products with some 14 bits, so their sums
// go to float32 after every slab: two accumulators, hence narrower tiles.
constexpr int kTilings = 3;
constexpr Tile kTiles[2][kTilings] = {
    {{1, 256, false, 1536, 3280, 16}, {2, 128, true, 1024, 1640, 11}, {1, 128, true, 768, 820, 16}},
    {{1, 192, false, 1280, 2460, 14},
     {1, 128, false, 1024, 1640, 11},
     {1, 128, true, 768, 820, 16}},
};

FEWSTEP_HOST_DEVICE constexpr int tiles_of(int size, int tile) {
    return (size + tile - 1) / tile;
}

// Cycles of the SM with the most tiles, of `problems` products with M[i] rows in one launch. In
// turns an end hides behind the other's products, or the products behind both ends.
constexpr std::int64_t cycles(const Tile& tile, const int* M, int problems, int N, int slabs,
                              int multiprocessors) {
    std::int64_t count = 0;
    for (int i = 0; i < problems; ++i) {
        count += std::int64_t{tiles_of(M[i], tile.rows())} * tiles_of(N, tile.columns);
    }
    const std::int64_t most = (count + multiprocessors - 1) / multiprocessors;
    const std::int64_t products = std::int64_t{slabs} * tile.slab_cycles, end = tile.end_cycles;
    if (!tile.in_turns) return most * (products + end);
    const std::int64_t pair = (products + end) / 2;
    return most * (products > pair ? products : pair) + end;
}

// The tiling with the fewest of them; the first of equals.
constexpr int choose_tiling(bool is_float, const int* M, int problems, int N, int slabs,
                            int multiprocessors) {
    const Tile(&tiles)[kTilings] = kTiles[is_float];
    int best = 0;
    for (int i = 1; i < kTilings; ++i) {
        if (cycles(tiles[i], M, problems, N, slabs, multiprocessors) <
            cycles(tiles[best], M, problems, N, slabs, multiprocessors)) {
            best = i;
        }
    }
    return best;
}
constexpr int choose_tiling(bool is_float, int M, int N, int slabs, int multiprocessors) {
    return choose_tiling(is_float, &M, 1, N, slabs, multiprocessors);
}

// From the end of a kernel to the first product of the next on its stream; an estimate, as above.
constexpr int kLaunchCycles = 4000;

// Whether one launch takes fewer cycles than one for each. A round that is hardly begun costs as
// much as a full one, so it may not.
constexpr bool grouping_pays(bool is_float, const int* M, int problems, int N, int slabs,
                             int multiprocessors) {
    const auto best = [&](const int* rows, int count) {
        const int tiling = choose_tiling(is_float, rows, count, N, slabs, multiprocessors);
        return cycles(kTiles[is_float][tiling], rows, count, N, slabs, multiprocessors);
    };
    std::int64_t apart = 0;
    for (int i = 0; i < problems; ++i) apart += best(M + i, 1) + (i > 0 ? kLaunchCycles : 0);
    return best(M, problems) <= apart;
}

struct TilePlace {
    int row, column;  // in tiles
};

// The place of tile `index` of rows x columns: columns by columns within `group` rows of tiles.
FEWSTEP_HOST_DEVICE constexpr TilePlace place_of(int index, int rows, int columns, int group) {
    const int first = index / (group * columns) * group;
    const int height = rows - first < group ? rows - first : group;
    const int within = index - first * columns;
    return {first + within % height, within / height};
}

// Bytes from the start of a warp's scratch to float (row, column) of 16 x 32. Chunks of 16 bytes
// change places by the row: a quarter of a warp then writes pairs of an accumulator, and reads
// rows, and a warp writes single values of a transposed one, without two threads meeting in a bank.
constexpr int kScratchBytes = kWarpRows * kChunk * 4;
FEWSTEP_HOST_DEVICE constexpr int scratch_offset(int row, int column) {
    return row * kChunk * 4 + (column / 4 ^ (row + row / 4) % 4 * 2) * 16 + column % 4 * 4;
}

// How a warp reads them back, four columns a thread: `lanes` threads for a row. Halves that a gated
// activation multiplies lie side by side there, 16 columns each.
FEWSTEP_HOST_DEVICE constexpr int lanes_of_row(bool is_glu) {
    return is_glu ? kChunk / 8 : kChunk / 4;
}

// Shared memory of a block: slots, scratch of each multiplying warp, two buffers of the scales and
// the bias of a tile's columns, barriers.
constexpr int kMostSlots = 8, kBarrierBytes = 256, kAlignment = kSwizzleRows * kRowBytes;
constexpr int kSharedBytes = 227 << 10;  // that a block can ask for on sm_90
FEWSTEP_HOST_DEVICE constexpr int vectors_bytes(const Tile& tile) {
    return 2 * 2 * tile.columns * 4;
}
FEWSTEP_HOST_DEVICE constexpr int fixed_bytes(const Tile& tile) {
    return kAlignment + kBarrierBytes + kMultipliers * 4 * kScratchBytes + vectors_bytes(tile);
}
FEWSTEP_HOST_DEVICE constexpr int slots_of(const Tile& tile) {
    const int fit = (kSharedBytes - fixed_bytes(tile)) / tile.slot_bytes();
    return fit < kMostSlots ? fit : kMostSlots;
}

}  // namespace fewstep::cuda::gemm8
