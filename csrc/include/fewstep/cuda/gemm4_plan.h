// Hopper's product of 8-bit rows with a 4-bit weight, as arithmetic that also runs on the host: the
// tiles, which of them a product takes, and how four bits become eight.
//
// A tile is transposed: 128 rows of the weight, 64 for each of two multiplying warpgroups, are the
// left operand, which matrix instructions take from registers; `columns` rows of a are the right
// one, in shared memory. Slabs are gemm8_plan.h's 128 k.
#pragma once

#include "fewstep/cuda/gemm8_plan.h"

namespace fewstep::cuda::gemm4 {

using gemm8::kSlab;

constexpr int kWeightRows = 128;         // of a tile
constexpr int kPackedBytes = kSlab / 2;  // of a weight's row in a slab
constexpr int kFactors = kSlab / 32;     // of a row in a slab, one for each instruction's k
constexpr int kBranchColumns = kPackedBytes / 2;  // r of a slab of the branch: as many bytes

// The cycles are estimates as gemm8_plan.h's: of a slab its bytes at 32 a cycle, which are more
// than its products, 4 * columns; of an end a tenth of a cycle for each output.
struct Tile {
    int columns, slab_cycles, end_cycles, group;

    FEWSTEP_HOST_DEVICE constexpr int packed_offset() const { return columns * kRowBytes; }
    FEWSTEP_HOST_DEVICE constexpr int factor_offset() const {
        return packed_offset() + kWeightRows * kPackedBytes;
    }
    FEWSTEP_HOST_DEVICE constexpr int slot_bytes() const {
        return factor_offset() + kWeightRows * kFactors * 2;
    }
};

constexpr int kTilings = 3;
constexpr Tile kTiles[kTilings] = {{256, 1280, 3280, 8}, {128, 768, 1640, 11}, {64, 512, 820, 16}};

// Cycles of the SM with the most tiles.
constexpr std::int64_t cycles(const Tile& tile, int M, int N, int slabs, int multiprocessors) {
    const std::int64_t count =
        std::int64_t{gemm8::tiles_of(M, tile.columns)} * gemm8::tiles_of(N, kWeightRows);
    const std::int64_t most = (count + multiprocessors - 1) / multiprocessors;
    return most * (std::int64_t{slabs} * tile.slab_cycles + tile.end_cycles);
}

// The tiling with the fewest of them; the first of equals.
constexpr int choose_tiling(int M, int N, int slabs, int multiprocessors) {
    int best = 0;
    for (int i = 1; i < kTilings; ++i) {
        if (cycles(kTiles[i], M, N, slabs, multiprocessors) <
            cycles(kTiles[best], M, N, slabs, multiprocessors)) {
            best = i;
        }
    }
    return best;
}

// Which row of a tile's weight is the r-th of a warpgroup's 64 in the matrix instruction. Those
// that a gated activation multiplies, 64 apart, lie 8 apart there: in one thread.
FEWSTEP_HOST_DEVICE constexpr int tile_row(int group, int r, bool is_glu) {
    return is_glu ? group * 32 + r / 16 * 8 + r % 8 + r / 8 % 2 * 64 : group * 64 + r;
}

// Where a warpgroup's value of 32 rows of a goes: which of its four scratches, and the row and
// column there. `r` as above, `column` of 32.
struct ScratchPlace {
    int warp, row, column;
};
FEWSTEP_HOST_DEVICE constexpr ScratchPlace scratch_place(int r, int column, bool is_glu) {
    const int within = is_glu ? r / 16 % 2 * 8 + r % 8 + r / 8 % 2 * 16 : r % 32;
    return {column / 16 * 2 + r / 32, column % 16, within};
}

// What expand() multiplies with: f, and 0x8080 - 8 f twice.
FEWSTEP_HOST_DEVICE constexpr std::uint32_t offsets_of(std::uint32_t f) {
    return 0x80808080u - f * 0x00080008u;
}

// Of two nibbles q, at bits 0 and 16 of `bits`, q + 8. `mask` is kNibbles.
constexpr std::uint32_t kNibbles = 0x000f000f;
FEWSTEP_HOST_DEVICE constexpr std::uint32_t two_nibbles(std::uint32_t bits, std::uint32_t mask) {
    return (bits & mask) ^ 0x00080008u;
}

// Shared memory of a block: slots, scratch of each multiplying warp, two buffers of the scales of a
// tile's rows of a and of the scales and biases of its weight, barriers.
FEWSTEP_HOST_DEVICE constexpr int vectors_floats(const Tile& tile) {
    return tile.columns + 2 * kWeightRows;
}
FEWSTEP_HOST_DEVICE constexpr int fixed_bytes(const Tile& tile) {
    return gemm8::kAlignment + gemm8::kBarrierBytes +
           gemm8::kMultipliers * 4 * gemm8::kScratchBytes + 2 * vectors_floats(tile) * 4;
}
FEWSTEP_HOST_DEVICE constexpr int slots_of(const Tile& tile) {
    const int fit = (gemm8::kSharedBytes - fixed_bytes(tile)) / tile.slot_bytes();
    return fit < gemm8::kMostSlots ? fit : gemm8::kMostSlots;
}

}  // namespace fewstep::cuda::gemm4
