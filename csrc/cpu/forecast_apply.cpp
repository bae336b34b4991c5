// forecast_apply on the CPU: memory-bound, one read of what it adds and one write. Snapshots are
// added one after another to a block of sums that stays in the first cache, so kernels are needed
// for each dtype instead of for each combination of them.
#include "fewstep/ops/forecast_apply.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <type_traits>

#include "fewstep/cpu/isa.h"
#include "fewstep/dispatch.h"

#define FEWSTEP_ISA_BODY "fewstep/cpu/slot_sums_body.h"
#include "fewstep/cpu/foreach_isa.h"
#include "fewstep/cpu/slot_sums.h"

namespace fewstep::cpu {
namespace {

constexpr std::int64_t kBlock = 1024;
constexpr std::int64_t kTask = 16 * kBlock;
constexpr std::int64_t kWorthThreads = 1 << 16;  // values read

template <typename Acc>
struct Forecast {
    const TensorView &snapshots, &weights;
    const TensorView *base, *scale, *step;
    std::int64_t group;
    const TensorView& y;
    SampleShape shape;
    AddFunction<Acc> add_slot, add_base = nullptr;
    StoreFunction<Acc> store;
    Stream slots, bases{}, out;
    Acc unknown[kMaxSlots];

    Forecast(const TensorView& snapshots, const TensorView& weights, const TensorView* base,
             const TensorView* scale, const TensorView* step, std::int64_t group,
             const TensorView& y)
        : snapshots(snapshots),
          weights(weights),
          base(base),
          scale(scale),
          step(step),
          group(group),
          y(y),
          shape(y.size(1), y.size(2), group, scale != nullptr, is_dense(base)) {
        const SlotKind kind = slot_kind(snapshots, y.size(2));
        add_slot = dispatch_slot<Acc>(kind, snapshots.dtype,
                                      [](auto tag) { return choose_add<Acc, decltype(tag)>(); });
        if (base != nullptr) {
            add_base = dispatch_storage<Acc>(
                base->dtype, "base", [](auto tag) { return choose_add<Acc, decltype(tag)>(); });
            bases = {base->ptr<char>(), bits_of(*base, SlotKind::kFloat)};
        }
        store = dispatch_storage<Acc>(y.dtype, "y",
                                      [](auto tag) { return choose_store<Acc, decltype(tag)>(); });
        slots = {snapshots.ptr<char>(), bits_of(snapshots, kind)};
        out = {y.ptr<char>(), bits_of(y, SlotKind::kFloat)};
        std::fill_n(unknown, kMaxSlots, std::numeric_limits<Acc>::quiet_NaN());
    }

    const Acc* weights_of(std::int64_t b) const {
        const std::int64_t count = snapshots.size(0);
        if (step == nullptr) return weights.ptr<Acc>() + (weights.ndim == 2 ? b * count : 0);
        const std::int64_t row = *step->ptr<std::int64_t>();
        return row < 0 || row >= weights.size(0) ? unknown : weights.ptr<Acc>() + row * count;
    }

    // Columns [col, col + n) of a row, n <= kBlock.
    void block(const Acc* weight, std::int64_t b, std::int64_t row, std::int64_t col,
               std::int64_t n) const {
        alignas(64) Acc sum[kBlock + kVector];
        std::fill_n(sum, n + kVector, Acc(0));
        const std::int64_t batch = y.size(0);
        const std::int64_t line = b * shape.rows + row, i = line * shape.columns + col;
        for (std::int64_t k = 0; k < snapshots.size(0); ++k) {
            if (weight[k] == 0) continue;
            const float* scales =
                scale == nullptr
                    ? nullptr
                    : scale->ptr<float>() + (k * batch * shape.rows + line) * shape.groups;
            add_slot(slots.at(k * batch * shape.elements() + i), weight[k], scales, group, col, n,
                     sum);
        }
        if (base != nullptr) {
            const std::int64_t at = b * base->stride(0) + row * base->stride(1) + col;
            add_base(bases.at(at), Acc(1), nullptr, group, col, n, sum);
        }
        store(sum, out.at(i), n);
    }

    void run() const {
        const std::int64_t batch = y.size(0), elements = shape.elements();
        const std::int64_t chunks = (elements + kTask - 1) / kTask, tasks = batch * chunks;
        const bool worth = batch * elements * (snapshots.size(0) + 1) > kWorthThreads;
        const auto task = [&](std::int64_t t) {
            const std::int64_t b = t / chunks, end = std::min(elements, (t % chunks + 1) * kTask);
            const Acc* const weight = weights_of(b);
            for (std::int64_t i = t % chunks * kTask; i < end;) {
                const std::int64_t row = i / shape.columns, col = i % shape.columns;
                const std::int64_t n = std::min({kBlock, shape.columns - col, end - i});
                block(weight, b, row, col, n);
                i += n;
            }
        };
        if (!worth || tasks == 1) {
            for (std::int64_t t = 0; t < tasks; ++t) task(t);
            return;
        }
#pragma omp parallel for schedule(static)
        for (std::int64_t t = 0; t < tasks; ++t) task(t);
    }
};

}  // namespace

void forecast_apply(const TensorView& snapshots, const TensorView& weights, const TensorView* base,
                    const TensorView* scale, const TensorView* step, std::int64_t group,
                    const TensorView& y) {
    check_forecast_apply(snapshots, weights, base, scale, step, group, y);
    if (y.numel() == 0) return;
    if (snapshots.dtype == DType::kFloat64) {
        Forecast<double>(snapshots, weights, base, scale, step, group, y).run();
    } else {
        Forecast<float>(snapshots, weights, base, scale, step, group, y).run();
    }
}

}  // namespace fewstep::cpu
