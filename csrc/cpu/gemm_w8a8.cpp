// gemm_w8a8 on the CPU: the product of int8_product.h with int8 rows as they lie.
#include "fewstep/ops/gemm_w8a8.h"

#include "fewstep/cpu/int8_panel.h"
#include "fewstep/cpu/int8_product.h"

namespace fewstep::cpu {
namespace {

struct Weight {
    const std::int8_t* w;
    std::int64_t ld, K;
    const float* scale;
    int8::ArrangeFunction arrange;

    std::int64_t scratch() const { return int8::kPanel * ((K + 3) / 4 * 4); }

    const std::uint8_t* panel(std::int64_t n, int columns, std::uint8_t* scratch) const {
        arrange({w + n * ld, ld, columns, K}, scratch);
        return scratch;
    }

    static constexpr bool kSigned = true, kReorders = false;
    std::int64_t length() const { return K; }
    void rows(std::int64_t n, int columns, std::uint8_t*, const std::uint8_t** pointers) const {
        for (int c = 0; c < int8::kDots; ++c) {
            pointers[c] = row(n + std::min(c, columns - 1));
        }
    }

    const float* scales(std::int64_t n, int, float*) const { return scale + n; }

    const std::uint8_t* row(std::int64_t n) const {
        return reinterpret_cast<const std::uint8_t*>(w) + n * ld;
    }
    std::int64_t row_bytes() const { return K; }
};

}  // namespace

void gemm_w8a8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
               const TensorView& w_scale, const TensorView* bias, const TensorView* low,
               const TensorView* up, const TensorView* smooth, std::int64_t rotate,
               const std::string& activation, const TensorView* gate, const TensorView* residual,
               const TensorView* scale, const TensorView& out) {
    const product::Rows rows(a, a_scale, scale, out);
    const std::int64_t N = w.size(0), K = rows.a.size(1);
    expect_rows(w, "w", DType::kInt8, {N, K});
    expect_contiguous(w_scale, "w_scale", DType::kFloat32, {N});
    const Weight weight{w.ptr<std::int8_t>(), w.stride(0), K, w_scale.ptr<float>(),
                        int8::choose_arrange(isa())};
    int8::multiply(weight, N,
                   {rows.a, rows.a_scale, w, w_scale, bias, low, up, smooth, rotate, activation,
                    gate, residual, rows.scale, rows.out});
}

}  // namespace fewstep::cpu
