// cache_metric: relative L1 change of two hidden states in one pass, and the residual to store.
//
//   r = x - y
//   metric = sum |r - previous| / sum |previous|    with `previous`
//   metric = sum |r| / sum |y|                      without
//
// x, y, previous, residual: [B, R, C], unit stride in C, one floating dtype.
// partials: [B, ceil(R * C / kCacheMetricChunk), 2] float64, contiguous: numerator and denominator
// of each chunk. metric: [B] (one per sample) or [1] (all samples together), contiguous, float32
// (float64 for float64 inputs). 0 / 0 is 0. Chunks are summed in a fixed order, so the result does
// not depend on the number of threads or on scheduling.
#pragma once

#include "fewstep/check.h"
#include "fewstep/tensor.h"

namespace fewstep {

constexpr std::int64_t kCacheMetricChunk = 16384;

inline void check_cache_metric(const TensorView& x, const TensorView& y, const TensorView* previous,
                               const TensorView* residual, const TensorView& partials,
                               const TensorView& metric) {
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    const std::int64_t chunks = (rows * columns + kCacheMetricChunk - 1) / kCacheMetricChunk;
    expect_rows(x, "x", x.dtype, {batch, rows, columns});
    expect_rows(y, "y", x.dtype, {batch, rows, columns});
    if (previous != nullptr) expect_rows(*previous, "previous", x.dtype, {batch, rows, columns});
    if (residual != nullptr) expect_rows(*residual, "residual", x.dtype, {batch, rows, columns});
    expect_contiguous(partials, "partials", DType::kFloat64, {batch, chunks, 2});
    const bool wide = x.dtype == DType::kFloat64;
    expect_contiguous(metric, "metric", wide ? DType::kFloat64 : DType::kFloat32,
                      {metric.size(0) == 1 ? 1 : batch});
}

namespace cpu {
void cache_metric(const TensorView& x, const TensorView& y, const TensorView* previous,
                  const TensorView* residual, const TensorView& partials, const TensorView& metric);
}
namespace cuda {
void cache_metric(const TensorView& x, const TensorView& y, const TensorView* previous,
                  const TensorView* residual, const TensorView& partials, const TensorView& metric,
                  std::uintptr_t stream);
}

}  // namespace fewstep
