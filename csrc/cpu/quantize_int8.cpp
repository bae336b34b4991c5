// quantize_int8 on the CPU: rows are independent; the work on one is fewstep/cpu/quantize_row.h.
#include "fewstep/ops/quantize_int8.h"

#include "fewstep/check.h"
#include "fewstep/cpu/quantize_row.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

template <typename T>
void quantize_rows(const TensorView& x, const TensorView& q, const TensorView& scale) {
    constexpr std::int64_t kWorthThreads = 1 << 15;
    const quantize::RowFunction<T> row = quantize::choose_row<T>();
    const std::int64_t rows = x.size(0), columns = x.size(1);
#pragma omp parallel for schedule(static) if (rows * columns > kWorthThreads)
    for (std::int64_t r = 0; r < rows; ++r) {
        scale.ptr<float>()[r] =
            row(x.ptr<T>() + r * x.stride(0), q.ptr<std::int8_t>() + r * columns, columns);
    }
}

}  // namespace

void quantize_int8(const TensorView& x, const TensorView& q, const TensorView& scale) {
    expect_rows(x, "x", x.dtype, {x.size(0), x.size(1)});
    expect_contiguous(q, "q", DType::kInt8, {x.size(0), x.size(1)});
    expect_contiguous(scale, "scale", DType::kFloat32, {x.size(0)});
    switch (x.dtype) {
        case DType::kFloat32: return quantize_rows<float>(x, q, scale);
        case DType::kBFloat16: return quantize_rows<bfloat16>(x, q, scale);
        case DType::kFloat16: return quantize_rows<float16>(x, q, scale);
        default:
            FEWSTEP_CHECK(false, "x: expected float32, bfloat16 or float16, got ", name(x.dtype));
    }
}

}  // namespace fewstep::cpu
