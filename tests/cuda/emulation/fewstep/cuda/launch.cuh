// The names of csrc/include/fewstep/cuda/launch.cuh for a C++ compiler without CUDA.
#pragma once

#include "fewstep/cuda/machine.h"
#include "fewstep/dispatch.h"

namespace fewstep::cuda {

inline cudaStream_t as_stream(std::uintptr_t stream) {
    return stream;
}
template <typename T>
float load(T value) {
    return static_cast<float>(to_acc(value));
}
template <typename T>
T store(float value) {
    return Convert<T>::from(value);
}

template <typename F>
void dispatch_device_float(DType dtype, const char* argument, F&& f) {
    switch (dtype) {
        case DType::kFloat32: f(float{}); return;
        case DType::kFloat16: f(float16{}); return;
        case DType::kBFloat16: f(bfloat16{}); return;
        default:
            FEWSTEP_CHECK(false, argument, ": expected float32, float16 or bfloat16, got ",
                          name(dtype));
    }
}

}  // namespace fewstep::cuda
