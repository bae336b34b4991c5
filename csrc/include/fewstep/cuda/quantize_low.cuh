// Rows to 8 bits and low = x down^T from one reading of x, for 16-bit rows and ranks up to 64.
//
// By arithmetic: at rank 32 a value of x takes 32 multiplications, three times as long on ordinary
// units as its bytes take on their way; tensor cores need a tenth of that. They want 16 rows
// together, whose largest values are known only at the end, so a block holds 16 rows in shared
// memory: all of them are on their way at once, then the warps share out K, then each quantises two
// rows. down is read by every block, from cache: twice the bytes of x at rank 32.
//
// Any order of K is the same sum if both operands have it: a thread's pairs of columns are those of
// eight neighbours, so that it reads 16 bytes of either at once and needs no other thread's.
#pragma once

#include <algorithm>

#include "fewstep/cuda/quantize_source.cuh"

namespace fewstep::cuda::quantize {

constexpr int kLowRows = 16, kLowWarps = 8, kLowThreads = kLowWarps * 32;
constexpr int kMostRank = 64, kMostTiles = kMostRank / 8;
constexpr int kStep = 32;  // columns that a warp multiplies at once

template <typename T>
struct LowParams {
    Plan plan;
    Given<T> given;
    const T* down;
    T* low;
    int rank;
    int row_bytes;   // of a row in shared memory, zeros behind its end included
    int area_bytes;  // before the rows: warps' sums, then 1 / smooth
};

// Neighbouring rows lie half of the banks apart: a warp reads 64 bytes of eight rows at once.
inline int low_row_bytes(int columns) {
    return (columns + 63) / 64 * 128 + 64;
}
inline int low_area_bytes(const Plan& plan, int rank) {
    return std::max(factor_bytes(plan), kLowWarps / 2 * ((rank + 7) / 8) * 512);
}
// Of a block; python/fewstep/ops/quantize_int8.py counts them too.
inline int low_shared_bytes(const Plan& plan, int rank) {
    return low_area_bytes(plan, rank) + kLowRows * low_row_bytes(plan.columns);
}

// x of the block's rows to shared memory; rows and columns that don't exist are zero.
template <typename T>
__device__ __forceinline__ void stage_rows(const LowParams<T>& params, std::int64_t first,
                                           std::uint8_t* rows) {
    const Plan& plan = params.plan;
    const int units = (plan.columns + kStep - 1) / kStep * (kStep / kUnit);
    for (int i = threadIdx.x; i < kLowRows * units; i += kLowThreads) {
        const int row = i / units, column = i % units * kUnit;
        auto* const to = reinterpret_cast<uint4*>(rows + row * params.row_bytes + column * 2);
        const bool exists = first + row < plan.rows && column < plan.columns;
        if (exists && params.given.activation.gating == Gating::kNone) {
            const T* const from = params.given.x + (first + row) * params.given.stride + column;
            copy_to_shared(to, from);
            copy_to_shared(to + 1, from + 8);
            continue;
        }
        float v[kUnit] = {};
        if (exists) params.given.load(first + row, column, plan.columns, true, v);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float* const eight = v + 8 * half;
            uint4 words;
            words.x = pack<T>(eight[0], eight[1]);
            words.y = pack<T>(eight[2], eight[3]);
            words.z = pack<T>(eight[4], eight[5]);
            words.w = pack<T>(eight[6], eight[7]);
            to[half] = words;
        }
    }
    wait_copies();
    __syncthreads();
}

// The warp's share of K: sums[i] is columns 8 i to 8 i + 7 of low, as multiply_tile has them.
template <typename T>
__device__ __forceinline__ void multiply_rows(const LowParams<T>& params, const std::uint8_t* rows,
                                              float (&sums)[kMostTiles][4]) {
    const int lane = threadIdx.x % 32, columns = params.plan.columns;
#pragma unroll 1
    for (int start = threadIdx.x / 32 * kStep; start < columns; start += kLowWarps * kStep) {
        const int column = start + lane % 4 * 8;
        const auto row = [&](int line) {
            return *reinterpret_cast<const uint4*>(rows + line * params.row_bytes + column * 2);
        };
        const uint4 upper = row(lane / 4), lower = row(lane / 4 + 8);
        const std::uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y},
                                       {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
        for (int tile = 0; tile < kMostTiles; ++tile) {
            if (8 * tile >= params.rank) continue;
            const int n = 8 * tile + lane / 4;
            uint4 words{};
            if (n < params.rank && column < columns) {
                words = *reinterpret_cast<const uint4*>(
                    params.down + static_cast<std::int64_t>(n) * columns + column);
            }
            const std::uint32_t b[2][2] = {{words.x, words.y}, {words.z, words.w}};
            multiply_tile<T>(sums[tile], a[0], b[0]);
            multiply_tile<T>(sums[tile], a[1], b[1]);
        }
    }
}

// The warps' sums together, half of them to the other half until the first has all, and to low.
template <typename T>
__device__ __forceinline__ void store_low(const LowParams<T>& params, std::int64_t first,
                                          float* area, float (&sums)[kMostTiles][4]) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int tiles = (params.rank + 7) / 8;
#pragma unroll 1
    for (int half = kLowWarps / 2; half > 0; half /= 2) {
        const bool gives = warp >= half && warp < 2 * half;
#pragma unroll
        for (int tile = 0; tile < kMostTiles; ++tile) {
            if (!gives || tile >= tiles) continue;
            float* const to = area + (((warp - half) * tiles + tile) * 32 + lane) * 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) to[i] = sums[tile][i];
        }
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < kMostTiles; ++tile) {
            if (warp >= half || tile >= tiles) continue;
            const float* const from = area + ((warp * tiles + tile) * 32 + lane) * 4;
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[tile][i] += from[i];
        }
        __syncthreads();
    }
    if (warp != 0) return;
