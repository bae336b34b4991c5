// attention_jvp's Hopper kernels on the host, for tests/cuda/test_attention_jvp_sm90.py (ctypes).
#include "../../csrc/cuda/attention_jvp_sm90.cu"

extern "C" const char* run(const fewstep::TensorView* views, const bool* present, bool is_causal,
                           double scale) {
    static std::string message;
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    try {
        fewstep::cuda::attention_jvp_sm90(
            views[0], views[1], views[2], optional(3), optional(4), optional(5), optional(6),
            optional(7), optional(8), optional(9), is_causal, views[10], views[11], views[12],
            views[13], optional(14), optional(15), optional(16), optional(17), scale, 0);
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}
