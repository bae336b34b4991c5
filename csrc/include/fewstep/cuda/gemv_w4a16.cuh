// gemm_w4a16 of several weights for at most 8 rows, on any GPU from sm_80 on.
//
//   out_g[m][n] = sum_k x_g[m][k] (q_g[n][k] s_g[n][k / G]) + bias_g[n]
//
// Bytes: every weight and scale once, K / 2 + 2 K / G for a row n; x and out are next to nothing.
// The floor is these bytes at the memory's rate: 0.40 ms for FLUX.1's 77 layers at 4.3 TB/s. At
// that rate a multiprocessor of an H200 has 3.4 instructions for a weight and thread; without
// tensor cores one row alone takes 5.6. So weights are the left operand of m16n8k16 and the rows of
// x its columns, where 8 rows cost what one does: 640 instructions of sm_90 for 256 weights of a
// thread, 2.5 for a weight. 352 of them unpack, 32 multiply, 16 load 16 bytes of x, 8 of weights.
//
// A warp takes 16 rows n over all of K, a chunk of 128 k at a time: a thread of each quad loads 16
// bytes, 32 neighbours in k, of two rows. Which k meet in a product is free as long as both
// operands agree: pairs of nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7 of a word, as masks leave
// them, and x lies in shared memory in that order. Four chunks are under way, 128 bytes a thread,
// 64 KiB a multiprocessor: three times what the memory's latency asks for. Two where more rows or
// smaller groups need the registers.
//
// A product sums over four threads' k, so over groups, where G is below 128. Then a column of the
// right operand is a row of x in one of the 128 / G parts of the chunk, and zero in the others, and
// what comes out are the sums of groups: no scale meets a weight before its group is summed, and
// q x is exact. 8 G / 128 rows go in one pass; further rows pass again over the same registers.
//
// Blocks stay, as many as fit, and take tiles of 128 rows n, problem after problem. x is put into
// shared memory once, or whenever a tile's problem has another one. Its rows are 64 bytes further
// apart than chunks are, and the zeros lie in both halves of the banks: no conflicts.
#pragma once

#include "fewstep/cuda/nibbles.cuh"
#include "fewstep/dispatch.h"

namespace fewstep::cuda::gemv {

constexpr int kThreads = 256, kWarpRows = 16, kBlockRows = kThreads / 32 * kWarpRows;
constexpr int kChunk = 128;       // k
constexpr int kChunkBytes = 256;  // of x
constexpr int kStep = 4;          // chunks whose scales a quad loads together
constexpr int kZeroBytes = 384;   // see `column`
constexpr int kProblems = 124;    // that fit the 4 KiB of a launch's arguments

// 16-bit floats: bias of one dtype for all, none where there is no address.
struct Group {
    const std::uint8_t* w[kProblems];
    const std::uint8_t* scale[kProblems];
    const void* bias[kProblems];
    int tiles[kProblems + 1];  // the first of each, and the end
    int first[kProblems + 1];  // rows n before each
    const void* x;
    void* out;
    std::int64_t x_step, row_step;  // elements from problem to problem, from row to row
    int count, M, K, groups;
    DType scales, biases;
};
static_assert(sizeof(Group) <= 4096);

// Bytes from row to row of x in shared memory.
__device__ __forceinline__ int row_bytes(int chunks) {
    return chunks * kChunkBytes + 64;
}

template <typename T>
__device__ __forceinline__ float float_of_half(std::uint32_t bits, bool high) {
    const float2 both = unpack<T>(bits);
    return high ? both.y : both.x;
}

// The bits of x [M][K] to shared memory: word j of 8 k of thread t of chunk c at c 256 + j 64 + t
// 16, in the order of `multiply_chunk`; zeros beyond K.
__device__ __forceinline__ void stage(const Group& p, const std::uint16_t* x,
                                      std::uint8_t* shared) {
    const int chunks = (p.K + kChunk - 1) / kChunk, words = chunks * kChunk / 8;
    for (int i = threadIdx.x; i < p.M * words; i += kThreads) {
        const int m = i / words, word = i % words;
        const std::uint16_t* const from = x + m * p.row_step + word * 8;
        const auto pair = [&](int k) -> std::uint32_t { return from[k] | from[k + 4] << 16; };
        uint4 bits{};
        if (word * 8 < p.K) bits = {pair(0), pair(1), pair(2), pair(3)};
        const int c = word / 16, t = word / 4 % 4, j = word % 4;
        store_sixteen(shared + m * row_bytes(chunks) + c * kChunkBytes + j * 64 + t * 16, bits);
    }
}

// What a thread reads of x: bytes at `start` + chunk * `step` + word * 64 of shared memory.
struct Column {
    int start, step;
};

// Of column g of pass q: row q 8 / kParts + g / kParts of x in part g % kParts of a chunk, where
// the thread's k are in that part, and zeros elsewhere. Rows past the last are the last again, and
// not stored. A row begins in one half of the banks; its zeros are read from the other.
template <int kParts>
__device__ __forceinline__ Column column(const Group& p, int chunks, int pass, int lane) {
    const int g = lane / 4, t = lane % 4;
    const int m = min(pass * (8 / kParts) + g / kParts, p.M - 1);
    if (t * kParts / 4 == g % kParts) {
        return {m * row_bytes(chunks) + t * 16, kChunkBytes};
    }
    const int zeros = (p.M * row_bytes(chunks) + 127) / 128 * 128;
    return {zeros + (1 - m % 2) * 64, 0};
}

// Sums of products of a chunk, 16 rows n by 8 columns, added to acc. `low` and `high` are 32
// neighbours in k of rows g and g + 8.
template <typename T, int kPasses>
__device__ __forceinline__ void multiply_chunk(const uint4& low, const uint4& high,
                                               const std::uint8_t* shared,
                                               const Column (&columns)[kPasses], int chunk,
                                               float (&acc)[kPasses][4]) {
    const std::uint32_t words[2][4] = {{low.x, low.y, low.z, low.w},
                                       {high.x, high.y, high.z, high.w}};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        std::uint32_t pairs[2][4];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[r][i] = widen_nibbles<T>(words[r][j] >> 4 * i);
        }
#pragma unroll
        for (int q = 0; q < kPasses; ++q) {
            const uint4 x =
                load_sixteen(shared + (columns[q].start + chunk * columns[q].step + j * 64));
            multiply_tile<T>(acc[q], {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]},
                             {x.x, x.y});
            multiply_tile<T>(acc[q], {pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]},
                             {x.z, x.w});
        }
    }
}

