// Rows to 8 bits on the GPU, each read once: from its loads to its rounding a row stays in the
// registers of a team of warps. Shared by quantize_int8, quantize_fp8 and norm_quantize_int8, which
// differ in where values come from (Source) and what they become (Format).
//
// A thread takes units of 16 neighbours: 32 bytes of a 16-bit row, which two loads bring, and one
// store of 16. In a unit a rotation's first four distances stay in the thread; the others meet
// neighbouring lanes, 16 lanes for a block of 256. A team has as many warps as the row has units
// for, one or three to a thread; a block has several teams where rows are short, and goes on to
// further rows, so that 1 / smooth is computed once for many: a division each would cost more than
// all else. The teams meet once a row, to have its largest value.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fewstep/check.h"
#include "fewstep/cuda/lanes.cuh"
#include "fewstep/ops/quantize_fp8.h"
#include "fewstep/ops/quantize_int8.h"

namespace fewstep::cuda::quantize {

constexpr int kUnit = 16;
constexpr int kMostThreads = 512, kMostUnits = 3;
constexpr std::int64_t kMostColumns = kMostThreads * kMostUnits * kUnit;
constexpr int kMostWarps = kMostThreads / 32;

// What may come between a row and its rounding, and where the results go.
struct Plan {
    std::uint8_t* q;  // [rows, columns]
    float* scale;     // [rows] or [rows, blocks]
    std::int64_t rows;
    int columns;
    int block;  // columns that share a scale, 128, or 0 for all of a row
    const void* smooth;
    DType smooth_type;
    int rotate;
    float factor;  // rotate^-1/2
    int team_warps;
};

__device__ __forceinline__ float load_float(const void* data, DType type, std::int64_t at) {
    if (type == DType::kFloat32) return load(static_cast<const float*>(data)[at]);
    if (type == DType::kBFloat16) return load(static_cast<const __nv_bfloat16*>(data)[at]);
    return load(static_cast<const __half*>(data)[at]);
}

// A unit of a row of T, of which `count` values exist; the others are zero. Where `in_units`, all
// do, at a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void load_unit(const T* from, int count, bool in_units,
                                          float (&v)[kUnit]) {
    if (in_units && count > 0) {
        constexpr int kLoads = kUnit * sizeof(T) / 16;
        uint4 words[kLoads];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const std::uint32_t bits[] = {words[i].x, words[i].y, words[i].z, words[i].w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if constexpr (sizeof(T) == 4) {
                    v[4 * i + j] = float_of(bits[j]);
                } else {
                    const float2 pair = unpack<T>(bits[j]);
                    v[8 * i + 2 * j] = pair.x;
                    v[8 * i + 2 * j + 1] = pair.y;
                }
            }
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = i < count ? load(from[i]) : 0.0f;
}

// The warps that share a row, and how they agree on something.
struct Team {
    int warps, index;  // of the block's teams
    int thread;        // of the team
    float* slots;      // [2][kMostWarps] of shared memory
    int turn = 0;

    __device__ __forceinline__ Team(int team_warps, float* shared)
        : warps(team_warps),
          index(threadIdx.x / 32 / team_warps),
          thread(threadIdx.x - index * team_warps * 32),
          slots(shared) {}

    // The column of the thread's unit i.
    __device__ __forceinline__ int column(int i) const { return (i * warps * 32 + thread) * kUnit; }

    // All teams of the block take part. Two sets of slots in turns: whoever writes to one again
    // has met the others since they read it.
    template <typename Combine>
    __device__ __forceinline__ float reduce(float x, const Combine& combine) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            x = combine(x, shuffle_xor(x, distance));
        }
        if (warps == 1) return x;
        float* const mine = slots + turn * kMostWarps + index * warps;
        if (thread % 32 == 0) mine[thread / 32] = x;
        __syncthreads();
        turn ^= 1;
        x = mine[0];
        for (int i = 1; i < warps; ++i) x = combine(x, mine[i]);
        return x;
    }
    __device__ __forceinline__ float reduce_max(float x) {
        return reduce(x, [](float a, float b) { return max_or_nan(a, b); });
    }
    __device__ __forceinline__ float reduce_sum(float x) {
        return reduce(x, [](float a, float b) { return a + b; });
    }
};

// 1 / smooth in shared memory: four neighbours together, and the fours in an order that has eight
// threads with neighbouring units read from eight different groups of banks.
__device__ __forceinline__ int place_of_four(int four) {
    return four ^ (four >> 3 & 3);
}
__device__ __forceinline__ void invert_factors(const Plan& plan, float* inverse, int thread,
                                               int threads) {
    for (int k = thread; k < plan.columns; k += threads) {
        inverse[4 * place_of_four(k / 4) + k % 4] =
            quotient(1.0f, load_float(plan.smooth, plan.smooth_type, k));
    }
}
inline int factor_bytes(const Plan& plan) {
    return plan.smooth == nullptr ? 0 : (plan.columns + 63) / 64 * 64 * 4;
}

