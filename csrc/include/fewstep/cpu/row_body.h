// Loops over the columns of a row. Included by the bodies of foreach_isa.h (hence no include
// guard).

#include "fewstep/cpu/vector_body.h"

// Calls step.at<kTail>(i, n) for the vectors of a row: i is its first column and n its columns,
// fewer than a vector's with kTail. Steps are structs, not lambdas: a lambda in a template is
// compiled for the instruction set at the end of the file.
template <typename Acc, typename Step>
[[gnu::always_inline]] inline void for_columns(Step& step, std::int64_t columns) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    std::int64_t i = 0;
    for (; i + kWidth <= columns; i += kWidth) step.template at<false>(i, kWidth);
    if (i < columns) step.template at<true>(i, columns - i);
}

// to += a x + b y, of `padded` elements.
template <typename Acc>
void add_products(const Acc* a, const Acc* x, const Acc* b, const Acc* y, std::int64_t padded,
                  Acc* to) {
    constexpr std::int64_t kWidth = Lanes<Acc>::kCount;
    for (std::int64_t i = 0; i < padded; i += kWidth) {
        store(to + i, load(to + i) + (load(a + i) * load(x + i) + load(b + i) * load(y + i)));
    }
}
