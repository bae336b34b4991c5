// quantize_int8 on the CPU: rows are independent; the work on one is fewstep/cpu/quantize_row.h.
#include "fewstep/ops/quantize_int8.h"

#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/quantize_rows.h"

namespace fewstep::cpu {

void quantize_int8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                   const TensorView* down, const std::string& activation, const TensorView& q,
                   const TensorView& scale, const TensorView* low) {
    const std::int64_t R = x.size(0), K = q.size(1);
    check_activated_rows(x, activation, K);
    expect_contiguous(q, "q", DType::kInt8, {R, K});
    expect_contiguous(scale, "scale", DType::kFloat32, {R});
    const quantize::Steps steps{smooth, rotate, activation, down, low};
    quantize::each_row(x, "x", K, steps, [&](auto tag) {
        return [&, row = quantize::choose_row<decltype(tag)>()](std::int64_t r,
                                                                const decltype(tag)* values) {
            scale.ptr<float>()[r] = row(values, q.ptr<std::int8_t>() + r * K, K);
        };
    });
}

}  // namespace fewstep::cpu
