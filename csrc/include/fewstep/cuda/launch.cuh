// Launch helpers: error checks that name the kernel, the stream type, and dtype conversion on the
// device. Every kernel launch is followed by FEWSTEP_LAUNCH_CHECK.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "fewstep/dispatch.h"
#include "fewstep/tensor.h"

#define FEWSTEP_LAUNCH_CHECK(kernel)                                                               \
    do {                                                                                           \
        const cudaError_t status = cudaGetLastError();                                             \
        if (status != cudaSuccess) {                                                               \
            throw std::runtime_error(::fewstep::detail::concat("fewstep: launching ", kernel,      \
                                                               ": ", cudaGetErrorString(status))); \
        }                                                                                          \
    } while (false)

namespace fewstep::cuda {

inline cudaStream_t as_stream(std::uintptr_t stream) {
    return reinterpret_cast<cudaStream_t>(stream);
}

__device__ inline float load(float value) {
    return value;
}
__device__ inline double load(double value) {
    return value;
}
__device__ inline float load(__half value) {
    return __half2float(value);
}
__device__ inline float load(__nv_bfloat16 value) {
    return __bfloat162float(value);
}

template <typename T>
__device__ inline T store(float value);
template <>
__device__ inline float store<float>(float value) {
    return value;
}
template <>
__device__ inline double store<double>(float value) {
    return value;
}
template <>
__device__ inline __half store<__half>(float value) {
    return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 store<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}

// Calls f with a value of the device storage type; float64 is not offered on the GPU.
template <typename F>
void dispatch_device_float(DType dtype, const char* argument, F&& f) {
    switch (dtype) {
        case DType::kFloat32: f(float{}); return;
        case DType::kFloat16: f(__half{}); return;
        case DType::kBFloat16: f(__nv_bfloat16{}); return;
        default:
            FEWSTEP_CHECK(false, argument, ": expected float32, float16 or bfloat16, got ",
                          name(dtype));
    }
}

}  // namespace fewstep::cuda
