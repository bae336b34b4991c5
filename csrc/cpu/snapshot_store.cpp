// snapshot_store on the CPU: memory-bound, one read of x, base and for the products of the slots,
// one write of a slot. A block of differences stays in the first cache while it is quantised, read
// again as stored and multiplied with each slot.
#include "fewstep/ops/snapshot_store.h"

#include <omp.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "fewstep/cpu/quantize_row_fp8.h"

#define FEWSTEP_ISA_BODY "fewstep/cpu/snapshot_store_body.h"
#include "fewstep/cpu/foreach_isa.h"
#include "fewstep/cpu/slot_sums.h"

namespace fewstep::cpu {
namespace {

constexpr std::int64_t kBlock = 1024;
constexpr std::int64_t kWorthThreads = 1 << 16;  // values read

using QuantizeFunction = void (*)(const float*, float, std::int64_t, std::int64_t, void*, float*);
template <typename Acc>
using DotFunction = Acc (*)(const void*, const float*, std::int64_t, std::int64_t, std::int64_t,
                            const Acc*);

template <typename S>
QuantizeFunction choose_quantize() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::quantize_groups<S>;
    if (isa() == Isa::kAvx2) return avx2::quantize_groups<S>;
#endif
    return portable::quantize_groups<S>;
}

QuantizeFunction choose_quantize(SlotKind kind) {
    switch (kind) {
        case SlotKind::kInt8: return choose_quantize<std::int8_t>();
        case SlotKind::kE4m3: return choose_quantize<e4m3>();
        case SlotKind::kInt4: return choose_quantize<int4x2>();
        default: return nullptr;
    }
}

template <typename Acc, typename S>
DotFunction<Acc> choose_dot() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::dot_columns<Acc, S>;
    if (isa() == Isa::kAvx2) return avx2::dot_columns<Acc, S>;
#endif
    return portable::dot_columns<Acc, S>;
}

template <typename Acc>
struct Store {
    const TensorView& x;
    const TensorView* base;
    const TensorView& snapshots;
    const TensorView* scale;
    std::int64_t slot, group;
    StoreLines shape;
    SlotKind kind;
    Stream xs, bases{}, slots;
    AddFunction<Acc> add_x, add_base = nullptr, add_slot;
    DotFunction<Acc> dot = nullptr;
    StoreFunction<Acc> store = nullptr;
    QuantizeFunction quantize;

    Store(const TensorView& x, const TensorView* base, const TensorView& snapshots,
          const TensorView* scale, std::int64_t slot, std::int64_t group)
        : x(x),
          base(base),
          snapshots(snapshots),
          scale(scale),
          slot(slot),
          group(group),
          shape(x.size(1), x.size(2), group, scale != nullptr),
          kind(slot_kind(snapshots, x.size(2))),
          xs{x.ptr<char>(), bits_of(x, SlotKind::kFloat)},
          slots{snapshots.ptr<char>(), bits_of(snapshots, kind)},
          quantize(choose_quantize(kind)) {
        const auto add = [](auto tag) { return choose_add<Acc, decltype(tag)>(); };
        add_x = dispatch_storage<Acc>(x.dtype, "x", add);
        if (base != nullptr) {
            add_base = dispatch_storage<Acc>(base->dtype, "base", add);
            bases = {base->ptr<char>(), bits_of(*base, SlotKind::kFloat)};
        }
        dispatch_slot<Acc>(kind, snapshots.dtype, [&](auto tag) {
            add_slot = choose_add<Acc, decltype(tag)>();
            dot = choose_dot<Acc, decltype(tag)>();
        });
        if (scale == nullptr) {
            store = dispatch_storage<Acc>(snapshots.dtype, "snapshots", [](auto tag) {
                return choose_store<Acc, decltype(tag)>();
            });
        }
    }

    // The scales of a row of slot k, and where its values start in the ring.
    float* scales_of(std::int64_t k, std::int64_t line) const {
        const std::int64_t rows = x.size(0) * x.size(1);
        return scale == nullptr ? nullptr : scale->ptr<float>() + (k * rows + line) * shape.per_row;
    }
    std::int64_t start_of(std::int64_t k, std::int64_t line) const {
        return (k * x.size(0) * x.size(1) + line) * x.size(2);
    }