// Every plan.rotate neighbours, of which the thread has 16.
__device__ __forceinline__ void rotate_unit(const Plan& plan, float (&v)[kUnit]) {
#pragma unroll
    for (int distance = 1; distance < kUnit; distance *= 2) {
#pragma unroll
        for (int i = 0; i < kUnit; ++i) {
            if (i & distance) continue;
            const float a = v[i], b = v[i + distance];
            v[i] = sum(a, b);
            v[i + distance] = difference(a, b);
        }
    }
#pragma unroll 1
    for (int distance = 1; distance < plan.rotate / kUnit; distance *= 2) {
        // a + b of the lane with a, a - b of the one with b: one operation, and exact products.
        const float sign = threadIdx.x & distance ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < kUnit; ++i) v[i] = fused(v[i], sign, shuffle_xor(v[i], distance));
    }
#pragma unroll
    for (int i = 0; i < kUnit; ++i) v[i] = product(v[i], plan.factor);
}

// x'' of a unit at `column`; all threads of a warp take part.
__device__ __forceinline__ void prepare_unit(const Plan& plan, const float* inverse, int column,
                                             float (&v)[kUnit]) {
    if (plan.smooth != nullptr && column < plan.columns) {
#pragma unroll
        for (int i = 0; i < kUnit / 4; ++i) {
            const uint4 four =
                reinterpret_cast<const uint4*>(inverse)[place_of_four(column / 4 + i)];
            const std::uint32_t bits[] = {four.x, four.y, four.z, four.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                // Behind the last column there may be anything.
                if (column + 4 * i + j < plan.columns) {
                    v[4 * i + j] = product(v[4 * i + j], float_of(bits[j]));
                }
            }
        }
    }
    if (plan.rotate != 0) rotate_unit(plan, v);
}

__device__ __forceinline__ float largest(const float (&v)[kUnit]) {
    float top = 0;
#pragma unroll
    for (int i = 0; i < kUnit; ++i) top = max_or_nan(top, fabsf(v[i]));
    return top;
}

// What 16 values that share a scale become.
struct Int8 {
    static constexpr float kTop = 127.0f, kTiny = kQuantizeInt8Tiny;
    float inverse;

    __device__ __forceinline__ Int8(float amax, float) : inverse(quotient(kTop, amax)) {}
    __device__ __forceinline__ std::uint32_t round(const float* v) const {
        constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum's low byte is the integer
        float steps[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) steps[i] = sum(product(v[i], inverse), kRound);
        return low_bytes(steps);
    }
};

// The quotient v / scale is that of a division, made of the reciprocal r: with q = v r and twice
// q += (v - q scale) r it is rounded to nearest (Markstein: the first step leaves less than a unit
// in the last place, and then v - q scale is exact). Below 2^-90 that difference may be none, and
// the division is a division.
struct E4m3 {
    static constexpr float kTop = 448.0f, kTiny = kQuantizeFp8Tiny;
    float scale, inverse;

    __device__ __forceinline__ E4m3(float, float scale_)
        : scale(scale_), inverse(quotient(1.0f, scale_)) {}
    __device__ __forceinline__ std::uint32_t round(const float* v) const {
        float steps[4];
        if (scale < 0x1p-90f) {
#pragma unroll
            for (int i = 0; i < 4; ++i) steps[i] = quotient(v[i], scale);
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float q = product(v[i], inverse);
                q = fused(fused(-q, scale, v[i]), inverse, q);
                steps[i] = fused(fused(-q, scale, v[i]), inverse, q);
            }
        }
        return e4m3_bytes(steps);
    }
};

// A unit whose largest value, and that of all that share its scale, is amax: to q at `column` of a
// row, of which `count` columns exist. Returns the scale.
template <typename Format>
__device__ __forceinline__ float finish_unit(float amax, const float (&v)[kUnit], std::uint8_t* q,
                                             int count, bool in_units) {
    const bool finite = amax < INFINITY, used = finite && amax >= Format::kTiny;
    const float scale = used ? quotient(amax, Format::kTop) : 1.0f;
    const Format format(used ? amax : Format::kTop, scale);
    if (count > 0) {
        std::uint32_t bytes[kUnit / 4];
#pragma unroll
        for (int i = 0; i < kUnit / 4; ++i) bytes[i] = used ? format.round(v + 4 * i) : 0;
        if (in_units) {
            uint4 all;
            all.x = bytes[0];
            all.y = bytes[1];
            all.z = bytes[2];
            all.w = bytes[3];
            *reinterpret_cast<uint4*>(q) = all;
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) {
                if (i < count) q[i] = static_cast<std::uint8_t>(bytes[i / 4] >> i % 4 * 8);
            }
        }
    }
    return finite ? scale : NAN;
}

// The eight threads whose units are a block of 128 agree on its largest value.
__device__ __forceinline__ float block_max(float top) {
#pragma unroll
    for (int distance = 1; distance < 8; distance *= 2) {
        top = max_or_nan(top, shuffle_xor(top, distance));
    }
    return top;
}

