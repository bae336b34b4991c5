// quantize_int8 on the CPU: rows are independent; the work on one is fewstep/cpu/quantize_row.h.
#include "fewstep/ops/quantize_int8.h"

#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/quantize_rows.h"

namespace fewstep::cpu {

void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const TensorView& q, const TensorView& scale,
                   const TensorView* low) {
    const std::int64_t R = x.size(0), K = x.size(1);
    expect_rows(x, "x", x.dtype, {R, K});
    expect_contiguous(q, "q", DType::kInt8, {R, K});
    expect_contiguous(scale, "scale", DType::kFloat32, {R});
    quantize::each_row(x, "x", smooth, rotate, down, low, [&](auto tag) {
        return [&, row = quantize::choose_row<decltype(tag)>()](std::int64_t r,
                                                                const decltype(tag)* values) {
            scale.ptr<float>()[r] = row(values, q.ptr<std::int8_t>() + r * K, K);
        };
    });
}

}  // namespace fewstep::cpu