// Two rows n of a thread: where they are in a problem's weight and scales, in bytes.
struct Rows {
    const std::uint8_t* w;
    const std::uint8_t* scale;
    int w_at[2], scale_at[2];
};

// The thread's bytes of a chunk; zeros beyond K.
__device__ __forceinline__ void load_chunk(const Group& p, const Rows& rows, int chunk, int t,
                                           uint4 (&w)[2]) {
    const int at = chunk * (kChunk / 2) + t * 16;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        w[r] = uint4{};
        if (at < p.K / 2) w[r] = load_once(rows.w + (rows.w_at[r] + at));
    }
}

// Scales of chunk 4 s + t: of part i that of row g in the low half, of row g + 8 in the high one.
template <int kParts>
__device__ __forceinline__ void load_scales(const Group& p, const Rows& rows, int chunk,
                                            std::uint32_t (&scales)[kParts]) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
        const int group = chunk * kParts + i;
        scales[i] = 0;
        if (group < p.groups) {
            scales[i] = load_pair_of_bytes(rows.scale + (rows.scale_at[0] + group * 2)) |
                        load_pair_of_bytes(rows.scale + (rows.scale_at[1] + group * 2)) << 16;
        }
    }
}

// total += acc, columns 2 t and 2 t + 1 by rows g and g + 8, each times its part's scale.
template <int kParts, int kPasses>
__device__ __forceinline__ void scale_chunk(const Group& p, const std::uint32_t (&scales)[kParts],
                                            int t, const float (&acc)[kPasses][4],
                                            float (&total)[kPasses][4]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        // Column 2 t + c is of part (2 t + c) % kParts.
        std::uint32_t bits = scales[c % kParts];
        if constexpr (kParts == 4) {
            const std::uint32_t other = scales[2 + c];
            bits = t % 2 == 0 ? bits : other;
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float scale = p.scales == DType::kBFloat16
                                    ? float_of_half<__nv_bfloat16>(bits, r == 1)
                                    : float_of_half<__half>(bits, r == 1);
#pragma unroll
            for (int q = 0; q < kPasses; ++q) {
                total[q][r * 2 + c] = fused(acc[q][r * 2 + c], scale, total[q][r * 2 + c]);
            }
        }
    }
}

__device__ __forceinline__ float load_bias(const Group& p, const void* bias, int n) {
    switch (p.biases) {
        case DType::kFloat32: return static_cast<const float*>(bias)[n];
        case DType::kBFloat16: return load(static_cast<const __nv_bfloat16*>(bias)[n]);
        default: return load(static_cast<const __half*>(bias)[n]);
    }
}

