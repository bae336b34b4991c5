// The loop of the quantising ops: rows over threads, each activated, prepared (prologue.h),
// quantised and, with a low-rank branch, multiplied (projection.h) while it is in cache.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "fewstep/check.h"
#include "fewstep/cpu/epilogue.h"
#include "fewstep/cpu/projection.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/thread_scratch.h"

namespace fewstep::cpu::quantize {

// activation(x) of a row, rounded to its type: K values, of K or, with a gate, 2 K.
template <typename T>
class Activate {
  public:
    Activate(const std::string& name, std::int64_t K)
        : function_(epilogue::choose_activate(name)),
          K_(K),
          length_(epilogue::is_glu(name) ? 2 * K : K) {}

    bool active() const { return function_ != nullptr; }
    // Floats that apply() wants lent.
    std::int64_t scratch() const { return active() ? length_ : 0; }

    void apply(const T* x, float* lent, T* out) const {
        widen_(x, nullptr, lent, length_);
        const int columns = static_cast<int>(K_);
        function_(lent, length_ > K_ ? lent + K_ : nullptr, columns);
        round_(lent, columns, out);
    }

  private:
    epilogue::ActivateFunction function_;
    epilogue::RoundFunction<T> round_ = epilogue::choose_round<T>();
    prologue::WidenFunction<T> widen_ = prologue::choose_widen<T>(isa());
    std::int64_t K_, length_;
};

// What comes before the rounding of rows, and beside it.
struct Steps {
    const TensorView* smooth = nullptr;
    std::int64_t rotate = 0;
    std::string activation{};
    const TensorView* down = nullptr;
    const TensorView* low = nullptr;
};

// pick(T{}) returns what quantises row r of K values in T: a function of (r, const T* row).
// Prepared rows are floats.
template <typename T, typename Pick>
void each_row_of(const TensorView& x, std::int64_t K, const Steps& steps, const Pick& pick) {
    constexpr std::int64_t kWorthThreads = 1 << 15;
    constexpr std::int64_t kRows = projection::kRows;
    const std::int64_t R = x.size(0);
    const Activate<T> activate(steps.activation, K);
    const prologue::Prologue<T> prepare(steps.smooth, steps.rotate, K);
    const projection::Projection<T> project(steps.down, K);
    const std::int64_t work = R * K * (1 + project.rank());
    const int threads = work > kWorthThreads ? omp_get_max_threads() : 1;
    const ThreadScratch<float> scratch(
        threads, std::max({prepare.active() ? K : 0, project.scratch(), activate.scratch()}));
    const ThreadScratch<T> activated(threads, activate.active() ? kRows * K : 0);
    const auto plain = pick(T{});
    const auto prepared = pick(float{});
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t first = 0; first < R; first += kRows) {
        float* const lent = scratch.of_thread(omp_get_thread_num());
        const int count = static_cast<int>(std::min(kRows, R - first));
        const T* rows = x.ptr<T>() + first * x.stride(0);
        std::int64_t stride = x.stride(0);
        if (activate.active()) {
            T* const own = activated.of_thread(omp_get_thread_num());
            for (int i = 0; i < count; ++i) activate.apply(rows + i * stride, lent, own + i * K);
            rows = own;
            stride = K;
        }
        for (int i = 0; i < count; ++i) {
            if (prepare.active()) {
                prepare.apply(rows + i * stride, lent);
                prepared(first + i, lent);
            } else {
                plain(first + i, rows + i * stride);
            }
        }
        if (steps.low == nullptr) continue;
        project(rows, stride, first, count, lent, [&](std::int64_t r, std::int64_t i, T value) {
            steps.low->ptr<T>()[r * project.rank() + i] = value;
        });
    }
}

// Rows of x, of which K values are left after the activation.
template <typename Pick>
void each_row(const TensorView& x, const char* argument, std::int64_t K, const Steps& steps,
              const Pick& pick) {
    check_low(x, steps.down, steps.low, K);
    switch (x.dtype) {
        case DType::kFloat32: return each_row_of<float>(x, K, steps, pick);
        case DType::kBFloat16: return each_row_of<bfloat16>(x, K, steps, pick);
        case DType::kFloat16: return each_row_of<float16>(x, K, steps, pick);
        default:
            FEWSTEP_CHECK(false, argument, ": expected float32, bfloat16 or float16, got ",
                          name(x.dtype));
    }
}

}  // namespace fewstep::cpu::quantize
