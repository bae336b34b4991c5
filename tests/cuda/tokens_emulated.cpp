// The GPU kernels of token_gather and token_scatter on the host, for tests/cuda/test_tokens.py
// (ctypes): the ops' own sources, called as the module's functions are.
#include "../../csrc/cuda/token_gather.cu"
#include "../../csrc/cuda/token_scatter.cu"

namespace {

template <typename Call>
const char* report(const Call& call) {
    static std::string message;
    try {
        call();
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
    return nullptr;
}

}  // namespace

// x, index, scale, shift, y.
extern "C" const char* run(const fewstep::TensorView* views, const bool* present, bool normed,
                           double eps) {
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    return report([&] {
        fewstep::cuda::token_gather(views[0], views[1], optional(2), optional(3), views[4], normed,
                                    eps, 0);
    });
}

// value, position, base, gate, y.
extern "C" const char* run_scatter(const fewstep::TensorView* views, const bool* present,
                                   bool residual) {
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    return report([&] {
        fewstep::cuda::token_scatter(views[0], views[1], optional(2), optional(3), views[4],
                                     residual, 0);
    });
}
