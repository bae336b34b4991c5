// Where tokens come from, as int32 or int64: what token_gather and token_scatter read.
#pragma once

#include "fewstep/check.h"
#include "fewstep/tensor.h"

#if defined(__CUDACC__)
#define FEWSTEP_ANYWHERE __host__ __device__
#else
#define FEWSTEP_ANYWHERE
#endif

namespace fewstep {

// One of the two is null.
struct TokenIndex {
    const std::int32_t* narrow = nullptr;
    const std::int64_t* wide = nullptr;

    static TokenIndex of(const TensorView& view) {
        if (view.dtype == DType::kInt64) return {nullptr, view.ptr<const std::int64_t>()};
        return {view.ptr<const std::int32_t>(), nullptr};
    }
    FEWSTEP_ANYWHERE std::int64_t at(std::int64_t i) const {
        return wide != nullptr ? wide[i] : std::int64_t{narrow[i]};
    }
};

inline void expect_index(const TensorView& view, const char* argument, std::int64_t batch,
                         std::int64_t length) {
    const bool wide = view.dtype == DType::kInt64;
    expect_contiguous(view, argument, wide ? DType::kInt64 : DType::kInt32, {batch, length});
}

}  // namespace fewstep
