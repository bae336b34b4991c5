// The part of DLPack's C exchange table that reads a tensor: after it, a view costs one call of a C
// function instead of four attributes in Python. Names and layout are those of DLPack 1.3, an ABI
// that stays within a major version; torch offers the table as Tensor.__dlpack_c_exchange_api__.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fewstep/tensor.h"

namespace fewstep::dlpack {

constexpr const char* kCapsule = "dlpack_exchange_api";
constexpr std::uint32_t kMajor = 1;

struct Device {
    std::int32_t type, id;
};

struct DataType {
    std::uint8_t code, bits;
    std::uint16_t lanes;
};

struct Tensor {
    void* data;
    Device device;
    std::int32_t ndim;
    DataType dtype;
    std::int64_t* shape;
    std::int64_t* strides;
    std::uint64_t byte_offset;
};

struct Version {
    std::uint32_t major, minor;
};

// Functions that are not called here keep their place as plain pointers.
struct ExchangeTable {
    Version version;
    ExchangeTable* previous;
    void* allocate;
    void* managed_from_object;
    void* managed_to_object;
    int (*tensor_from_object)(void* object, Tensor* out);  // 0, or -1 with a Python exception set
    void* current_stream;
};

inline DType dtype(DataType type) {
    const int code = type.lanes == 1 ? type.code * 256 + type.bits : -1;
    switch (code) {
        case 0 * 256 + 8: return DType::kInt8;
        case 0 * 256 + 32: return DType::kInt32;
        case 0 * 256 + 64: return DType::kInt64;
        case 1 * 256 + 8: return DType::kUInt8;
        case 2 * 256 + 16: return DType::kFloat16;
        case 2 * 256 + 32: return DType::kFloat32;
        case 2 * 256 + 64: return DType::kFloat64;
        case 4 * 256 + 16: return DType::kBFloat16;
        case 6 * 256 + 8: return DType::kBool;
        default:
            FEWSTEP_CHECK(false,
                          "dtype: expected float64, float32, bfloat16, float16, int8, "
                          "uint8, int32, int64 or bool, got DLPack code ",
                          int{type.code}, " of ", int{type.bits}, " bits");
    }
}

inline TensorView view(const Tensor& tensor) {
    FEWSTEP_CHECK(tensor.ndim <= kMaxDims, "expected a tensor of at most ", kMaxDims,
                  " dimensions, got ", tensor.ndim);
    TensorView view;
    view.data = reinterpret_cast<std::uintptr_t>(tensor.data) + tensor.byte_offset;
    view.dtype = dtype(tensor.dtype);
    view.ndim = tensor.ndim;
    std::copy_n(tensor.shape, tensor.ndim, view.sizes.begin());
    std::copy_n(tensor.strides, tensor.ndim, view.strides.begin());
    return view;
}

}  // namespace fewstep::dlpack
