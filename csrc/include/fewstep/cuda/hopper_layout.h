// Where things lie for Hopper's tensor cores, as arithmetic that also runs on the host, so that it
// is tested without a GPU (tests/cuda/hopper_layout.cu compares it with CuTe's layouts).
//
// Tiles of 16-bit values in shared memory: blocks of 64 columns, one behind the other; in a block a
// row takes 128 bytes, and its eight 16-byte chunks change places by the row (the 128-byte swizzle:
// chunk c of row r lies at c ^ r % 8). That is what a bulk tensor load with a box of 64 columns
// leaves, and the same bytes serve as operands of either kind:
//   "K-major"   a product sums over the columns (q k^T sums over channels)
//   "MN-major"  a product sums over the rows    (P v sums over keys)
// Blocks start at multiples of 1024 bytes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FEWSTEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FEWSTEP_HOST_DEVICE inline
#endif

namespace fewstep::cuda {

constexpr int kBlockColumns = 64;  // 16-bit columns of a block
constexpr int kRowBytes = 128;     // one row of a block
constexpr int kSwizzleRows = 8;    // rows after which the swizzle repeats
constexpr int kStepK = 16;         // what one matrix instruction sums over

// Bytes from the start of a tile of `rows` rows to element (row, column).
FEWSTEP_HOST_DEVICE constexpr int tile_offset(int row, int column, int rows) {
    const int chunk = column % kBlockColumns / 8 ^ row % kSwizzleRows;
    return (column / kBlockColumns * rows + row) * kRowBytes + chunk * 16 + column % 8 * 2;
}

// The 64-bit matrix descriptor of a swizzled operand that starts at `address` of shared memory.
// Strides in bytes: `leading` from one block of columns to the next (read for MN-major operands
// wider than a block), `stride` from 8 rows to the next 8.
FEWSTEP_HOST_DEVICE constexpr std::uint64_t matrix_descriptor(std::uint32_t address, int leading) {
    constexpr std::uint64_t kSwizzle128 = 1;
    constexpr std::uint64_t kStride = kSwizzleRows * kRowBytes;
    return (address & 0x3ffff) >> 4 | static_cast<std::uint64_t>(leading >> 4) << 16 |
           kStride >> 4 << 32 | kSwizzle128 << 62;
}

// Bytes from the start of a K-major tile of `rows` rows to columns 16 k ... 16 k + 15.
FEWSTEP_HOST_DEVICE constexpr int columns_step(int k, int rows) {
    constexpr int kSteps = kBlockColumns / kStepK;
    return k / kSteps * rows * kRowBytes + k % kSteps * kStepK * 2;
}

// Bytes from the start of a tile with rows of 64 bytes to byte `at` of row `row`: its four 16-byte
// chunks change places by every other row (the 64-byte swizzle). What a bulk tensor load with a box
// of 32 columns leaves. Starts at multiples of 512 bytes.
FEWSTEP_HOST_DEVICE constexpr int half_row_offset(int row, int at) {
    return row * 64 + (at / 16 ^ row / 2 % 4) * 16 + at % 16;
}

// Bytes from the start of an MN-major tile to rows 16 k ... 16 k + 15.
FEWSTEP_HOST_DEVICE constexpr int rows_step(int k) {
    return k * kStepK * kRowBytes;
}

// The accumulator of a 64 x N product: thread t of the warpgroup holds N / 2 values; value i is
// element (accumulator_row(t, i), accumulator_column(t, i)). Values 8 k ... 8 k + 7, rounded to 16
// bits and packed in pairs, are in that order the four registers of a left operand of 64 x 16: the
// columns 16 k ... 16 k + 15 of the same matrix.
FEWSTEP_HOST_DEVICE constexpr int accumulator_row(int thread, int value) {
    return thread / 32 * 16 + thread % 32 / 4 + value / 2 % 2 * 8;
}
FEWSTEP_HOST_DEVICE constexpr int accumulator_column(int thread, int value) {
    return value / 4 * 8 + thread % 4 * 2 + value % 2;
}

// A left operand of 64 rows x 32 bytes in registers: the i-th of thread t holds four neighbours of
// row t / 32 * 16 + t % 32 / 4 + i % 2 * 8, from byte mixed_column(t, i) on.
FEWSTEP_HOST_DEVICE constexpr int mixed_column(int thread, int i) {
    return i / 2 * 16 + thread % 4 * 4;
}

}  // namespace fewstep::cuda