// Row n of the problem, row m of x.
template <typename T>
__device__ __forceinline__ void finish(const Group& p, int problem, int n, int m, float y) {
    const int first = p.first[problem], N = p.first[problem + 1] - first;
    if (n >= N || m >= p.M) return;
    const void* const bias = p.bias[problem];
    if (bias != nullptr) y = sum(y, load_bias(p, bias, n));
    T* const out = static_cast<T*>(p.out) + std::int64_t{first} * p.M;
    out[std::int64_t{m} * N + n] = store<T>(y);
}

template <typename T, int kParts, int kPasses>
__device__ __forceinline__ void multiply_rows(const Group& p, const std::uint8_t* shared,
                                              int problem, int row) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int chunks = (p.K + kChunk - 1) / kChunk;
    const int N = p.first[problem + 1] - p.first[problem];
    Rows rows{p.w[problem], p.scale[problem], {}, {}};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int n = min(row + g + 8 * r, N - 1);  // past the end: not stored
        rows.w_at[r] = n * (p.K / 2);
        rows.scale_at[r] = n * p.groups * 2;
    }
    Column columns[kPasses];
#pragma unroll
    for (int q = 0; q < kPasses; ++q) columns[q] = column<kParts>(p, chunks, q, lane);

    constexpr int kAhead = kParts == 4 || kPasses > 1 ? 2 : 4;
    uint4 w[kAhead][2];
    std::uint32_t next[kParts];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) load_chunk(p, rows, j, t, w[j]);
    load_scales<kParts>(p, rows, t, next);
    float total[kPasses][4] = {};
    for (int start = 0; start < chunks; start += kStep) {
        std::uint32_t mine[kParts];
#pragma unroll
        for (int i = 0; i < kParts; ++i) mine[i] = next[i];
        load_scales<kParts>(p, rows, start + kStep + t, next);
#pragma unroll
        for (int j = 0; j < kStep; ++j) {
            if (start + j >= chunks) break;
            float acc[kPasses][4] = {};
            const uint4 low = w[j % kAhead][0], high = w[j % kAhead][1];
            load_chunk(p, rows, start + j + kAhead, t, w[j % kAhead]);
            multiply_chunk<T, kPasses>(low, high, shared, columns, start + j, acc);
            std::uint32_t scales[kParts];
#pragma unroll
            for (int i = 0; i < kParts; ++i) scales[i] = shuffle_from(mine[i], lane / 4 * 4 + j);
            scale_chunk<kParts, kPasses>(p, scales, t, acc, total);
        }
    }

#pragma unroll
    for (int q = 0; q < kPasses; ++q) {
        const float (&y)[4] = total[q];
        if constexpr (kParts == 1) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                finish<T>(p, problem, row + g + i / 2 * 8, q * 8 + 2 * t + i % 2, y[i]);
            }
        } else {
            float both[2] = {sum(y[0], y[1]), sum(y[2], y[3])};
            if constexpr (kParts == 4) {
#pragma unroll
                for (int r = 0; r < 2; ++r) both[r] = sum(both[r], shuffle_xor(both[r], 1));
            }
            const int m = q * (8 / kParts) + t * 2 / kParts;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                // Two threads have the sums of four parts: each stores one row.
                if (kParts == 4 && t % 2 != r) continue;
                finish<T>(p, problem, row + g + r * 8, m, both[r]);
            }
        }
    }
}

template <typename T, int kParts, int kPasses>
__global__ void __launch_bounds__(kThreads, kPasses == 4 ? 1 : 2)
    gemv_w4a16_kernel(const __grid_constant__ Group p) {
    std::uint8_t* const shared = dynamic_shared();
    const int chunks = (p.K + kChunk - 1) / kChunk;
    const int zeros = (p.M * row_bytes(chunks) + 127) / 128 * 128;
    for (int i = threadIdx.x; i < kZeroBytes / 16; i += kThreads) {
        store_sixteen(shared + zeros + i * 16, uint4{});
    }
    int problem = 0, staged = -1;
    for (int tile = blockIdx.x; tile < p.tiles[p.count]; tile += gridDim.x) {
        while (p.tiles[problem + 1] <= tile) ++problem;
        const int input = p.x_step == 0 ? 0 : problem;
        if (input != staged) {
            __syncthreads();  // nobody reads the one before any more
            stage(p, static_cast<const std::uint16_t*>(p.x) + input * p.x_step, shared);
            __syncthreads();
            staged = input;
        }
        const int row =
            (tile - p.tiles[problem]) * kBlockRows + static_cast<int>(threadIdx.x / 32) * kWarpRows;
        const int N = p.first[problem + 1] - p.first[problem];
        if (row < N) multiply_rows<T, kParts, kPasses>(p, shared, problem, row);
    }
}

}  // namespace fewstep::cuda::gemv
