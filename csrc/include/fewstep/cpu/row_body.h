// Loops over one row in scratch, `padded` to whole vectors with zeros. Included by the bodies of
// foreach_isa.h (hence no include guard).

#include "fewstep/cpu/vector_body.h"

// The row as accumulation-type values. The padding is zeroed each time: a NaN in the row before may
// have reached it.
template <typename T, typename Acc>
void widen_row(const T* from, std::int64_t n, std::int64_t padded, Acc* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_acc(from[i]);
    for (std::int64_t i = n; i < padded; ++i) to[i] = 0;
}

template <typename T, typename Acc>
void narrow_row(const Acc* from, std::int64_t n, T* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from(from[i]);
}

template <typename Acc>
[[gnu::always_inline]] inline Acc add_lanes(const Vec<Acc>& x) {
    Acc sum = 0;
    for (int i = 0; i < Lanes<Acc>::kCount; ++i) sum += x[i];
    return sum;
}

// Four chains of additions, as many as it takes to hide their latency.
template <typename Acc>
Acc sum_row(const Acc* x, std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    Vec<Acc> sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kWidth <= padded; i += 4 * kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kWidth);
    }
    for (; i < padded; i += kWidth) sums[0] += load(x + i);
    return add_lanes<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename Acc>
Acc dot_row(const Acc* x, const Acc* y, std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    Vec<Acc> sums[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * kWidth <= padded; i += 4 * kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sums[j] += load(x + i + j * kWidth) * load(y + i + j * kWidth);
    }
    for (; i < padded; i += kWidth) sums[0] += load(x + i) * load(y + i);
    return add_lanes<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// x - value on the row, zero past its end.
template <typename Acc>
void subtract_row(Acc* x, Acc value, std::int64_t n, std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < padded; i += kWidth) store(x + i, load(x + i) - value);
    for (std::int64_t i = n; i < padded; ++i) x[i] = 0;
}

template <typename Acc>
void scale_row(Acc* x, Acc factor, std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < padded; i += kWidth) store(x + i, load(x + i) * factor);
}

// Row `row` of an operand that may be absent or broadcast, widened, plus `offset`: in `scratch`,
// which still holds it where the row is the one before; `absent` where there is none.
template <typename T, typename Acc>
const Acc* modulation_row(const Rows<const T>& from, std::int64_t row, std::int64_t n,
                          std::int64_t padded, Acc offset, Acc* scratch, const Acc* absent) {
    if (!from) return absent;
    if (row == 0 || from.stride != 0) {
        widen_row(from[row], n, padded, scratch);
        if (offset != 0) {
            for (std::int64_t i = 0; i < n; ++i) scratch[i] += offset;
        }
    }
    return scratch;
}
