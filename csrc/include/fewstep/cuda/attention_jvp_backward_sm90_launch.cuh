// The choice among attention_jvp_backward's Hopper kernels for one storage type; each file of
// csrc/cuda/attention_jvp_backward_sm90/ instantiates it for one.
#pragma once

#include "fewstep/cuda/attention_jvp_backward_sm90.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

template <class C>
void launch_config(const Launch& how, const Params& p, cudaStream_t stream) {
    launch_kernel(attention_jvp_backward_sm90_kernel<C>, "attention_jvp_backward_sm90",
                  p.grid.blocks(how.batches), kThreads, C::kSharedBytes, stream, p);
}

template <typename T, Pass kPass>
void launch_pass(const Launch& how, const Params& p, cudaStream_t stream) {
    if (how.width == 64) {
        if (how.masked) return launch_config<Config<T, 64, kPass, true>>(how, p, stream);
        return launch_config<Config<T, 64, kPass, false>>(how, p, stream);
    }
    if (how.masked) return launch_config<Config<T, 128, kPass, true>>(how, p, stream);
    launch_config<Config<T, 128, kPass, false>>(how, p, stream);
}

template <typename T>
void launch(const Launch& how, const Params& p, cudaStream_t stream) {
    switch (how.pass) {
        case Pass::kQueries: return launch_pass<T, Pass::kQueries>(how, p, stream);
        case Pass::kKeys: return launch_pass<T, Pass::kKeys>(how, p, stream);
        case Pass::kValues: return launch_pass<T, Pass::kValues>(how, p, stream);
    }
}

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
