// token_gather: chosen tokens of every sample side by side, normed and modulated on the way.
//
//   n = x[b, index[b, m]]                                    NaN outside of 0 to N - 1
//   n = (n - mean(n)) (mean((n - mean(n))^2) + eps)^-1/2     with `normed`,
//   y[b, m] = n (1 + scale[b]) + shift[b]                    and then this
//
// x: [B, N, C], floating, unit stride in C. index: [B, M], int32 or int64, contiguous. scale,
// shift: [B, C] like x, unit stride in C, or none (zero); none without `normed`. y: [B, M, C] like
// x, contiguous. On the CPU y has the bits of norm_jvp's y of the gathered rows.
#pragma once

#include "fewstep/check.h"
#include "fewstep/token_index.h"

namespace fewstep {

inline void check_token_gather(const TensorView& x, const TensorView& index,
                               const TensorView* scale, const TensorView* shift,
                               const TensorView& y, bool normed) {
    FEWSTEP_CHECK(x.ndim == 3, "x: expected 3 axes, got ", x.ndim);
    FEWSTEP_CHECK(index.ndim == 2, "index: expected 2 axes, got ", index.ndim);
    const std::int64_t batch = x.size(0), columns = x.size(2);
    expect_rows(x, "x", x.dtype, {batch, x.size(1), columns});
    expect_index(index, "index", batch, index.size(1));
    FEWSTEP_CHECK(normed || (scale == nullptr && shift == nullptr),
                  "scale, shift: expected none without the norm");
    if (scale != nullptr) expect_rows(*scale, "scale", x.dtype, {batch, columns});
    if (shift != nullptr) expect_rows(*shift, "shift", x.dtype, {batch, columns});
    expect_contiguous(y, "y", x.dtype, {batch, index.size(1), columns});
}

namespace cpu {
void token_gather(const TensorView& x, const TensorView& index, const TensorView* scale,
                  const TensorView* shift, const TensorView& y, bool normed, double eps);
}
namespace cuda {
void token_gather(const TensorView& x, const TensorView& index, const TensorView* scale,
                  const TensorView* shift, const TensorView& y, bool normed, double eps,
                  std::uintptr_t stream);
}

}  // namespace fewstep
