// The quantising ops' GPU kernels on the host, for tests/cuda/test_quantize.py (ctypes): the ops'
// own sources, called as the module's functions are.
#include "../../csrc/cuda/norm_quantize_int8.cu"
#include "../../csrc/cuda/quantize_fp8.cu"
#include "../../csrc/cuda/quantize_int8.cu"

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

// x, smooth, down, q, scale, low; an empty one where `present` says so. size: -1 for int8.
extern "C" const char* run(const fewstep::TensorView* views, const bool* present, int rotate,
                           const char* activation, int size) {
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    return report([&] {
        if (size < 0) {
            fewstep::cuda::quantize_int8(views[0], optional(1), rotate, optional(2), activation,
                                         views[3], views[4], optional(5), 0);
        } else {
            fewstep::cuda::quantize_fp8(views[0], optional(1), rotate, optional(2), activation,
                                        views[3], views[4], size, optional(5), 0);
        }
    });
}

// Of a block that makes low.
extern "C" int low_shared_bytes(int columns, int rank, bool is_smoothed) {
    fewstep::cuda::quantize::Plan plan{};
    plan.columns = columns;
    plan.smooth = is_smoothed ? &plan : nullptr;
    return fewstep::cuda::quantize::low_shared_bytes(plan, rank);
}

// x, weight, bias, scale, shift, smooth, q, q_scale.
extern "C" const char* run_norm(const fewstep::TensorView* views, const bool* present, int rotate,
                                bool centred, double eps) {
    const auto optional = [&](int i) { return present[i] ? &views[i] : nullptr; };
    return report([&] {
        fewstep::cuda::norm_quantize_int8(views[0], optional(1), optional(2), optional(3),
                                          optional(4), optional(5), rotate, views[6], views[7],
                                          centred, eps, 0);
    });
}
