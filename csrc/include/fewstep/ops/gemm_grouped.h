// gemm_grouped: several products of gemm_w8a8 (int8) or gemm_fp8 (e4m3 as bytes) in one launch, and
// outputs in 8 bits by limits.
//
//   out_i = what gemm_w8a8 or gemm_fp8 makes of problem i, to the bit
//
// Every argument is a list with an entry per problem, those of gemm_w8a8.h in its order; an empty
// list where none has one, and nothing in the place of an entry that is not there. All problems
// have the same N, K and activation.
//
// With limit_i [M_i] float32 out_i is int8, or e4m3 as bytes:
//
//   v = what out_i would be in float32                 q = round(clamp(v (127 / limit), +-127))
//   e4m3: q = round(clamp(v / (limit / 448), +-448))   scale = limit / 127 or limit / 448
//
// to the bit as by quantize_int8 or quantize_fp8 of rows whose largest magnitude is limit; limits
// too small for a normal scale have scale 1 and q 0. scale_i, amax_i = max |v| [M_i] float32 and
// exceeded_i [1] int32, the number of outputs for which |v| <= limit does not hold, are outputs. A
// row with a v or a limit that is not finite has scale NaN, and no particular q.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "fewstep/tensor.h"

namespace fewstep {

using Tensors = std::vector<TensorView>;
using Optionals = std::vector<std::optional<TensorView>>;

// The i-th of them, null where there is none.
inline const TensorView* entry(const Optionals& all, std::size_t i) {
    return all.empty() || !all[i] ? nullptr : &*all[i];
}

namespace cpu {
void gemm_grouped(const Tensors& a, const Optionals& a_scale, const Tensors& w,
                  const Tensors& w_scale, const Optionals& bias, const Optionals& low,
                  const Optionals& up, const Optionals& smooth,
                  const std::vector<std::int64_t>& rotate, const std::string& activation,
                  const Optionals& gate, const Optionals& residual, const Tensors& out);
}
namespace cuda {
// For GPUs of capability 9.0, of at most 8 problems, as gemm_w8a8_sm90 takes them.
void gemm_grouped_sm90(const Tensors& a, const Tensors& a_scale, const Tensors& w,
                       const Tensors& w_scale, const Optionals& bias, const Optionals& low,
                       const Optionals& up, const std::string& activation, const Optionals& gate,
                       const Optionals& residual, const Tensors& limit, const Tensors& scale,
                       const Tensors& amax, const Tensors& exceeded, const Tensors& out,
                       std::uintptr_t stream);
}  // namespace cuda

}  // namespace fewstep
