// gemm_grouped's Hopper kernel on the host, for tests/cuda/test_gemm_grouped_sm90.py (ctypes): the
// file that the CUDA build compiles, with the emulation for what it includes.
#include "../../csrc/cuda/gemm_grouped_sm90.cu"

// For each problem the tensors of cuda_gemm8.py's NAMES, then limit, scale, amax and exceeded.
extern "C" const char* run(const fewstep::TensorView* views, const bool* present, int count,
                           const char* activation) {
    static std::string message;
    constexpr int kNames = 14;
    fewstep::Tensors all[kNames];
    fewstep::Optionals optional[kNames];
    for (int i = 0; i < count * kNames; ++i) {
        if (present[i]) all[i % kNames].push_back(views[i]);
        optional[i % kNames].push_back(present[i] ? std::optional(views[i]) : std::nullopt);
    }
    try {
        fewstep::cuda::gemm_grouped_sm90(all[0], all[1], all[2], all[3], optional[4], optional[5],
                                         optional[6], activation, optional[7], optional[8], all[10],
                                         all[11], all[12], all[13], all[9], 0);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

extern "C" int clears() {
    return fewstep::cuda::clears;
}

// gemm8_plan.h, for several products.
extern "C" int choose_tiling(bool is_float, const int* M, int count, int N, int slabs,
                             int multiprocessors) {
    return fewstep::cuda::gemm8::choose_tiling(is_float, M, count, N, slabs, multiprocessors);
}
extern "C" bool grouping_pays(bool is_float, const int* M, int count, int N, int slabs,
                              int multiprocessors) {
    return fewstep::cuda::gemm8::grouping_pays(is_float, M, count, N, slabs, multiprocessors);
}
