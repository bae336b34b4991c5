// The kernel of cache_metric for one contiguous run of columns; a body of foreach_isa.h. One loop
// reads and writes everything, so that the writes' misses overlap with the reads'.

#include "fewstep/cpu/row_body.h"

template <typename Acc>
[[gnu::always_inline]] inline Vec<Acc> magnitude(const Vec<Acc>& x) {
    using Bits = typename Lanes<Acc>::Bits;
    using Word = std::conditional_t<sizeof(Acc) == 8, std::int64_t, std::int32_t>;
    return (Vec<Acc>)((Bits)x & std::numeric_limits<Word>::max());
}

template <typename T, bool kPrevious, bool kResidual>
struct ReduceRun {
    const T *x, *y, *previous;
    T* residual;
    Vec<acc_t<T>> change, scale;

    // Past the end all are zero and add nothing.
    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        using Acc = acc_t<T>;
        const Vec<Acc> base = load_columns<kTail>(y + i, n);
        const Vec<Acc> r = load_columns<kTail>(x + i, n) - base;
        if constexpr (kPrevious) {
            const Vec<Acc> p = load_columns<kTail>(previous + i, n);
            change += magnitude<Acc>(r - p);
            scale += magnitude<Acc>(p);
        } else {
            change += magnitude<Acc>(r);
            scale += magnitude<Acc>(base);
        }
        if constexpr (kResidual) store_columns<kTail>(residual + i, r, n);
    }
};

template <typename T, bool kPrevious, bool kResidual>
Sums reduce_columns(const T* x, const T* y, const T* previous, T* residual, std::int64_t n) {
    using Acc = acc_t<T>;
    ReduceRun<T, kPrevious, kResidual> run{x, y, previous, residual, {}, {}};
    for_columns<Acc>(run, n);
    return {add_lanes<Acc>(run.change), add_lanes<Acc>(run.scale)};
}

// `previous` and `residual` may be null.
template <typename T>
Sums reduce_run(const T* x, const T* y, const T* previous, T* residual, std::int64_t n) {
    if (previous != nullptr) {
        return residual != nullptr ? reduce_columns<T, true, true>(x, y, previous, residual, n)
                                   : reduce_columns<T, true, false>(x, y, previous, residual, n);
    }
    return residual != nullptr ? reduce_columns<T, false, true>(x, y, previous, residual, n)
                               : reduce_columns<T, false, false>(x, y, previous, residual, n);
}
