// quantize_fp8 on the GPU: quantize_rows.cuh, with a scale a row or for each 128 neighbours, which
// are eight threads' units. Bytes: one read of x and one write of q; the copy rate is the limit.
#include "fewstep/cuda/quantize_low.cuh"
#include "fewstep/ops/quantize_fp8.h"

namespace fewstep::cuda {

void quantize_fp8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                  const TensorView* down, const std::string& activation, const TensorView& q,
                  const TensorView& scale, std::int64_t size, const TensorView* low,
                  std::uintptr_t stream) {
    check_quantize_fp8_outputs(x, q, scale, size);
    const std::int64_t K = q.size(1);
    FEWSTEP_CHECK(size == 128 || size >= K, "size: expected 128 or all of a row, got ", size);
    const quantize::Plan plan =
        quantize::make_plan(smooth, rotate, q, scale, x.size(0), K, size == 128 ? 128 : 0);
    quantize::quantize_given<quantize::E4m3>(x, plan, activation, down, low, "quantize_fp8",
                                             as_stream(stream));
}

}  // namespace fewstep::cuda
