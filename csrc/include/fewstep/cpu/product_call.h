// What the products with 8-bit activations do alike around their loops: arguments checked, outputs
// of any dtype, int8 rows of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/large_pages.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/quantize_row.h"
#include "fewstep/dispatch.h"
#include "fewstep/product_arguments.h"

namespace fewstep::cpu::product {

// What has a row per row of a, with its leading axes as one: [..., M, K] as [M, K].
class Rows {
  public:
    Rows(const TensorView& a, const TensorView* a_scale, const TensorView* scale,
         const TensorView& out)
        : a(collapse(a, "a", 2)),
          out(collapse(out, "out", 2)),
          a_scale(keep(a_scale, "a_scale", a_scale_)),
          scale(keep(scale, "scale", scale_)) {}
    Rows(const Rows&) = delete;
    Rows& operator=(const Rows&) = delete;

  private:
    static const TensorView* keep(const TensorView* given, const char* argument, TensorView& one) {
        if (given == nullptr) return nullptr;
        one = collapse(*given, argument, 1);
        return &one;
    }
    TensorView a_scale_, scale_;

  public:
    const TensorView a, out;
    const TensorView* const a_scale;
    const TensorView* const scale;
};

// Where the product goes: out, or with a scale per row int8 of what out would be in `rounded`.
struct Destination {
    const TensorView& out;
    const TensorView* scale;
    DType rounded;
};

// Checks all but the weight, the scales of a, the branch and what follows the sums, which leaves
// `width` of the N columns. `stored` is the dtype of activations that are quantised already.
inline Destination expect_arguments(const ProductArguments& given, DType stored, std::int64_t N,
                                    std::int64_t width) {
    const TensorView &a = given.a, &out = given.out;
    const std::int64_t M = out.size(0), K = a.size(1);
    FEWSTEP_CHECK((a.dtype == stored) == (given.a_scale != nullptr), "a_scale: expected one with ",
                  name(stored), " a and none with floating a, got ",
                  given.a_scale == nullptr ? "none" : "one", " with ", name(a.dtype));
    FEWSTEP_CHECK(given.a_scale == nullptr || (given.smooth == nullptr && given.rotate == 0),
                  "smooth, rotate: expected none with ", name(stored), " a, got one");
    expect_rows(a, "a", a.dtype, {M, K});
    if (given.bias != nullptr) expect_contiguous(*given.bias, "bias", given.bias->dtype, {N});
    Destination to{out, given.scale, out.dtype};
    if (given.scale != nullptr) {
        expect_contiguous(*given.scale, "scale", DType::kFloat32, {M});
        to.rounded = a.dtype == stored ? DType::kBFloat16 : a.dtype;
    }
    expect_contiguous(out, "out", given.scale == nullptr ? out.dtype : DType::kInt8, {M, width});
    return to;
}

// The bias in float32; empty without one.
inline std::vector<float> widen_bias(const TensorView* bias, std::int64_t N) {
    std::vector<float> wide(bias == nullptr ? 0 : static_cast<std::size_t>(N));
    if (bias != nullptr) widen(*bias, "bias", 0, N, wide.data());
    return wide;
}

// What becomes of whole rows of out: int8 and a scale, or nothing.
template <typename Out>
struct Quantized {
    std::int8_t* q = nullptr;
    float* scale = nullptr;
};

// For all threads of a parallel region, when out is there.
template <typename Out>
void quantize_rows(const Out* out, const Quantized<Out>& quantized, std::int64_t M,
                   std::int64_t width) {
    if (quantized.q == nullptr) return;
    const quantize::RowFunction<Out> quantize_row = quantize::choose_row<Out>();
#pragma omp for schedule(static)
    for (std::int64_t m = 0; m < M; ++m) {
        quantized.scale[m] = quantize_row(out + m * width, quantized.q + m * width, width);
    }
}

// Calls run(Out* out, Quantized<Out>) where `out` has M rows of `width`.
template <typename Run>
void run_into(const Destination& to, std::int64_t M, std::int64_t width, const Run& run) {
    const auto call = [&](auto tag) {
        using Out = decltype(tag);
        const auto bytes = M * width * static_cast<std::int64_t>(sizeof(Out));
        if (to.scale == nullptr) {
            advise_large_pages(to.out.ptr<Out>(), bytes);
            return run(to.out.ptr<Out>(), Quantized<Out>{});
        }
        const std::unique_ptr<Out[]> rows(new Out[static_cast<std::size_t>(M * width)]);
        advise_large_pages(rows.get(), bytes);
        run(rows.get(), Quantized<Out>{to.out.ptr<std::int8_t>(), to.scale->ptr<float>()});
    };
    switch (to.rounded) {
        case DType::kFloat32: return call(float{});
        case DType::kBFloat16: return call(bfloat16{});
        case DType::kFloat16: return call(float16{});
        default:
            FEWSTEP_CHECK(false, "out: expected float32, bfloat16 or float16, got ",
                          name(to.rounded));
    }
}

}  // namespace fewstep::cpu::product