#pragma unroll
    for (int tile = 0; tile < kMostTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const std::int64_t row = first + lane / 4 + i / 2 * 8;
            const int n = 8 * tile + lane % 4 * 2 + i % 2;
            if (row < params.plan.rows && n < params.rank) {
                params.low[row * params.rank + n] = store<T>(sums[tile][i]);
            }
        }
    }
}

// A row from shared memory to q, by one warp. What comes before the rounding is done again after
// the largest value is known: x'' of a long row is more than registers hold.
template <typename T, typename Format>
__device__ __forceinline__ void quantize_row(const Plan& plan, std::int64_t row, const T* values,
                                             const float* inverse) {
    const int lane = threadIdx.x % 32;
    const auto prepared = [&](int column, float (&v)[kUnit]) {
        if (column < plan.columns) {
            load_unit(values + column, plan.columns - column, true, v);
        } else {
#pragma unroll
            for (int i = 0; i < kUnit; ++i) v[i] = 0.0f;
        }
        prepare_unit(plan, inverse, column, v);
        const float top = largest(v);
        return plan.block == 0 ? top : block_max(top);
    };
    float v[kUnit], top = 0;
    if (plan.block == 0) {
#pragma unroll 1
        for (int start = 0; start < plan.columns; start += 32 * kUnit) {
            top = max_or_nan(top, prepared(start + lane * kUnit, v));
        }
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) {
            top = max_or_nan(top, shuffle_xor(top, distance));
        }
    }
#pragma unroll 1
    for (int start = 0; start < plan.columns; start += 32 * kUnit) {
        const int column = start + lane * kUnit;
        const float own = prepared(column, v);
        const float scale =
            finish_unit<Format>(plan.block == 0 ? top : own, v,
                                plan.q + row * plan.columns + column, plan.columns - column, true);
        store_scale(plan, row, column, scale);
    }
}

template <typename T, typename Format>
__global__ void __launch_bounds__(kLowThreads) quantize_low_kernel(const LowParams<T> params) {
    const Plan& plan = params.plan;
    auto* const area = reinterpret_cast<float*>(dynamic_shared());
    std::uint8_t* const rows = dynamic_shared() + params.area_bytes;
    const std::int64_t first = std::int64_t{blockIdx.x} * kLowRows;
    stage_rows(params, first, rows);
    {
        float sums[kMostTiles][4] = {};
        multiply_rows(params, rows, sums);
        store_low(params, first, area, sums);
    }
    if (plan.smooth != nullptr) {
        invert_factors(plan, area, threadIdx.x, kLowThreads);
        __syncthreads();
    }
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < kLowRows && first + i < plan.rows; i += kLowWarps) {
        const auto* const values = reinterpret_cast<const T*>(rows + i * params.row_bytes);
        quantize_row<T, Format>(plan, first + i, values, area);
    }
}

template <typename Format, typename T>
void launch_low(const Plan& plan, const Given<T>& given, const TensorView& down,
                const TensorView& low, const char* name, cudaStream_t stream) {
    const std::int64_t rank = down.size(0);
    FEWSTEP_CHECK(0 < rank && rank <= kMostRank, "down: expected a rank from 1 to ", kMostRank,
                  ", got ", rank);
    FEWSTEP_CHECK(
        plan.columns > 0 && plan.columns % kUnit == 0 && at_sixteen(given.x, 0) &&
            given.stride % 8 == 0 && at_sixteen(down.ptr<void>(), 0) && at_sixteen(plan.q, 0),
        "x: expected rows of 16 columns or a multiple, at multiples of 16 bytes, as down ",
        "and q, for low; got K = ", plan.columns, " and stride ", given.stride);
    if (plan.rows == 0) return;
    const LowParams<T> params{plan,
                              given,
                              down.ptr<const T>(),
                              low.ptr<T>(),
                              static_cast<int>(rank),
                              low_row_bytes(plan.columns),
                              low_area_bytes(plan, static_cast<int>(rank))};
    const dim3 grid(static_cast<unsigned>((plan.rows + kLowRows - 1) / kLowRows));
    launch_kernel(quantize_low_kernel<T, Format>, name, grid, kLowThreads,
                  low_shared_bytes(plan, params.rank), stream, params);
}

// Rows of x to plan.q and plan.scale, and to low where there is a down.
template <typename Format>
void quantize_given(const TensorView& x, const Plan& plan, const std::string& activation,
                    const TensorView* down, const TensorView* low, const char* name,
                    cudaStream_t stream) {
    const Activation named = Activation::named(activation);
    check_activated_rows(x, activation, plan.columns);
    check_low(x, down, low, plan.columns);
    dispatch_device_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        const Given<T> given{x.ptr<const T>(), x.stride(0), named};
        if (down == nullptr) {
            const bool in_units =
                at_sixteen(given.x, given.stride * static_cast<std::int64_t>(sizeof(T)));
            launch_rows<Format>(plan, given, in_units, name, stream);
        } else if constexpr (sizeof(T) == 2) {
            launch_low<Format>(plan, given, *down, *low, name, stream);
        } else {
            FEWSTEP_CHECK(false, "x: expected bfloat16 or float16 with down, got float32");
        }
    });
}

}  // namespace fewstep::cuda::quantize
