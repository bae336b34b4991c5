#include "fewstep/cuda/attention_jvp_backward_sm90_launch.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

template void launch<__nv_bfloat16>(const Launch& how, const Params& p, cudaStream_t stream);

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
