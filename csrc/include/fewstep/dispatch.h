// Run-time dtype to compile-time type. `dispatch_float(dtype, "x", f)` calls f with a value of the
// storage type; dtypes outside the list are refused with the argument's name.
#pragma once

#include "fewstep/numeric.h"
#include "fewstep/tensor.h"

namespace fewstep {

inline const char* name(DType dtype) {
    switch (dtype) {
        case DType::kFloat64: return "float64";
        case DType::kFloat32: return "float32";
        case DType::kBFloat16: return "bfloat16";
        case DType::kFloat16: return "float16";
        case DType::kInt8: return "int8";
        case DType::kUInt8: return "uint8";
        case DType::kInt32: return "int32";
        case DType::kInt64: return "int64";
        case DType::kBool: return "bool";
    }
    return "unknown";
}

template <typename F>
void dispatch_float(DType dtype, const char* argument, F&& f) {
    switch (dtype) {
        case DType::kFloat64: f(double{}); return;
        case DType::kFloat32: f(float{}); return;
        case DType::kBFloat16: f(bfloat16{}); return;
        case DType::kFloat16: f(float16{}); return;
        default:
            FEWSTEP_CHECK(false, argument, ": expected float64, float32, bfloat16 or float16, got ",
                          name(dtype));
    }
}

}  // namespace fewstep
