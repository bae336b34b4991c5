// token_scatter: rows of value where a map of the tokens says so, base elsewhere.
//
//   p = position[b, n]
//   y[b, n] = base[b, n]                                     where p < 0
//   y[b, n] = [base[b, n] +] gate[b] value[b, p]             where 0 <= p < M; NaN beyond
//
// value: [B, M, C], floating, unit stride in C. position: [B, N], int32 or int64, contiguous. base
// and y: [B, N, C] like value, unit stride in C; without base y is it, and is changed in place.
// gate: [B, C] like value, unit stride in C, or none (one). Base is added with `residual`.
#pragma once

#include "fewstep/check.h"
#include "fewstep/token_index.h"

namespace fewstep {

inline void check_token_scatter(const TensorView& value, const TensorView& position,
                                const TensorView* base, const TensorView* gate,
                                const TensorView& y) {
    FEWSTEP_CHECK(value.ndim == 3, "value: expected 3 axes, got ", value.ndim);
    FEWSTEP_CHECK(y.ndim == 3, "y: expected 3 axes, got ", y.ndim);
    const std::int64_t batch = value.size(0), columns = value.size(2), tokens = y.size(1);
    expect_rows(value, "value", value.dtype, {batch, value.size(1), columns});
    expect_index(position, "position", batch, tokens);
    expect_rows(y, "y", value.dtype, {batch, tokens, columns});
    if (base != nullptr) expect_rows(*base, "base", value.dtype, {batch, tokens, columns});
    if (gate != nullptr) expect_rows(*gate, "gate", value.dtype, {batch, columns});
}

namespace cpu {
void token_scatter(const TensorView& value, const TensorView& position, const TensorView* base,
                   const TensorView* gate, const TensorView& y, bool residual);
}
namespace cuda {
void token_scatter(const TensorView& value, const TensorView& position, const TensorView* base,
                   const TensorView* gate, const TensorView& y, bool residual,
                   std::uintptr_t stream);
}

}  // namespace fewstep
