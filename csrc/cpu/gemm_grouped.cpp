// gemm_grouped on the CPU: one product after the other, each on all threads.
#include "fewstep/ops/gemm_grouped.h"

#include "fewstep/check.h"
#include "fewstep/ops/gemm_fp8.h"
#include "fewstep/ops/gemm_w8a8.h"

namespace fewstep::cpu {

void gemm_grouped(const Tensors& a, const Optionals& a_scale, const Tensors& w,
                  const Tensors& w_scale, const Optionals& bias, const Optionals& low,
                  const Optionals& up, const Optionals& smooth,
                  const std::vector<std::int64_t>& rotate, const std::string& activation,
                  const Optionals& gate, const Optionals& residual, const Tensors& out) {
    const std::size_t count = out.size();
    for (const Tensors* const all : {&a, &w, &w_scale}) {
        FEWSTEP_CHECK(all->size() == count, "a, w, w_scale: expected ", count,
                      " tensors each, got ", all->size());
    }
    for (const Optionals* const all : {&a_scale, &bias, &low, &up, &smooth, &gate, &residual}) {
        FEWSTEP_CHECK(all->empty() || all->size() == count,
                      "a_scale, bias, low, up, smooth, gate, residual: expected ", count,
                      " or none, got ", all->size());
    }
    FEWSTEP_CHECK(rotate.size() == count, "rotate: expected ", count, " numbers, got ",
                  rotate.size());
    for (std::size_t i = 0; i < count; ++i) {
        const auto product = w[i].dtype == DType::kInt8 ? gemm_w8a8 : gemm_fp8;
        product(a[i], entry(a_scale, i), w[i], w_scale[i], entry(bias, i), entry(low, i),
                entry(up, i), entry(smooth, i), rotate[i], activation, entry(gate, i),
                entry(residual, i), nullptr, out[i]);
    }
}

}  // namespace fewstep::cpu
