// gemv_w4a16_grouped's CUDA kernel on the host, for tests/cuda/test_gemv_w4a16_grouped.py (ctypes).
#include "fewstep/cuda/gemv_w4a16_launch.cuh"

// x, out, and of `count` problems all w, all w_scale, all bias.
extern "C" const char* run(const fewstep::TensorView* views, int count) {
    static std::string message;
    const auto list = [&](int i) {
        return fewstep::Views(views + 2 + i * count, views + 2 + (i + 1) * count);
    };
    try {
        fewstep::cuda::gemv::run(views[0], list(0), list(1), list(2), views[1], 0);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

extern "C" int shared_bytes(int M, int K) {
    return fewstep::cuda::gemv::shared_bytes(M, K);
}
extern "C" int problems_of_a_launch() {
    return fewstep::cuda::gemv::kProblems;
}
