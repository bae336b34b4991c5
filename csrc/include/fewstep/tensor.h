// What a kernel sees of a tensor: a pointer, a dtype, sizes and strides (in elements).
// No framework type appears anywhere under csrc/; Python builds these views in `_native.py`.
#pragma once

#include <array>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

namespace fewstep {

enum class DType : int {
    kFloat64,
    kFloat32,
    kBFloat16,
    kFloat16,
    kInt8,
    kUInt8,
    kInt32,
    kInt64,
    kBool,
};

constexpr int kMaxDims = 5;

struct TensorView {
    std::uintptr_t data = 0;
    DType dtype = DType::kFloat32;
    int ndim = 0;
    std::array<std::int64_t, kMaxDims> sizes{};
    std::array<std::int64_t, kMaxDims> strides{};

    template <typename T>
    T* ptr() const {
        return reinterpret_cast<T*>(data);
    }
    std::int64_t size(int dim) const { return sizes[dim]; }
    std::int64_t stride(int dim) const { return strides[dim]; }
    std::int64_t numel() const {
        std::int64_t n = 1;
        for (int i = 0; i < ndim; ++i) n *= sizes[i];
        return n;
    }
};

namespace detail {
template <typename... Parts>
std::string concat(const Parts&... parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}
}  // namespace detail

}  // namespace fewstep

// Host-side check with a message built from values: name, expected, got. Becomes a ValueError.
#define FEWSTEP_CHECK(condition, ...)                                                         \
    do {                                                                                      \
        if (!(condition)) {                                                                   \
            throw std::invalid_argument(::fewstep::detail::concat("fewstep: ", __VA_ARGS__)); \
        }                                                                                     \
    } while (false)
