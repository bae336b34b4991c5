// What token_gather and token_scatter do with rows of tokens: neighbours in one load, of 16 bytes
// where all rows are at multiples of it.
#pragma once

#include <cmath>

#include "fewstep/cuda/lanes.cuh"
#include "fewstep/token_index.h"

namespace fewstep::cuda {

constexpr int kTokenThreads = 256;

// kVec neighbours of a storage type.
template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Neighbours {
    T values[kVec];

    __device__ static Neighbours at(const T* from) {
        return *reinterpret_cast<const Neighbours*>(from);
    }
    __device__ static Neighbours of(float x) {
        Neighbours all;
#pragma unroll
        for (int i = 0; i < kVec; ++i) all.values[i] = store<T>(x);
        return all;
    }
    __device__ void put(T* to) const { *reinterpret_cast<Neighbours*>(to) = *this; }
};

// [B, N, C] with unit stride in C; a row for each sample, [B, C], has N of 1. Null where absent.
template <typename T>
struct TokenRows {
    T* data = nullptr;
    std::int64_t stride_b = 0, stride_n = 0;

    static TokenRows of(const TensorView* view) {
        if (view == nullptr) return {};
        return {view->ptr<T>(), view->stride(0), view->ndim == 3 ? view->stride(1) : 0};
    }
    __device__ T* at(std::int64_t b, std::int64_t n) const {
        return data + b * stride_b + n * stride_n;
    }
    bool is_aligned() const {
        constexpr std::int64_t kUnit = 16 / sizeof(T);
        return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_b % kUnit == 0 &&
               stride_n % kUnit == 0;
    }
};

}  // namespace fewstep::cuda
