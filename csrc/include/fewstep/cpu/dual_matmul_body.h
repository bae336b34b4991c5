// The product of two dual matrices, blocked for registers. Included by bodies of foreach_isa.h.
//
//   C  <- alpha C  + A B            A: [rows, K], read as scalars at a[i * a_row + k * a_col]
//   tC <- alpha tC + tA B + A tB    B: [K, lanes] and C: [rows, lanes], rows `ld` apart
//
// tA or tB may be absent, with their products. `alpha` holds one factor per lane; null starts from
// zero. Attention is this product twice: scores (A = keys, B = queries transposed, so that a lane
// is a query) and output (A = values transposed, B = probabilities). One block keeps kRows x
// kVectors sums of C and as many of tC in registers; C gets the same operations in the same order
// whether or not there are tangents, so its bits don't depend on them.

#include "fewstep/cpu/vector_body.h"

constexpr int kBlockRows = 4;
constexpr int kBlockVectors = kVectorBytes == 64 ? 2 : 1;  // 32 registers with AVX-512, else 16

template <typename T>
struct DualProduct {
    const T *a, *t_a;
    std::int64_t a_row, a_col;
    const T *b, *t_b;
    std::int64_t inner;
    const T* alpha;
    T *c, *t_c;
    std::int64_t ld;
};

template <typename T, int kRows, int kVectors, bool kHasTA, bool kHasTB>
void dual_block(const DualProduct<T>& x, std::int64_t row, std::int64_t lane) {
    constexpr int kWidth = Lanes<T>::kCount;
    constexpr bool kTangent = kHasTA || kHasTB;
    Vec<T> c[kRows][kVectors] = {}, t_c[kRows][kVectors] = {};
    if (x.alpha != nullptr) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const Vec<T> alpha = load(x.alpha + lane + j * kWidth);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const std::int64_t at = (row + i) * x.ld + lane + j * kWidth;
                c[i][j] = alpha * load(x.c + at);
                if constexpr (kTangent) t_c[i][j] = alpha * load(x.t_c + at);
            }
        }
    }
    const T* a = x.a + row * x.a_row;
    const T* t_a = kHasTA ? x.t_a + row * x.a_row : nullptr;
    for (std::int64_t k = 0; k < x.inner; ++k) {
        Vec<T> b[kVectors], t_b[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            b[j] = load(x.b + k * x.ld + lane + j * kWidth);
            if constexpr (kHasTB) t_b[j] = load(x.t_b + k * x.ld + lane + j * kWidth);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            const T value = a[i * x.a_row + k * x.a_col];
            T t_value = 0;
            if constexpr (kHasTA) t_value = t_a[i * x.a_row + k * x.a_col];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                c[i][j] += value * b[j];
                if constexpr (kHasTB) t_c[i][j] += value * t_b[j];
                if constexpr (kHasTA) t_c[i][j] += t_value * b[j];
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const std::int64_t at = (row + i) * x.ld + lane + j * kWidth;
            store(x.c + at, c[i][j]);
            if constexpr (kTangent) store(x.t_c + at, t_c[i][j]);
        }
    }
}

template <typename T, int kVectors, bool kHasTA, bool kHasTB>
void dual_rows(const DualProduct<T>& x, std::int64_t rows, std::int64_t lane) {
    std::int64_t row = 0;
    for (; row + kBlockRows <= rows; row += kBlockRows) {
        dual_block<T, kBlockRows, kVectors, kHasTA, kHasTB>(x, row, lane);
    }
    for (; row < rows; ++row) dual_block<T, 1, kVectors, kHasTA, kHasTB>(x, row, lane);
}

template <typename T, bool kHasTA, bool kHasTB>
void dual_lanes(const DualProduct<T>& x, std::int64_t rows, std::int64_t lanes) {
    constexpr std::int64_t kWidth = Lanes<T>::kCount;
    std::int64_t lane = 0;
    for (; lane + kBlockVectors * kWidth <= lanes; lane += kBlockVectors * kWidth) {
        dual_rows<T, kBlockVectors, kHasTA, kHasTB>(x, rows, lane);
    }
    for (; lane < lanes; lane += kWidth) dual_rows<T, 1, kHasTA, kHasTB>(x, rows, lane);
}

// `lanes` is a multiple of the vector width.
template <typename T>
void dual_matmul(const DualProduct<T>& x, std::int64_t rows, std::int64_t lanes) {
    if (x.t_a != nullptr && x.t_b != nullptr) return dual_lanes<T, true, true>(x, rows, lanes);
    if (x.t_a != nullptr) return dual_lanes<T, true, false>(x, rows, lanes);
    if (x.t_b != nullptr) return dual_lanes<T, false, true>(x, rows, lanes);
    dual_lanes<T, false, false>(x, rows, lanes);
}
