// The product of two dual matrices, blocked for registers. Included by bodies of foreach_isa.h.
//
//   C  <- C0  + A B            A: [rows, K], read as scalars at a[i * a_row + k * a_col]
//   tC <- tC0 + tA B + A tB    B: [K, lanes] and C: [rows, lanes], rows `ld` apart
//
// Any of the six may be absent, with the products that it is part of; what is absent on the right
// is zero, and what is absent on the left is not wanted. C0 is zero, C, or alpha C with one factor
// per lane. Attention is this product twice, and its backward five times (the head of each kernel
// says what A, B and C are). One block keeps kRows x kVectors sums of C and as many of tC in
// registers; C gets the same operations in the same order whether or not there are tangents, and so
// does tC with and without C, so the bits of one don't depend on the other.

#include "fewstep/cpu/vector_body.h"

constexpr int kBlockVectors = kVectorBytes == 64 ? 2 : 1;  // 32 registers with AVX-512, else 16

template <typename T>
struct DualProduct {
    const T *a, *t_a;
    std::int64_t a_row, a_col;
    const T *b, *t_b;
    std::int64_t inner;
    T *c, *t_c;
    std::int64_t ld;
    bool accumulate = false;
    const T* alpha = nullptr;  // with `accumulate`
};

template <typename T, int kRows, int kVectors, bool kPrimal, bool kHasTA, bool kHasTB>
void dual_block(const DualProduct<T>& x, std::int64_t row, std::int64_t lane) {
    constexpr int kWidth = Lanes<T>::kCount;
    constexpr bool kTangent = kHasTA || kHasTB, kHasA = kPrimal || kHasTB;
    constexpr bool kHasB = kPrimal || kHasTA;
    Vec<T> c[kRows][kVectors] = {}, t_c[kRows][kVectors] = {};
    const T* a = kHasA ? x.a + row * x.a_row : nullptr;
    const T* t_a = kHasTA ? x.t_a + row * x.a_row : nullptr;
    for (std::int64_t k = 0; k < x.inner; ++k) {
        Vec<T> b[kVectors], t_b[kVectors];
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            if constexpr (kHasB) b[j] = load(x.b + k * x.ld + lane + j * kWidth);
            if constexpr (kHasTB) t_b[j] = load(x.t_b + k * x.ld + lane + j * kWidth);
        }
#pragma GCC unroll 8
        for (int i = 0; i < kRows; ++i) {
            T value = 0, t_value = 0;
            if constexpr (kHasA) value = a[i * x.a_row + k * x.a_col];
            if constexpr (kHasTA) t_value = t_a[i * x.a_row + k * x.a_col];
#pragma GCC unroll 8
            for (int j = 0; j < kVectors; ++j) {
                if constexpr (kPrimal) c[i][j] += value * b[j];
                if constexpr (kHasTB) t_c[i][j] += value * t_b[j];
                if constexpr (kHasTA) t_c[i][j] += t_value * b[j];
            }
        }
    }
    // C0 comes last, so that long sums are sums of short ones.
    if (x.accumulate) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const bool scaled = x.alpha != nullptr;
            const Vec<T> alpha = scaled ? load(x.alpha + lane + j * kWidth) : broadcast<T>(1);
#pragma GCC unroll 8
            for (int i = 0; i < kRows; ++i) {
                const std::int64_t at = (row + i) * x.ld + lane + j * kWidth;
                if constexpr (kPrimal) c[i][j] += alpha * load(x.c + at);
                if constexpr (kTangent) t_c[i][j] += alpha * load(x.t_c + at);
            }
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
        for (int j = 0; j < kVectors; ++j) {
            const std::int64_t at = (row + i) * x.ld + lane + j * kWidth;
            if constexpr (kPrimal) store(x.c + at, c[i][j]);
            if constexpr (kTangent) store(x.t_c + at, t_c[i][j]);
        }
    }
}

template <typename T, int kVectors, bool kPrimal, bool kHasTA, bool kHasTB>
void dual_rows(const DualProduct<T>& x, std::int64_t rows, std::int64_t lane) {
    // With one matrix of sums, twice the rows keep as many additions in flight as with two.
    constexpr int kRows = kPrimal && (kHasTA || kHasTB) ? 4 : 8;
    std::int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) {
        dual_block<T, kRows, kVectors, kPrimal, kHasTA, kHasTB>(x, row, lane);
    }
    for (; row < rows; ++row) dual_block<T, 1, kVectors, kPrimal, kHasTA, kHasTB>(x, row, lane);
}

template <typename T, bool kPrimal, bool kHasTA, bool kHasTB>
void dual_lanes(const DualProduct<T>& x, std::int64_t rows, std::int64_t lanes) {
    constexpr std::int64_t kWidth = Lanes<T>::kCount;
    std::int64_t lane = 0;
    for (; lane + kBlockVectors * kWidth <= lanes; lane += kBlockVectors * kWidth) {
        dual_rows<T, kBlockVectors, kPrimal, kHasTA, kHasTB>(x, rows, lane);
    }
    for (; lane < lanes; lane += kWidth) dual_rows<T, 1, kPrimal, kHasTA, kHasTB>(x, rows, lane);
}

// `lanes` is a multiple of the vector width. A result that no product contributes to is not
// touched.
template <typename T>
void dual_matmul(const DualProduct<T>& x, std::int64_t rows, std::int64_t lanes) {
    const bool primal = x.c != nullptr && x.a != nullptr && x.b != nullptr;
    const bool has_ta = x.t_c != nullptr && x.t_a != nullptr && x.b != nullptr;
    const bool has_tb = x.t_c != nullptr && x.a != nullptr && x.t_b != nullptr;
    switch (4 * primal + 2 * has_ta + has_tb) {
        case 7: return dual_lanes<T, true, true, true>(x, rows, lanes);
        case 6: return dual_lanes<T, true, true, false>(x, rows, lanes);
        case 5: return dual_lanes<T, true, false, true>(x, rows, lanes);
        case 4: return dual_lanes<T, true, false, false>(x, rows, lanes);
        case 3: return dual_lanes<T, false, true, true>(x, rows, lanes);
        case 2: return dual_lanes<T, false, true, false>(x, rows, lanes);
        case 1: return dual_lanes<T, false, false, true>(x, rows, lanes);
    }
}