__device__ __forceinline__ void store_scale(const Plan& plan, std::int64_t row, int column,
                                            float scale) {
    if (plan.block == 0) {
        if (column == 0) plan.scale[row] = scale;
    } else if (column % plan.block == 0 && column < max(plan.columns, 1)) {
        const int blocks = max((plan.columns + plan.block - 1) / plan.block, 1);
        plan.scale[row * blocks + column / plan.block] = scale;
    }
}

template <typename Source>
struct RowParams {
    Plan plan;
    Source source;
    bool in_units;  // of x, its modulation and q: every unit is whole and at a multiple of 16 bytes
};

// Source::fill(params, team, row, v): values of a row, zero behind its end, in all of v.
template <typename Source, typename Format, int kUnits>
__global__ void __launch_bounds__(kMostThreads)
    quantize_rows_kernel(const RowParams<Source> params) {
    const Plan& plan = params.plan;
    auto* const slots = reinterpret_cast<float*>(dynamic_shared());
    float* const inverse = slots + 2 * kMostWarps;
    if (plan.smooth != nullptr) {
        invert_factors(plan, inverse, threadIdx.x, blockDim.x);
        __syncthreads();
    }
    Team team(plan.team_warps, slots);
    const int teams = blockDim.x / 32 / plan.team_warps;
    for (std::int64_t first = std::int64_t{blockIdx.x} * teams; first < plan.rows;
         first += std::int64_t{gridDim.x} * teams) {
        const std::int64_t row = min(first + team.index, plan.rows - 1);
        const bool exists = first + team.index < plan.rows;
        float v[kUnits][kUnit];
        params.source.fill(params, team, row, v);
        float top = 0, tops[kUnits];
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            prepare_unit(plan, inverse, team.column(i), v[i]);
            tops[i] = largest(v[i]);
            if (plan.block != 0) tops[i] = block_max(tops[i]);
            top = max_or_nan(top, tops[i]);
        }
        if (plan.block == 0) top = team.reduce_max(top);
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
            const int column = team.column(i);
            const float scale = finish_unit<Format>(
                plan.block == 0 ? top : tops[i], v[i], plan.q + row * plan.columns + column,
                exists ? plan.columns - column : 0, params.in_units);
            if (exists) store_scale(plan, row, column, scale);
        }
    }
}

// Where smoothing, rotation and results are checked: q [R, K] and scale [R] or [R, S].
inline Plan make_plan(const TensorView* smooth, std::int64_t rotate, const TensorView& q,
                      const TensorView& scale, std::int64_t rows, std::int64_t columns,
                      std::int64_t block) {
    FEWSTEP_CHECK(columns <= kMostColumns, "x: expected at most ", kMostColumns, " columns, got ",
                  columns);
    check_prologue(smooth, rotate, columns);
    Plan plan{};
    plan.q = q.ptr<std::uint8_t>();
    plan.scale = scale.ptr<float>();
    plan.rows = rows;
    plan.columns = static_cast<int>(columns);
    plan.block = static_cast<int>(block);
    if (smooth != nullptr) {
        plan.smooth = smooth->ptr<void>();
        plan.smooth_type = smooth->dtype;
    }
    plan.rotate = static_cast<int>(rotate);
    plan.factor = rotate == 0 ? 1.0f : static_cast<float>(1.0 / std::sqrt(double(rotate)));
    return plan;
}

inline bool at_sixteen(const void* data, std::int64_t stride_bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride_bytes % 16 == 0;
}

template <typename Format, typename Source>
void launch_rows(Plan plan, const Source& source, bool in_units, const char* name,
                 cudaStream_t stream) {
    if (plan.rows == 0) return;
    const int units = (plan.columns + kUnit - 1) / kUnit;
    const bool wide = units > kMostThreads;
    const int threads = std::max((wide ? (units + kMostUnits - 1) / kMostUnits : units), 1);
    plan.team_warps = (threads + 31) / 32;
    const int teams = std::max(8 / plan.team_warps, 1);
    const int block = teams * plan.team_warps * 32;
    // As many blocks as a multiprocessor holds with 64 registers a thread, unless rows are fewer.
    const std::int64_t resident = std::int64_t{count_multiprocessors()} * (1024 / block);
    const std::int64_t blocks = std::min((plan.rows + teams - 1) / teams, resident);
    const bool whole = plan.columns % kUnit == 0 && at_sixteen(plan.q, plan.columns);
    const RowParams<Source> params{plan, source, in_units && whole};
    const int bytes = 2 * kMostWarps * 4 + factor_bytes(plan);
    launch_kernel(wide ? quantize_rows_kernel<Source, Format, kMostUnits>
                       : quantize_rows_kernel<Source, Format, 1>,
                  name, dim3(static_cast<unsigned>(blocks)), block, bytes, stream, params);
}

}  // namespace fewstep::cuda::quantize
