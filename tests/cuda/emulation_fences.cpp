// A product of matrices that threads stored, for tests/cuda/test_emulation.py (ctypes): d = a b^T,
// 64 x 16 times 32 x 16, with what comes between the stores and the product to choose from.
#include "fewstep/cuda/hopper.cuh"

namespace fewstep::cuda {

enum class Between { kFence, kNothing, kOneThreadFences, kFenceAndStore };

struct Params {
    float* d;
    Between between;
};

inline void kernel(Params p) {
    constexpr int kRows = 64 + 32, kColumns = 32;
    std::uint8_t* const raw = dynamic_shared();
    std::uint8_t* const base = raw + (1024 - shared_address(raw) % 1024);
    const auto store = [&](int row) {
        for (int column = 0; column < kStepK; ++column) {
            const float value = static_cast<float>(row % 8 - column % 3);
            store_shared(base + tile_offset(row, column, kRows), Convert<__half>::from(value));
        }
    };
    const int thread = threadIdx.x;
    if (thread < kRows) store(thread);
    if (p.between == Between::kFence || p.between == Between::kFenceAndStore) fence_shared_stores();
    if (p.between == Between::kOneThreadFences && thread == 0) fence_shared_stores();
    if (p.between == Between::kFenceAndStore && thread == 5) {
        store_shared(base + tile_offset(5, 3, kRows), Convert<__half>::from(7.0f));
    }
    __syncthreads();
    float sums[kColumns / 2];
    begin_products();
    multiply_scores<__half, kColumns, 1, false>(
        matrix_descriptor(shared_address(base), 0), kRows,
        matrix_descriptor(shared_address(base) + 64 * kRowBytes, 0), sums);
    commit_products();
    wait_products<0>();
    for (int i = 0; i < kColumns / 2; ++i) {
        p.d[accumulator_row(thread, i) * kColumns + accumulator_column(thread, i)] = sums[i];
    }
}

}  // namespace fewstep::cuda

extern "C" const char* run(float* d, int between) {
    static std::string message;
    namespace ours = fewstep::cuda;
    try {
        ours::launch_kernel(ours::kernel, "kernel", dim3(1), ours::kGroupThreads, 16 << 10, 0,
                            ours::Params{d, static_cast<ours::Between>(between)});
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
