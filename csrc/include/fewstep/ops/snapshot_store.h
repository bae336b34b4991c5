// snapshot_store: one slot of a ring gets x, or x - base, and what it holds is multiplied with all.
//
//   r = x - base
//   scale = max |r| / top over a group, code = round(r * (top / max |r|))     floats: r, rounded
//   gram[b, k] = sum value[slot] * value[k]
//
// x, base: [B, R, C], floating, unit stride in C. snapshots, scale: slot.h, with K slots.
// `slot_at`, int64 of one element, is taken instead of `slot`; outside of the ring nothing is
// stored and gram is NaN. float64 is either all of x, base, snapshots and gram or none of them.
// partials: [B, chunks, K] float64, of StoreLines; gram: [B, K] float32; both contiguous or none.
#pragma once

#include <algorithm>

#include "fewstep/slot.h"

namespace fewstep {

constexpr std::int64_t kStoreGroup = 4096;  // the longest
constexpr std::int64_t kStoreChunk = 16384;

// A sample as lines: groups, or 1,024 neighbours of floats. Sums of products are taken in float32
// within chunks of lines and in float64 across them, in order.
struct StoreLines {
    std::int64_t length, per_row, lines, per_chunk, chunks;

    StoreLines(std::int64_t rows, std::int64_t columns, std::int64_t group, bool scaled) {
        length = std::max<std::int64_t>(1, std::min(columns, scaled ? group : 1024));
        per_row = (columns + length - 1) / length;
        lines = rows * per_row;
        per_chunk = std::max<std::int64_t>(1, kStoreChunk / length);
        chunks = (lines + per_chunk - 1) / per_chunk;
    }
};

// What comes of codes of a kind: their largest magnitude, and below what a group counts as zero.
inline float top_of(SlotKind kind) {
    return kind == SlotKind::kInt8 ? 127.0f : kind == SlotKind::kE4m3 ? 448.0f : 7.0f;
}

inline void check_snapshot_store(const TensorView& x, const TensorView* base,
                                 const TensorView& snapshots, const TensorView* scale,
                                 std::int64_t slot, const TensorView* slot_at, std::int64_t group,
                                 const TensorView* partials, const TensorView* gram) {
    const std::int64_t batch = x.size(0), rows = x.size(1), columns = x.size(2);
    const bool wide = x.dtype == DType::kFloat64;
    expect_rows(x, "x", x.dtype, {batch, rows, columns});
    check_slots(snapshots, scale, group, batch, rows, columns);
    FEWSTEP_CHECK((snapshots.dtype == DType::kFloat64) == wide,
                  "snapshots: expected float64 just with float64 x, got ", name(snapshots.dtype));
    FEWSTEP_CHECK(scale == nullptr || group <= kStoreGroup, "group: expected at most ", kStoreGroup,
                  ", got ", group);
    if (base != nullptr) {
        expect_rows(*base, "base", base->dtype, {batch, rows, columns});
        FEWSTEP_CHECK((base->dtype == DType::kFloat64) == wide,
                      "base: expected float64 just with float64 x, got ", name(base->dtype));
    }
    if (slot_at != nullptr) {
        expect_contiguous(*slot_at, "slot_at", DType::kInt64, {1});
    } else {
        FEWSTEP_CHECK(slot >= 0 && slot < snapshots.size(0), "slot: expected one of ",
                      snapshots.size(0), ", got ", slot);
    }
    FEWSTEP_CHECK((partials == nullptr) == (gram == nullptr),
                  "partials, gram: expected both or neither, got one");
    if (gram == nullptr) return;
    const StoreLines shape(rows, columns, group, scale != nullptr);
    expect_contiguous(*partials, "partials", DType::kFloat64,
                      {batch, shape.chunks, snapshots.size(0)});
    expect_contiguous(*gram, "gram", wide ? DType::kFloat64 : DType::kFloat32,
                      {batch, snapshots.size(0)});
}

namespace cpu {
void snapshot_store(const TensorView& x, const TensorView* base, const TensorView& snapshots,
                    const TensorView* scale, std::int64_t slot, const TensorView* slot_at,
                    std::int64_t group, const TensorView* partials, const TensorView* gram);
}
namespace cuda {
void snapshot_store(const TensorView& x, const TensorView* base, const TensorView& snapshots,
                    const TensorView* scale, std::int64_t slot, const TensorView* slot_at,
                    std::int64_t group, const TensorView* partials, const TensorView* gram,
                    std::uintptr_t stream);
}

}  // namespace fewstep
