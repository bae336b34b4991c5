// gemv_w4a16_grouped on GPUs from sm_80 on: csrc/include/fewstep/cuda/gemv_w4a16.cuh.
#include "fewstep/cuda/gemv_w4a16_launch.cuh"

namespace fewstep::cuda {

void gemv_w4a16_grouped(const TensorView& x, const Views& w, const Views& w_scale,
                        const Views& bias, const TensorView& out, std::uintptr_t stream) {
    gemv::run(x, w, w_scale, bias, out, as_stream(stream));
}

}  // namespace fewstep::cuda
