// What the products with 8-bit activations are called with on every device, in the order of their
// contracts (csrc/include/fewstep/ops/gemm_w8a8.h). Null stands for what is not there.
#pragma once

#include <cstdint>
#include <string>

#include "fewstep/tensor.h"

namespace fewstep {

struct ProductArguments {
    const TensorView& a;
    const TensorView* a_scale;
    const TensorView& w;
    const TensorView& w_scale;
    const TensorView* bias;
    const TensorView* low;
    const TensorView* up;
    const TensorView* smooth;
    std::int64_t rotate;
    const std::string& activation;
    const TensorView* gate;
    const TensorView* residual;
    const TensorView* scale;  // of int8 outputs
    const TensorView& out;
};

}  // namespace fewstep
