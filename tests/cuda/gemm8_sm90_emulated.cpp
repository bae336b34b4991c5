// gemm_w8a8's and gemm_fp8's Hopper kernel on the host, for tests/cuda_gemm8.py (ctypes).
#include "emulated_product.h"
#include "fewstep/cuda/gemm8_launch_sm90.cuh"

namespace gemm8 = fewstep::cuda::gemm8;

extern "C" const char* run(const fewstep::TensorView* views, const bool* present,
                           const char* activation, int tiling) {
    return run_product(views, present, activation, [&](const fewstep::ProductArguments& given) {
        if (given.a.dtype == fewstep::DType::kInt8) {
            gemm8::run<std::int8_t>(given, 0, tiling);
        } else {
            gemm8::run<fewstep::cuda::Float8>(given, 0, tiling);
        }
    });
}

// gemm8_plan.h, for the tests of it.
extern "C" int choose_tiling(bool is_float, int M, int N, int slabs, int multiprocessors) {
    return gemm8::choose_tiling(is_float, M, N, slabs, multiprocessors);
}
// -2 for an error.
extern "C" int asked_tiling() {
    try {
        return gemm8::asked_tiling();
    } catch (const std::exception&) {
        return -2;
    }
}
// Rows, columns, slots, bytes of shared memory.
extern "C" void describe(bool is_float, int tiling, int* facts) {
    const gemm8::Tile tile = gemm8::kTiles[is_float][tiling];
    const int slots = gemm8::slots_of(tile);
    const int values[] = {tile.rows(), tile.columns, slots,
                          gemm8::fixed_bytes(tile) + slots * tile.slot_bytes()};
    std::copy(values, values + 4, facts);
}
extern "C" void place_of(int index, int rows, int columns, int group, int* place) {
    const gemm8::TilePlace at = gemm8::place_of(index, rows, columns, group);
    place[0] = at.row;
    place[1] = at.column;
}
extern "C" int scratch_offset(int row, int column) {
    return gemm8::scratch_offset(row, column);
}
