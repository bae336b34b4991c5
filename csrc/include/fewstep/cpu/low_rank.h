// The low-rank branch of the products: out_mn += sum_r low_mr up_nr, r = 0, 1, ... in order, each a
// float32 fused multiply-add onto what is there. low is widened once; of up a task takes a panel of
// 64 columns, transposed to [R][64].
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>

#include "fewstep/check.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {

inline void widen(const TensorView& view, const char* argument, std::int64_t offset,
                  std::int64_t count, float* wide) {
    dispatch_float(view.dtype, argument, [&](auto tag) {
        const auto* values = view.ptr<decltype(tag)>() + offset;
        for (std::int64_t i = 0; i < count; ++i) wide[i] = static_cast<float>(to_acc(values[i]));
    });
}

// Refuses a branch that is not low [M, R] and up [N, R], both or neither; returns R, 0 without one.
inline std::int64_t expect_branch(const TensorView* low, const TensorView* up, std::int64_t M,
                                  std::int64_t N) {
    FEWSTEP_CHECK((low == nullptr) == (up == nullptr), "low, up: expected both or neither, got ",
                  low == nullptr ? "up" : "low", " alone");
    if (low == nullptr) return 0;
    const std::int64_t rank = low->size(1);
    for (const TensorView* view : {low, up}) {
        const char* const argument = view == low ? "low" : "up";
        FEWSTEP_CHECK(view->dtype == DType::kFloat32 || view->dtype == DType::kBFloat16 ||
                          view->dtype == DType::kFloat16,
                      argument, ": expected float32, bfloat16 or float16, got ", name(view->dtype));
        expect_contiguous(*view, argument, view->dtype, {view == low ? M : N, rank});
    }
    return rank;
}

class LowRank {
  public:
    static constexpr std::int64_t kPanel = 64;

    // low [M, R] and up [N, R], both or neither.
    LowRank(const TensorView* low, const TensorView* up, std::int64_t M, std::int64_t N)
        : low_(low), up_(up), rank_(expect_branch(low, up, M, N)) {
        if (low == nullptr) return;
        if (low->dtype == DType::kFloat32) {
            rows_ = low->ptr<float>();
        } else {
            wide_.reset(new float[static_cast<std::size_t>(M * rank_)]);
            rows_ = wide_.get();
        }
    }

    std::int64_t rank() const { return rank_; }
    const float* row(std::int64_t m) const { return rows_ + m * rank_; }

    // Must have been called for a row before it is used.
    void prepare_row(std::int64_t m) const {
        if (wide_ != nullptr) widen(*low_, "low", m * rank_, rank_, wide_.get() + m * rank_);
    }

    // Columns [n, n + columns) of the product as [R][kPanel], zeros beyond.
    void panel(std::int64_t n, std::int64_t columns, float* panel) const {
        if (rank_ == 0) return;
        dispatch_float(up_->dtype, "up", [&](auto tag) {
            const auto* values = up_->ptr<decltype(tag)>() + n * rank_;
            for (std::int64_t r = 0; r < rank_; ++r) {
                for (std::int64_t c = 0; c < columns; ++c) {
                    panel[r * kPanel + c] = static_cast<float>(to_acc(values[c * rank_ + r]));
                }
                std::fill(panel + r * kPanel + columns, panel + (r + 1) * kPanel, 0.0f);
            }
        });
    }

  private:
    const TensorView* low_;
    const TensorView* up_;
    std::int64_t rank_;
    const float* rows_ = nullptr;
    std::unique_ptr<float[]> wide_;
};

}  // namespace fewstep::cpu
