// gemv_w4a16_grouped: gemm_w4a16 of several weights for few rows, in one launch.
//
//   out_g[m][n] = sum_k x_g[m][k] (q_g[n][k] s_g[n][k / G]) + bias_g[n]     rounded to x's dtype
//
// x [X, M, K] float32, bfloat16 or float16, unit stride in K: X is 1, and x[0] serves all problems,
// or their number. w[g] [N_g, K / 2] uint8, w_scale[g] [N_g, K / G] bfloat16 or float16 and
// bias[g] [N_g] floating or [0] for none, as gemm_w4a16 has them, contiguous; K and G are those of
// all. out: [M * sum of N_g] of x's dtype: each problem's [M, N_g], one after the other.
//
// The CPU's outputs are those of gemm_w4a16 to the bit.
#pragma once

#include <vector>

#include "fewstep/check.h"
#include "fewstep/tensor.h"

namespace fewstep {

using Views = std::vector<TensorView>;

constexpr std::int64_t kMaxGemvRows = 8;

// Refuses problems that don't fit each other; returns the sum of N_g.
inline std::int64_t check_gemv_w4a16_grouped(const TensorView& x, const Views& w,
                                             const Views& w_scale, const Views& bias,
                                             const TensorView& out) {
    const std::size_t count = w.size();
    FEWSTEP_CHECK(count > 0, "w: expected at least one weight, got none");
    const std::int64_t problems = static_cast<std::int64_t>(count);
    expect_rows(x, "x", x.dtype, {x.size(0), x.size(1), x.size(2)});
    FEWSTEP_CHECK(x.size(0) == 1 || x.size(0) == problems, "x: expected 1 or ", count,
                  " inputs, got ", x.size(0));
    FEWSTEP_CHECK(w_scale.size() == count && bias.size() == count, "w_scale, bias: expected ",
                  count, " tensors each, got ", w_scale.size(), " and ", bias.size());
    const std::int64_t M = x.size(1), K = x.size(2), groups = w_scale[0].size(1);
    FEWSTEP_CHECK(M <= kMaxGemvRows, "x: expected at most ", kMaxGemvRows, " rows, got ", M);
    FEWSTEP_CHECK(K == 0 ? groups == 0 : groups > 0 && K % (32 * groups) == 0,
                  "w_scale: expected [N, K / G] with G a multiple of 32 and K = ", K, ", got ",
                  groups, " groups");
    const DType scales = w_scale[0].dtype;
    FEWSTEP_CHECK(scales == DType::kBFloat16 || scales == DType::kFloat16,
                  "w_scale: expected bfloat16 or float16, got ", name(scales));
    std::int64_t total = 0;
    for (std::size_t g = 0; g < count; ++g) {
        const std::int64_t N = w[g].size(0);
        expect_contiguous(w[g], "w", DType::kUInt8, {N, K / 2});
        expect_contiguous(w_scale[g], "w_scale", scales, {N, groups});
        if (bias[g].numel() > 0) expect_contiguous(bias[g], "bias", bias[g].dtype, {N});
        total += N;
    }
    expect_contiguous(out, "out", x.dtype, {M * total});
    return total;
}

namespace cpu {
void gemv_w4a16_grouped(const TensorView& x, const Views& w, const Views& w_scale,
                        const Views& bias, const TensorView& out);
}
namespace cuda {
void gemv_w4a16_grouped(const TensorView& x, const Views& w, const Views& w_scale,
                        const Views& bias, const TensorView& out, std::uintptr_t stream);
}

}  // namespace fewstep
