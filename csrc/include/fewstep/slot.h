// Snapshots of a tensor in a ring of slots: what forecast_apply reads and snapshot_store writes.
//
//   ring   [K, B, R, C] floating, int8 or e4m3 (as uint8); [K, B, R, C / 2] uint8 for int4: two
//          codes of neighbours a byte, two's complement, the even column in the low half
//   scale  [K, B, R, ceil(C / group)] float32, one factor a group of neighbours; none of floats
//   value  = code * scale
//
// Both are contiguous. float64 serves as oracle on the CPU and is never mixed with others.
#pragma once

#include <cmath>

#include "fewstep/check.h"

namespace fewstep {

constexpr int kMaxSlots = 8;

struct e4m3 {
    std::uint8_t bits;
};
struct int4x2 {
    std::uint8_t bits;
};

enum class SlotKind { kFloat, kInt8, kE4m3, kInt4 };

// Bytes and int4 are both uint8 and differ by the length of a row of C values.
inline SlotKind slot_kind(const TensorView& ring, std::int64_t columns) {
    if (ring.dtype == DType::kInt8) return SlotKind::kInt8;
    if (ring.dtype != DType::kUInt8) return SlotKind::kFloat;
    return ring.size(3) == columns ? SlotKind::kE4m3 : SlotKind::kInt4;
}

// What is asked of a ring of tensors [batch, rows, columns], and of its scale.
inline void check_slots(const TensorView& ring, const TensorView* scale, std::int64_t group,
                        std::int64_t batch, std::int64_t rows, std::int64_t columns) {
    const std::int64_t slots = ring.size(0);
    FEWSTEP_CHECK(slots >= 1 && slots <= kMaxSlots, "snapshots: expected 1 to ", kMaxSlots,
                  " slots, got ", slots);
    const SlotKind kind = slot_kind(ring, columns);
    const bool halved = kind == SlotKind::kInt4;
    FEWSTEP_CHECK(!halved || columns % 2 == 0,
                  "snapshots: expected an even number of columns for int4, got ", columns);
    expect_contiguous(ring, "snapshots", ring.dtype,
                      {slots, batch, rows, halved ? columns / 2 : columns});
    FEWSTEP_CHECK((scale == nullptr) == (kind == SlotKind::kFloat),
                  "scale: expected one with codes and none with floats, got ",
                  scale == nullptr ? "none" : "one");
    FEWSTEP_CHECK(group >= 1 && (!halved || group % 2 == 0),
                  "group: expected at least 1, and an even number for int4, got ", group);
    if (scale == nullptr) return;
    expect_contiguous(*scale, "scale", DType::kFloat32,
                      {slots, batch, rows, (columns + group - 1) / group});
}

// A sample as rows, or as one long row where the groups of neighbouring rows line up anyway and
// `dense` says that nothing has gaps.
struct SampleShape {
    std::int64_t rows, columns, groups;

    SampleShape(std::int64_t rows, std::int64_t columns, std::int64_t group, bool scaled,
                bool dense)
        : rows(rows), columns(columns) {
        if (dense && (!scaled || columns % group == 0)) {
            this->columns = rows * columns;
            this->rows = 1;
        }
        groups = scaled ? (this->columns + group - 1) / group : 0;
    }
    std::int64_t elements() const { return rows * columns; }
};

// Whether the samples of a [B, R, C] view have no gaps inside.
inline bool is_dense(const TensorView* view) {
    return view == nullptr || view->size(1) <= 1 || view->stride(1) == view->size(2);
}

}  // namespace fewstep
