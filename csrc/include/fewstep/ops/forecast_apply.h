// forecast_apply: a weighted sum of snapshots, and what it is added to, in one pass.
//
//   y = base + sum_k w_k * scale_k * code_k        in the order of k, base last
//
// snapshots, scale: slot.h, with K slots. weights: float32 (float64 with float64 snapshots),
// contiguous: [K]; [B, K], a row a sample; or with `step`, int64 of one element, [T, K], of which
// row `step` is taken, and NaN outside the table. A snapshot whose weight is 0 is not read.
// base: [B, R, C], floating, unit stride in C, or none. y: [B, R, C] floating, contiguous.
// float64 is either all of snapshots, weights, base and y or none of them.
#pragma once

#include "fewstep/slot.h"

namespace fewstep {

inline void check_forecast_apply(const TensorView& snapshots, const TensorView& weights,
                                 const TensorView* base, const TensorView* scale,
                                 const TensorView* step, std::int64_t group, const TensorView& y) {
    const std::int64_t batch = y.size(0), rows = y.size(1), columns = y.size(2);
    const bool wide = snapshots.dtype == DType::kFloat64;
    check_slots(snapshots, scale, group, batch, rows, columns);
    expect_contiguous(y, "y", y.dtype, {batch, rows, columns});
    FEWSTEP_CHECK((y.dtype == DType::kFloat64) == wide, "y: expected float64 just with float64 ",
                  "snapshots, got ", name(y.dtype));
    const DType acc = wide ? DType::kFloat64 : DType::kFloat32;
    const std::int64_t slots = snapshots.size(0);
    if (step != nullptr) {
        expect_contiguous(*step, "step", DType::kInt64, {1});
        expect_contiguous(weights, "weights", acc, {weights.size(0), slots});
    } else if (weights.ndim == 2) {
        expect_contiguous(weights, "weights", acc, {batch, slots});
    } else {
        expect_contiguous(weights, "weights", acc, {slots});
    }
    if (base == nullptr) return;
    expect_rows(*base, "base", base->dtype, {batch, rows, columns});
    FEWSTEP_CHECK((base->dtype == DType::kFloat64) == wide,
                  "base: expected float64 just with float64 snapshots, got ", name(base->dtype));
}

namespace cpu {
void forecast_apply(const TensorView& snapshots, const TensorView& weights, const TensorView* base,
                    const TensorView* scale, const TensorView* step, std::int64_t group,
                    const TensorView& y);
}
namespace cuda {
void forecast_apply(const TensorView& snapshots, const TensorView& weights, const TensorView* base,
                    const TensorView* scale, const TensorView* step, std::int64_t group,
                    const TensorView& y, std::uintptr_t stream);
}

}  // namespace fewstep
