// Which of the functions of slot_sums_body.h to call for given dtypes, on this machine. Included
// after foreach_isa.h has compiled them.
#pragma once

#include <type_traits>

#include "fewstep/cpu/isa.h"
#include "fewstep/dispatch.h"
#include "fewstep/slot.h"

namespace fewstep::cpu {

constexpr std::int64_t kVector = 16;  // room behind a block of sums

template <typename Acc>
using AddFunction = void (*)(const void*, Acc, const float*, std::int64_t, std::int64_t,
                             std::int64_t, Acc*);
template <typename Acc>
using StoreFunction = void (*)(const Acc*, void*, std::int64_t);

template <typename Acc, typename S>
AddFunction<Acc> choose_add() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::add_columns<Acc, S>;
    if (isa() == Isa::kAvx2) return avx2::add_columns<Acc, S>;
#endif
    return portable::add_columns<Acc, S>;
}

template <typename Acc, typename T>
StoreFunction<Acc> choose_store() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::store_sums<Acc, T>;
    if (isa() == Isa::kAvx2) return avx2::store_sums<Acc, T>;
#endif
    return portable::store_sums<Acc, T>;
}

// f of the storage types whose sums are taken in Acc.
template <typename Acc, typename F>
auto dispatch_storage(DType dtype, const char* argument, F&& f) {
    if constexpr (std::is_same_v<Acc, double>) {
        return f(double{});
    } else {
        switch (dtype) {
            case DType::kFloat32: return f(float{});
            case DType::kBFloat16: return f(bfloat16{});
            case DType::kFloat16: return f(float16{});
            default:
                FEWSTEP_CHECK(false, argument, ": expected float32, bfloat16 or float16, got ",
                              name(dtype));
                return f(float{});
        }
    }
}

// f of a value of the type of a ring's slots, whose sums are taken in Acc.
template <typename Acc, typename F>
auto dispatch_slot(SlotKind kind, DType dtype, F&& f) {
    if constexpr (std::is_same_v<Acc, float>) {
        if (kind == SlotKind::kInt8) return f(std::int8_t{});
        if (kind == SlotKind::kE4m3) return f(e4m3{});
        if (kind == SlotKind::kInt4) return f(int4x2{});
    }
    return dispatch_storage<Acc>(dtype, "snapshots", f);
}

// Bytes in the memory of a contiguous run.
struct Stream {
    char* data;
    std::int64_t bits;

    char* at(std::int64_t i) const { return data + i * bits / 8; }
};

inline std::int64_t bits_of(const TensorView& view, SlotKind kind) {
    if (kind == SlotKind::kInt4) return 4;
    if (kind != SlotKind::kFloat) return 8;
    return view.dtype == DType::kFloat64 ? 64 : view.dtype == DType::kFloat32 ? 32 : 16;
}

}  // namespace fewstep::cpu
