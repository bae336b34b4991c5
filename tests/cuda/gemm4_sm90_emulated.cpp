// gemm_w4a8's Hopper kernel on the host, for tests/cuda_gemm8.py (ctypes).
#include "emulated_product.h"
#include "fewstep/cuda/gemm4_launch_sm90.cuh"

namespace gemm4 = fewstep::cuda::gemm4;

extern "C" const char* run(const fewstep::TensorView* views, const bool* present,
                           const char* activation, int tiling) {
    return run_product(views, present, activation, [&](const fewstep::ProductArguments& given) {
        gemm4::run(given, 0, tiling);
    });
}

// gemm4_plan.h, for the tests of it.
extern "C" int choose_tiling(int M, int N, int slabs, int multiprocessors) {
    return gemm4::choose_tiling(M, N, slabs, multiprocessors);
}
// Columns, slots, bytes of a slot, bytes of shared memory.
extern "C" void describe(int tiling, int* facts) {
    const gemm4::Tile tile = gemm4::kTiles[tiling];
    const int slots = gemm4::slots_of(tile);
    const int values[] = {tile.columns, slots, tile.slot_bytes(),
                          gemm4::fixed_bytes(tile) + slots * tile.slot_bytes()};
    std::copy(values, values + 4, facts);
}
extern "C" int tile_row(int group, int r, bool is_glu) {
    return gemm4::tile_row(group, r, is_glu);
}
extern "C" void scratch_place(int r, int column, bool is_glu, int* place) {
    const gemm4::ScratchPlace at = gemm4::scratch_place(r, column, is_glu);
    place[0] = at.warp;
    place[1] = fewstep::cuda::gemm8::scratch_offset(at.row, at.column);
}
extern "C" int half_row_offset(int row, int at) {
    return fewstep::cuda::half_row_offset(row, at);
}
extern "C" std::uint32_t expand(std::uint32_t nibbles, std::uint32_t f) {
    return gemm4::expand(nibbles, f, gemm4::offsets_of(f), gemm4::kNibbles);
}
