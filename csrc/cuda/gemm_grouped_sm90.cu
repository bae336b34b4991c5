// gemm_grouped on Hopper: the kernel of csrc/include/fewstep/cuda/gemm8_sm90.cuh over the tiles of
// several products, for int8 and e4m3, with floating outputs and with 8-bit ones.
#include "fewstep/cuda/gemm8_group_sm90.cuh"
#include "fewstep/ops/gemm_grouped.h"

namespace fewstep::cuda {

void gemm_grouped_sm90(const Tensors& a, const Tensors& a_scale, const Tensors& w,
                       const Tensors& w_scale, const Optionals& bias, const Optionals& low,
                       const Optionals& up, const std::string& activation, const Optionals& gate,
                       const Optionals& residual, const Tensors& limit, const Tensors& scale,
                       const Tensors& amax, const Tensors& exceeded, const Tensors& out,
                       std::uintptr_t stream) {
    const std::size_t count = out.size();
    for (const Tensors* const all : {&a, &a_scale, &w, &w_scale}) {
        FEWSTEP_CHECK(all->size() == count, "a, a_scale, w, w_scale: expected ", count,
                      " tensors each, got ", all->size());
    }
    for (const Optionals* const all : {&bias, &low, &up, &gate, &residual}) {
        FEWSTEP_CHECK(all->empty() || all->size() == count,
                      "bias, low, up, gate, residual: expected ", count, " or none, got ",
                      all->size());
    }
    for (const Tensors* const all : {&limit, &scale, &amax, &exceeded}) {
        FEWSTEP_CHECK(all->size() == (limit.empty() ? 0 : count),
                      "limit, scale, amax, exceeded: expected ", count, " or none, got ",
                      all->size());
    }
    std::vector<ProductArguments> products;
    std::vector<gemm8::Limits> limits;
    for (std::size_t i = 0; i < count; ++i) {
        products.push_back({a[i], &a_scale[i], w[i], w_scale[i], entry(bias, i), entry(low, i),
                            entry(up, i), nullptr, 0, activation, entry(gate, i),
                            entry(residual, i), limit.empty() ? nullptr : &scale[i], out[i]});
        if (!limit.empty()) limits.push_back({limit[i], amax[i], exceeded[i]});
    }
    if (count == 0) return;
    if (a[0].dtype == DType::kInt8) {
        gemm8::run<std::int8_t>(products, limits, as_stream(stream));
    } else {
        gemm8::run<Float8>(products, limits, as_stream(stream));
    }
}

}  // namespace fewstep::cuda
