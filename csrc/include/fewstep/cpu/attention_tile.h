// What the attention kernels share on the host side: views of rows and masks as a tile reads them,
// and the list of sequences that a call is made of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "fewstep/check.h"

namespace fewstep::cpu {

// Rows of one head: unit stride within a row. `direction` is the distance of the next direction of
// a tangent. Null where a tensor is absent.
template <typename T>
struct HeadRows {
    T* data = nullptr;
    std::int64_t stride = 0, direction = 0;

    HeadRows at(std::int64_t r) const {
        return {data == nullptr ? nullptr : data + r * direction, stride, direction};
    }
};

// The rows of x, [B, H, N, D] or [R, B, H, N, D], from `row` of head h on.
template <typename T>
HeadRows<T> head_rows(const TensorView* x, std::int64_t b, std::int64_t h, std::int64_t row) {
    if (x == nullptr) return {};
    const int lead = x->ndim - 4;
    return {x->ptr<T>() + b * x->stride(lead) + h * x->stride(lead + 1) + row * x->stride(lead + 2),
            x->stride(lead + 2), lead == 0 ? 0 : x->stride(0)};
}

// A mask as one head reads it. It has values to add to the scores, or says who meets whom.
template <typename T>
struct Mask {
    const T* add = nullptr;
    const std::uint8_t* allow = nullptr;
    std::int64_t query = 0, key = 0, direction = 0;  // strides, 0 where it is broadcast

    explicit operator bool() const { return add != nullptr || allow != nullptr; }
    Mask at(std::int64_t r, std::int64_t i, std::int64_t j) const {
        const std::int64_t offset = r * direction + i * query + j * key;
        Mask moved = *this;
        if (add != nullptr) moved.add += offset;
        if (allow != nullptr) moved.allow += offset;
        return moved;
    }
};

template <typename T>
Mask<T> head_mask(const TensorView* x, std::int64_t b, std::int64_t h) {
    Mask<T> mask;
    if (x == nullptr) return mask;
    const int lead = x->ndim - 4;
    const std::int64_t offset = b * x->stride(lead) + h * x->stride(lead + 1);
    mask.query = x->stride(lead + 2);
    mask.key = x->stride(lead + 3);
    mask.direction = lead == 0 ? 0 : x->stride(0);
    if (x->dtype == DType::kBool) {
        mask.allow = x->ptr<const std::uint8_t>() + offset;
    } else {
        mask.add = x->ptr<const T>() + offset;
    }
    return mask;
}

// Queries and keys that meet: a whole batch entry, or one of the sequences packed into it.
struct Sequence {
    std::int64_t batch, first_query, queries, first_key, keys;
};

inline void expect_offsets(const TensorView& offsets, const char* argument, std::int64_t count,
                           std::int64_t rows) {
    expect_contiguous(offsets, argument, DType::kInt32, {count});
    const std::int32_t* at = offsets.ptr<std::int32_t>();
    bool rise = count > 1 && at[0] == 0 && at[count - 1] == rows;
    for (std::int64_t s = 1; rise && s < count; ++s) rise = at[s - 1] <= at[s];
    FEWSTEP_CHECK(rise, argument, ": expected offsets that rise from 0 to ", rows);
}

inline std::vector<Sequence> list_sequences(const TensorView& q, const TensorView& k,
                                            const TensorView* offsets_q,
                                            const TensorView* offsets_k) {
    const std::int64_t batch = q.size(0), nq = q.size(2), nk = k.size(2);
    std::vector<Sequence> sequences;
    if (offsets_q == nullptr && offsets_k == nullptr) {
        for (std::int64_t b = 0; b < batch; ++b) sequences.push_back({b, 0, nq, 0, nk});
        return sequences;
    }
    FEWSTEP_CHECK(offsets_q != nullptr && offsets_k != nullptr,
                  "cu_seqlens_q, cu_seqlens_k: expected both or none");
    FEWSTEP_CHECK(batch == 1, "q: expected batch 1 where cu_seqlens_q is given, got ", batch);
    const std::int64_t count = offsets_q->numel();
    expect_offsets(*offsets_q, "cu_seqlens_q", count, nq);
    expect_offsets(*offsets_k, "cu_seqlens_k", count, nk);
    const std::int32_t *at_q = offsets_q->ptr<std::int32_t>(),
                       *at_k = offsets_k->ptr<std::int32_t>();
    for (std::int64_t s = 0; s + 1 < count; ++s) {
        sequences.push_back({0, at_q[s], at_q[s + 1] - at_q[s], at_k[s], at_k[s + 1] - at_k[s]});
    }
    return sequences;
}

// Refuses masks that are not views of the scores' shape, [B, H, Nq, Nk] (with R in front for the
// tangent), or that come with sequences.
inline void expect_masks(const TensorView* mask, const TensorView* t_mask, const TensorView& q,
                         const TensorView& k, bool packed) {
    const std::int64_t b = q.size(0), h = q.size(1), nq = q.size(2), nk = k.size(2);
    if (mask != nullptr) {
        FEWSTEP_CHECK(!packed, "attn_mask: expected none where cu_seqlens_q is given");
        const DType dtype = mask->dtype == DType::kBool ? DType::kBool : q.dtype;
        expect_shape(*mask, "attn_mask", dtype, {b, h, nq, nk});
    }
    if (t_mask != nullptr) {
        FEWSTEP_CHECK(mask != nullptr && mask->dtype != DType::kBool,
                      "t_attn_mask: expected an additive attn_mask beside it");
        if (t_mask->ndim == 5) {
            expect_shape(*t_mask, "t_attn_mask", q.dtype, {t_mask->size(0), b, h, nq, nk});
        } else {
            expect_shape(*t_mask, "t_attn_mask", q.dtype, {b, h, nq, nk});
        }
    }
}

struct FreeAligned {
    void operator()(void* data) const { ::operator delete(data, std::align_val_t(64)); }
};

// Uninitialised memory in whole cache lines.
template <typename T>
std::unique_ptr<T, FreeAligned> allocate(std::int64_t elements) {
    const std::size_t bytes = static_cast<std::size_t>(std::max<std::int64_t>(elements, 1));
    return std::unique_ptr<T, FreeAligned>(
        static_cast<T*>(::operator new(bytes * sizeof(T), std::align_val_t(64))));
}

// Carves blocks out of one allocation, each in whole cache lines; with a null base it only counts.
template <typename T>
class Carver {
  public:
    explicit Carver(T* base) : base_(base) {}
    T* take(std::int64_t elements) {
        T* const block = base_ == nullptr ? nullptr : base_ + taken_;
        taken_ += (elements + 15) / 16 * 16;
        return block;
    }
    std::int64_t taken() const { return taken_; }

  private:
    T* base_;
    std::int64_t taken_ = 0;
};

}  // namespace fewstep::cpu
