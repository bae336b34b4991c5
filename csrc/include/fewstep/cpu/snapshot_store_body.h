// The kernels of snapshot_store for a block that stays in the first cache; a body of foreach_isa.h.
// The loops that quantise are plain and vectorised by the compiler, as those of quantize_row.h.

#include "fewstep/cpu/slot_sums_body.h"

[[gnu::always_inline]] inline void encode(const float* r, float inverse, std::int64_t n,
                                          std::int8_t* q) {
    for (std::int64_t i = 0; i < n; ++i) {
        q[i] = static_cast<std::int8_t>(static_cast<int>(std::rint(r[i] * inverse)));
    }
}
[[gnu::always_inline]] inline void encode(const float* r, float inverse, std::int64_t n, e4m3* q) {
    for (std::int64_t i = 0; i < n; ++i) q[i].bits = quantize::round_to_e4m3(r[i] * inverse);
}
[[gnu::always_inline]] inline void encode(const float* r, float inverse, std::int64_t n,
                                          int4x2* q) {
    for (std::int64_t i = 0; i < n / 2; ++i) {
        const int low = static_cast<int>(std::rint(r[2 * i] * inverse));
        const int high = static_cast<int>(std::rint(r[2 * i + 1] * inverse));
        q[i].bits = static_cast<std::uint8_t>((low & 15) | (high & 15) << 4);
    }
}

// Quantises n values from the start of a group on.
template <typename S>
void quantize_groups(const float* r, float top, std::int64_t group, std::int64_t n, void* codes,
                     float* scale) {
    for (std::int64_t first = 0; first < n; first += group) {
        const std::int64_t count = std::min(group, n - first);
        const auto bits = quantize::max_magnitude(r + first, count);
        const float amax = bits_to_float(bits);
        S* const q = const_cast<S*>(slot_at(static_cast<const S*>(codes), first));
        const bool finite = bits < quantize::Bits<float>::kInfinity;
        if (!finite || amax < top * 0x1p-126f) {
            std::memset(q, 0, static_cast<std::size_t>(slot_at(q, count) - q));
            *scale++ = finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        } else {
            encode(r + first, top / amax, count, q);
            *scale++ = amax / top;
        }
    }
}

template <typename Acc, typename S>
struct DotColumns {
    const S* x;
    const Acc* values;
    Vec<Acc> sum;

    template <bool kTail>
    [[gnu::always_inline]] void at(std::int64_t i, std::int64_t n) {
        const Vec<Acc> product = load_slot<kTail>(slot_at(x, i), n) * load(values + i);
        sum += keep_columns<kTail, Acc>(product, n);
    }
};

template <typename Acc, typename S>
struct DotGroups {
    const S* x;  // of column `origin`
    std::int64_t origin;
    const Acc* values;
    Acc sum;

    [[gnu::always_inline]] void operator()(std::int64_t first, std::int64_t n, Acc scale) {
        DotColumns<Acc, S> step{slot_at(x, first - origin), values + (first - origin), {}};
        for_columns<Acc>(step, n);
        sum += scale * add_lanes<Acc>(step.sum);
    }
};

// The sum of scale * x[i] * values[i] over the columns [first, first + n) of a row.
template <typename Acc, typename S>
Acc dot_columns(const void* x, const float* scale, std::int64_t group, std::int64_t first,
                std::int64_t n, const Acc* values) {
    DotGroups<Acc, S> run{static_cast<const S*>(x), first, values, Acc(0)};
    for_groups<Acc>(run, scale, group, first, n);
    return run.sum;
}