    // Columns [first, first + n) of a row: whole lines, or the end of the row. Adds to `sums`,
    // which may be null, its products with each slot.
    void block(std::int64_t b, std::int64_t row, std::int64_t first, std::int64_t n,
               double* sums) const {
        alignas(64) Acc values[kStoreGroup + kVector];
        std::fill_n(values, n + kVector, Acc(0));
        const auto offset = [&](const TensorView& view) {
            return b * view.stride(0) + row * view.stride(1) + first;
        };
        add_x(xs.at(offset(x)), Acc(1), nullptr, group, first, n, values);
        if (base != nullptr) {
            add_base(bases.at(offset(*base)), Acc(-1), nullptr, group, first, n, values);
        }
        const std::int64_t line = b * x.size(1) + row;
        char* const stored = slots.at(start_of(slot, line) + first);
        if constexpr (std::is_same_v<Acc, float>) {
            if (quantize != nullptr) {
                float* const scales = scales_of(slot, line) + first / group;
                quantize(values, top_of(kind), group, n, stored, scales);
            }
        }
        if (store != nullptr) store(values, stored, n);
        if (sums == nullptr) return;
        std::fill_n(values, n + kVector, Acc(0));
        add_slot(stored, Acc(1), scales_of(slot, line), group, first, n, values);
        for (std::int64_t k = 0; k < snapshots.size(0); ++k) {
            sums[k] += dot(slots.at(start_of(k, line) + first), scales_of(k, line), group, first, n,
                           values);
        }
    }

    void chunk(std::int64_t b, std::int64_t index, double* sums) const {
        const std::int64_t end = std::min(shape.lines, (index + 1) * shape.per_chunk);
        const std::int64_t together = std::max<std::int64_t>(1, kBlock / shape.length);
        if (sums != nullptr) std::fill_n(sums, snapshots.size(0), 0.0);
        for (std::int64_t i = index * shape.per_chunk; i < end;) {
            const std::int64_t row = i / shape.per_row, part = i % shape.per_row;
            const std::int64_t count = std::min({together, shape.per_row - part, end - i});
            const std::int64_t first = part * shape.length;
            block(b, row, first, std::min(count * shape.length, x.size(2) - first), sums);
            i += count;
        }
    }

    void run(double* partials) const {
        const std::int64_t tasks = x.size(0) * shape.chunks, count = snapshots.size(0);
        const std::int64_t read = x.numel() * (partials == nullptr ? 1 : count + 1);
        const int threads = tasks > 1 && read > kWorthThreads ? omp_get_max_threads() : 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (std::int64_t task = 0; task < tasks; ++task) {
            chunk(task / shape.chunks, task % shape.chunks,
                  partials == nullptr ? nullptr : partials + task * count);
        }
    }
};

template <typename Out>
void finish(const double* partials, std::int64_t batch, std::int64_t chunks, std::int64_t count,
            bool known, Out* gram) {
    for (std::int64_t b = 0; b < batch; ++b) {
        for (std::int64_t k = 0; k < count; ++k) {
            double sum = known ? 0.0 : std::numeric_limits<double>::quiet_NaN();
            for (std::int64_t chunk = 0; known && chunk < chunks; ++chunk) {
                sum += partials[(b * chunks + chunk) * count + k];
            }
            gram[b * count + k] = static_cast<Out>(sum);
        }
    }
}

}  // namespace

void snapshot_store(const TensorView& x, const TensorView* base, const TensorView& snapshots,
                    const TensorView* scale, std::int64_t slot, const TensorView* slot_at,
                    std::int64_t group, const TensorView* partials, const TensorView* gram) {
    check_snapshot_store(x, base, snapshots, scale, slot, slot_at, group, partials, gram);
    if (slot_at != nullptr) slot = *slot_at->ptr<std::int64_t>();
    const std::int64_t count = snapshots.size(0);
    const bool known = slot >= 0 && slot < count;
    double* const sums = partials == nullptr ? nullptr : partials->ptr<double>();
    if (known && x.numel() > 0) {
        if (x.dtype == DType::kFloat64) {
            Store<double>(x, base, snapshots, scale, slot, group).run(sums);
        } else {
            Store<float>(x, base, snapshots, scale, slot, group).run(sums);
        }
    }
    if (gram == nullptr) return;
    const std::int64_t chunks = x.numel() == 0 ? 0 : partials->size(1);
    if (gram->dtype == DType::kFloat64) {
        finish(sums, x.size(0), chunks, count, known, gram->ptr<double>());
    } else {
        finish(sums, x.size(0), chunks, count, known, gram->ptr<float>());
    }
}

}  // namespace fewstep::cpu
