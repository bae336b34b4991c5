// Sums of what slots and other tensors hold, of a block that stays in the first cache; a body of
// foreach_isa.h. slot_sums.h chooses among them.

#include "fewstep/cpu/slot_body.h"

template <typename Acc, typename S>
struct AddProduct {
    const S* x;
    Acc factor;
    Acc* sum;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        // Behind the sums is room for a vector. Those of the next group get zeros, whatever the
        // factor of this one is.
        const Vec<Acc> product = load_slot<kTail>(slot_at(x, i), n) * factor;
        store(sum + i, load(sum + i) + keep_columns<kTail, Acc>(product, n));
    }
};

template <typename Acc, typename S>
struct AddGroups {
    const S* x;  // of column `origin`
    std::int64_t origin;
    Acc weight;
    Acc* sum;

    [[gnu::always_inline]] void operator()(std::int64_t first, std::int64_t n, Acc scale) {
        const std::int64_t i = first - origin;
        AddProduct<Acc, S> step{slot_at(x, i), weight * scale, sum + i};
        for_columns<Acc>(step, n);
    }
};

// sum[i] += weight * scale * x[i] for the columns [first, first + n) of a row.
template <typename Acc, typename S>
void add_columns(const void* x, Acc weight, const float* scale, std::int64_t group,
                 std::int64_t first, std::int64_t n, Acc* sum) {
    AddGroups<Acc, S> run{static_cast<const S*>(x), first, weight, sum};
    for_groups<Acc>(run, scale, group, first, n);
}

template <typename Acc, typename T>
struct StoreSums {
    const Acc* sum;
    T* y;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        store_columns<kTail>(y + i, load(sum + i), n);
    }
};

template <typename Acc, typename T>
void store_sums(const Acc* sum, void* y, std::int64_t n) {
    StoreSums<Acc, T> step{sum, static_cast<T*>(y)};
    for_columns<Acc>(step, n);
}
