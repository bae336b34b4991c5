// attention_jvp_backward's Hopper kernels on the host, for tests/cuda (ctypes).
#include "../../csrc/cuda/attention_jvp_backward_sm90.cu"

extern "C" const char* run(const fewstep::TensorView* views, const bool* present, bool is_causal,
                           double scale) {
    static std::string message;
    const auto x = [&](int i) { return present[i] ? &views[i] : nullptr; };
    try {
        fewstep::cuda::attention_jvp_backward_sm90(
            x(0), x(1), x(2), views[3], views[4], views[5], views[6], x(7), x(8), x(9), views[10],
            x(11), x(12), x(13), x(14), x(15), x(16), is_causal, x(17), x(18), x(19), x(20), x(21),
            x(22), x(23), scale, 0);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
