// What a ring's slots hold (slot.h) on the device: kVec neighbours in one load, as floats.
#pragma once

#include "fewstep/cuda/launch.cuh"
#include "fewstep/slot.h"

namespace fewstep::cuda {

// kVec values of a storage type side by side, in loads of 16 bytes where there are as many.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Pack {
    T values[kVec];

    __device__ float get(int i) const { return load(values[i]); }
};
template <int kVec>
struct alignas(kVec) Pack<std::int8_t, kVec> {
    std::int8_t values[kVec];

    __device__ float get(int i) const { return static_cast<float>(values[i]); }
};
// A code as the bits of float16 with the exponent 8 too small: 2^8 makes up for it, of subnormals
// too. 480, which is beyond e4m3, is what becomes of NaN.
template <int kVec>
struct alignas(kVec) Pack<e4m3, kVec> {
    std::uint8_t values[kVec];

    __device__ float get(int i) const {
        const unsigned q = values[i];
        const __half_raw raw{static_cast<unsigned short>((q & 0x7f) << 7 | (q & 0x80) << 8)};
        const float value = __half2float(__half(raw)) * 256.0f;
        return fabsf(value) > 448.0f ? __int_as_float(0x7fffffff) : value;
    }
};
template <int kVec>
struct alignas(kVec / 2) Pack<int4x2, kVec> {
    std::uint8_t values[kVec / 2];

    __device__ float get(int i) const {
        const int nibble = values[i / 2] >> i % 2 * 4 & 15;
        return static_cast<float>((nibble ^ 8) - 8);
    }
};

// Values in a unit of a type: where to find value i of a contiguous run.
template <typename S>
constexpr int kPerUnit = 1;
template <>
inline constexpr int kPerUnit<int4x2> = 2;

// f of a value of the ring's type.
template <typename F>
void dispatch_slot(const TensorView& ring, std::int64_t columns, F&& f) {
    switch (slot_kind(ring, columns)) {
        case SlotKind::kInt8: f(std::int8_t{}); return;
        case SlotKind::kE4m3: f(e4m3{}); return;
        case SlotKind::kInt4: f(int4x2{}); return;
        default: dispatch_device_float(ring.dtype, "snapshots", f);
    }
}

// Rows of a [B, R, C] view of any floating type. The type is asked for at run time: the question
// is the same for all threads, and kernels for all combinations of types would be too many.
struct FloatRows {
    const void* data = nullptr;
    DType dtype = DType::kFloat32;
    std::int64_t stride_b = 0, stride_r = 0;

    static FloatRows from(const TensorView* view) {
        if (view == nullptr) return {};
        return {view->ptr<void>(), view->dtype, view->stride(0), view->stride(1)};
    }
    template <int kVec>
    bool aligned() const {
        return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_b % kVec == 0 &&
               stride_r % kVec == 0;
    }
    __device__ std::int64_t at(std::int64_t b, std::int64_t row, std::int64_t col) const {
        return b * stride_b + row * stride_r + col;
    }
};

template <typename T, int kVec>
__device__ inline void read(const void* data, std::int64_t i, float (&values)[kVec]) {
    const auto pack = *reinterpret_cast<const Pack<T, kVec>*>(static_cast<const T*>(data) + i);
#pragma unroll
    for (int j = 0; j < kVec; ++j) values[j] = pack.get(j);
}
template <int kVec>
__device__ inline void read(const FloatRows& rows, std::int64_t i, float (&values)[kVec]) {
    switch (rows.dtype) {
        case DType::kFloat32: return read<float>(rows.data, i, values);
        case DType::kFloat16: return read<__half>(rows.data, i, values);
        default: return read<__nv_bfloat16>(rows.data, i, values);
    }
}

template <typename T, int kVec>
__device__ inline void write(void* data, std::int64_t i, const float (&values)[kVec]) {
    Pack<T, kVec> pack;
#pragma unroll
    for (int j = 0; j < kVec; ++j) pack.values[j] = store<T>(values[j]);
    *reinterpret_cast<Pack<T, kVec>*>(static_cast<T*>(data) + i) = pack;
}
template <int kVec>
__device__ inline void write(void* data, DType dtype, std::int64_t i, const float (&values)[kVec]) {
    switch (dtype) {
        case DType::kFloat32: return write<float>(data, i, values);
        case DType::kFloat16: return write<__half>(data, i, values);
        default: return write<__nv_bfloat16>(data, i, values);
    }
}

inline void expect_device_float(const TensorView& view, const char* argument) {
    dispatch_device_float(view.dtype, argument, [](auto) {});
}

}  // namespace fewstep::cuda
