// The loop of the quantising ops: rows over threads, each prepared (prologue.h), quantised and,
// with a low-rank branch, multiplied (projection.h) while it is in cache.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "fewstep/check.h"
#include "fewstep/cpu/projection.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/thread_scratch.h"

namespace fewstep::cpu::quantize {

// pick(T{}) returns what quantises row r of values in T: a function of (r, const T* row). Prepared
// rows are floats.
template <typename T, typename Pick>
void each_row_of(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                 const TensorView* down, const TensorView* low, const Pick& pick) {
    constexpr std::int64_t kWorthThreads = 1 << 15;
    constexpr std::int64_t kRows = projection::kRows;
    const std::int64_t R = x.size(0), K = x.size(1);
    const prologue::Prologue<T> prepare(smooth, rotate, K);
    const projection::Projection<T> project(x, down);
    FEWSTEP_CHECK((down == nullptr) == (low == nullptr), "low: expected one with down, got ",
                  low == nullptr ? "none" : "one without");
    if (low != nullptr) expect_contiguous(*low, "low", x.dtype, {R, project.rank()});
    const std::int64_t work = R * K * (1 + project.rank());
    const int threads = work > kWorthThreads ? omp_get_max_threads() : 1;
    const ThreadScratch<float> scratch(threads,
                                       std::max(prepare.active() ? K : 0, project.scratch()));
    const auto plain = pick(T{});
    const auto prepared = pick(float{});
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t first = 0; first < R; first += kRows) {
        float* const lent = scratch.of_thread(omp_get_thread_num());
        const int count = static_cast<int>(std::min(kRows, R - first));
        for (std::int64_t r = first; r < first + count; ++r) {
            const T* const row = x.ptr<T>() + r * x.stride(0);
            if (prepare.active()) {
                prepare.apply(row, lent);
                prepared(r, lent);
            } else {
                plain(r, row);
            }
        }
        if (low == nullptr) continue;
        project(first, count, lent, [&](std::int64_t r, std::int64_t i, T value) {
            low->ptr<T>()[r * project.rank() + i] = value;
        });
    }
}

template <typename Pick>
void each_row(const TensorView& x, const char* argument, const TensorView* smooth,
              std::int64_t rotate, const TensorView* down, const TensorView* low,
              const Pick& pick) {
    switch (x.dtype) {
        case DType::kFloat32: return each_row_of<float>(x, smooth, rotate, down, low, pick);
        case DType::kBFloat16: return each_row_of<bfloat16>(x, smooth, rotate, down, low, pick);
        case DType::kFloat16: return each_row_of<float16>(x, smooth, rotate, down, low, pick);
        default:
            FEWSTEP_CHECK(false, argument, ": expected float32, bfloat16 or float16, got ",
                          name(x.dtype));
    }
}

}  // namespace fewstep::cpu::quantize
