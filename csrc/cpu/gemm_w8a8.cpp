// gemm_w8a8 on the CPU: the product of int8_product.h with a packed weight, whose panels lie ready.
#include "fewstep/ops/gemm_w8a8.h"

#include "fewstep/cpu/int8_product.h"

namespace fewstep::cpu {
namespace {

struct Packed {
    const std::uint8_t* packed;
    const float* scale;
    std::int64_t ld;  // K padded to 4: bytes of a column

    static constexpr bool kMakes = false;
    const std::uint8_t* bytes(std::int64_t n, int, std::int64_t, std::int64_t,
                              std::uint8_t*) const {
        return packed + n * ld;
    }
    const float* scales(std::int64_t n, int, float*) const { return scale + n; }
};

}  // namespace

void gemm_w8a8(const TensorView& a, const TensorView* a_scale, const TensorView& packed,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out) {
    const std::int64_t N = w_scale.size(0), ld = (a.size(1) + 3) / 4 * 4;
    expect_contiguous(packed, "packed", DType::kUInt8, {(N + 15) / 16 * 16, ld});
    expect_contiguous(w_scale, "w_scale", DType::kFloat32, {N});
    const Packed source{packed.ptr<std::uint8_t>(), w_scale.ptr<float>(), ld};
    int8::product(
        source, N,
        {a, a_scale, bias, low, up, smooth, rotate, activation, gate, residual, scale, out});
}

}  // namespace fewstep::cpu
