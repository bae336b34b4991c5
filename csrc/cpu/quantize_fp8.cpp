// quantize_fp8 on the CPU: rows over threads, a block of quantize_row_fp8.h at a time.
#include "fewstep/ops/quantize_fp8.h"

#include <algorithm>

#include "fewstep/cpu/quantize_row_fp8.h"
#include "fewstep/cpu/quantize_rows.h"

namespace fewstep::cpu {
namespace {

template <typename T>
[[gnu::always_inline]] inline void quantize_row(const T* x, std::uint8_t* q, float* scale,
                                                std::int64_t columns, std::int64_t size,
                                                std::int64_t blocks) {
    for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t start = b * size;
        scale[b] =
            quantize::quantize_block_fp8(x + start, q + start, std::min(size, columns - start));
    }
}

template <typename T>
using RowFunction = void (*)(const T*, std::uint8_t*, float*, std::int64_t, std::int64_t,
                             std::int64_t);

#if defined(__x86_64__)
template <typename T>
FEWSTEP_TARGET_AVX512 void row_avx512(const T* x, std::uint8_t* q, float* scale,
                                      std::int64_t columns, std::int64_t size,
                                      std::int64_t blocks) {
    quantize_row(x, q, scale, columns, size, blocks);
}
template <typename T>
FEWSTEP_TARGET_AVX2 void row_avx2(const T* x, std::uint8_t* q, float* scale, std::int64_t columns,
                                  std::int64_t size, std::int64_t blocks) {
    quantize_row(x, q, scale, columns, size, blocks);
}
#endif
template <typename T>
void row_portable(const T* x, std::uint8_t* q, float* scale, std::int64_t columns,
                  std::int64_t size, std::int64_t blocks) {
    quantize_row(x, q, scale, columns, size, blocks);
}

template <typename T>
RowFunction<T> choose_row() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return row_avx512<T>;
    if (isa() == Isa::kAvx2) return row_avx2<T>;
#endif
    return row_portable<T>;
}

}  // namespace

void quantize_fp8(const TensorView& x, const TensorView* smooth, std::int64_t rotate,
                  const TensorView* down, const std::string& activation, const TensorView& q,
                  const TensorView& scale, std::int64_t size, const TensorView* low) {
    check_quantize_fp8_outputs(x, q, scale, size);
    const std::int64_t K = q.size(1), blocks = scale.size(1);
    check_activated_rows(x, activation, K);
    const quantize::Steps steps{smooth, rotate, activation, down, low};
    quantize::each_row(x, "x", K, steps, [&](auto tag) {
        return [&, row = choose_row<decltype(tag)>()](std::int64_t r, const decltype(tag)* values) {
            row(values, q.ptr<std::uint8_t>() + r * K, scale.ptr<float>() + r * blocks, K, size,
                blocks);
        };
    });
}

}  // namespace fewstep::cpu
