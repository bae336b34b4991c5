// gemm_w4a8 on Hopper: the kernel of csrc/include/fewstep/cuda/gemm4_sm90.cuh.
#include "fewstep/cuda/gemm4_launch_sm90.cuh"
#include "fewstep/ops/gemm_w4a8.h"

namespace fewstep::cuda {

void gemm_w4a8_sm90(const TensorView& a, const TensorView* a_scale, const TensorView& w,
                    const TensorView& w_scale, const TensorView* bias, const TensorView* low,
                    const TensorView* up, const TensorView* smooth, std::int64_t rotate,
                    const std::string& activation, const TensorView* gate,
                    const TensorView* residual, const TensorView* scale, const TensorView& out,
                    std::uintptr_t stream) {
    gemm4::run({a, a_scale, w, w_scale, bias, low, up, smooth, rotate, activation, gate, residual,
                scale, out},
               as_stream(stream));
}

}  // namespace fewstep::cuda
