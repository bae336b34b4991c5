// Loading tiles of tokens, for the bodies of linear_attention_jvp and its backward (of
// foreach_isa.h, hence no include guard). The products are those of dual matrices throughout.

#include "fewstep/cpu/dual_matmul_body.h"

// f = relu(x) and t_f = [x > 0] t_x of `count` rows; NaN passes, as through torch's relu. Without
// t_x, t_f is not touched. The padding is zeroed each time: a NaN in the tile before may have
// reached it.
template <bool kTail, typename T, typename Acc>
[[gnu::always_inline]] inline void load_feature(const T* x, const T* t_x, std::int64_t n, Acc* f,
                                                Acc* t_f) {
    const Vec<Acc> value = load_columns<kTail>(x, n);
    store(f, value <= 0 ? Vec<Acc>{} : value);
    if (t_x != nullptr) {
        store(t_f, value <= 0 ? Vec<Acc>{} : load_columns<kTail>(t_x, n));
    }
}
template <typename T, typename Acc>
void load_features(const Rows<const T>& x, const Rows<const T>& t_x, std::int64_t first,
                   std::int64_t count, std::int64_t d, std::int64_t d_pad, Acc* f, Acc* t_f) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t row = 0; row < count; ++row) {
        const T* from = x[first + row];
        const T* t_from = t_x ? t_x[first + row] : nullptr;
        Acc *to = f + row * d_pad, *t_to = t_f + row * d_pad;
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) {
            load_feature<false>(from + i, t_from ? t_from + i : nullptr, kWidth, to + i, t_to + i);
        }
        for (; i < d_pad; i += kWidth) {
            const std::int64_t n = std::max<std::int64_t>(0, d - i);
            load_feature<true>(from + i, t_from ? t_from + i : nullptr, n, to + i, t_to + i);
        }
    }
}

// `count` rows as they are; nothing without x.
template <typename T, typename Acc>
void load_values(const Rows<const T>& x, std::int64_t first, std::int64_t count, std::int64_t d,
                 std::int64_t d_pad, Acc* to) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t row = 0; x && row < count; ++row) {
        const T* from = x[first + row];
        Acc* const to_row = to + row * d_pad;
        std::int64_t i = 0;
        for (; i + kWidth <= d; i += kWidth) store(to_row + i, load_as(from + i));
        for (; i < d_pad; i += kWidth) {
            store(to_row + i, load_columns<true>(from + i, std::max<std::int64_t>(0, d - i)));
        }
    }
}

template <typename T, typename Acc>
void store_row(const Acc* from, std::int64_t n, T* to) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    std::int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) store_as(to + i, load(from + i));
    if (i < n) store_columns<true>(to + i, load(from + i), n - i);
}

// sum += factor row, of `padded` elements.
template <typename Acc>
void add_scaled(const Acc* row, Acc factor, std::int64_t padded, Acc* sum) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < padded; i += kWidth) {
        store(sum + i, load(sum + i) + load(row + i) * factor);
    }
}

template <typename Acc>
Acc dot(const Acc* x, const Acc* y, std::int64_t padded) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    Vec<Acc> sums = {};
    for (std::int64_t i = 0; i < padded; i += kWidth) sums += load(x + i) * load(y + i);
    return add_lanes<Acc>(sums);
}
