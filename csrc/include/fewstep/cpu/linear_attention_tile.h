// Loading tiles of tokens, for the bodies of linear_attention_jvp and its backward (of
// foreach_isa.h, hence no include guard). The products are those of dual matrices throughout.

#include "fewstep/cpu/dual_matmul_body.h"

// f = relu(x) and t_f = [x > 0] t_x of `count` rows; NaN passes, as through torch's relu. Without
// t_x, t_f is not touched. The padding is zeroed each time: a NaN in the tile before may have
// reached it.
template <typename T, typename Acc>
void load_features(const Rows<const T>& x, const Rows<const T>& t_x, std::int64_t first,
                   std::int64_t count, std::int64_t d, std::int64_t d_pad, Acc* f, Acc* t_f) {
    for (std::int64_t row = 0; row < count; ++row) {
        const T* from = x[first + row];
        Acc* to = f + row * d_pad;
        for (std::int64_t i = 0; i < d; ++i) {
            const Acc value = to_acc(from[i]);
            to[i] = value <= 0 ? 0 : value;
        }
        std::fill(to + d, to + d_pad, Acc(0));
        if (!t_x) continue;
        const T* t_from = t_x[first + row];
        Acc* t_to = t_f + row * d_pad;
        for (std::int64_t i = 0; i < d; ++i) {
            const Acc t_value = to_acc(t_from[i]);
            t_to[i] = to_acc(from[i]) <= 0 ? 0 : t_value;
        }
        std::fill(t_to + d, t_to + d_pad, Acc(0));
    }
}

// `count` rows as they are; nothing without x.
template <typename T, typename Acc>
void load_values(const Rows<const T>& x, std::int64_t first, std::int64_t count, std::int64_t d,
                 std::int64_t d_pad, Acc* to) {
    if (!x) return;
    for (std::int64_t row = 0; row < count; ++row) {
        const T* from = x[first + row];
        for (std::int64_t i = 0; i < d; ++i) to[row * d_pad + i] = to_acc(from[i]);
        std::fill(to + row * d_pad + d, to + (row + 1) * d_pad, Acc(0));
    }
}

template <typename T, typename Acc>
void store_row(const Acc* from, std::int64_t n, T* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = Convert<T>::from(from[i]);
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
    Acc sum = 0;
    for (int i = 0; i < Lanes<Acc>::kCount; ++i) sum += sums[i];
    return sum;
}
