// The end of a Hopper product: from a warp's rows of y, float32 in an accumulator's registers, to
//
//   out = residual + gate * activation(y)                     rounded once
//
// Chunk by chunk y goes through scratch of the warp's own, so that gate, residual and out meet
// memory in rows, 16 or 8 bytes a thread. Registers can't be indexed at run time: what puts a chunk
// there exists once for each, what follows is one loop. The next chunk's residual is on its way
// meanwhile. A gated activation multiplies y by that of the columns half a tile to the right, which
// the same thread holds: 16 columns of either half are a chunk.
#pragma once

#include <cmath>
#include <cstring>

#include "fewstep/cuda/gemm8_plan.h"
#include "fewstep/cuda/gemm8_requantize_sm90.cuh"

namespace fewstep::cuda::gemm8 {

enum class Activation : int { kNone, kGelu, kGeluTanh, kSilu };

// A matrix of float32, bfloat16 or float16 with neighbours side by side; data is null where absent.
struct Rows {
    void* data;
    DType type;
    std::int64_t stride;
};

struct End {
    Rows out, residual, gate;
    Requantized requantized;  // where outputs are of 8 bits
    int M, width;             // of out
    int rows_of_gate;         // that each row of the gate serves
    Activation activation;
    bool is_glu;
    bool in_fours;  // four columns of every matrix are one access
};

// Four neighbours as they lie in memory.
struct Four {
    std::uint32_t bits[4];
};

// `count` of them exist.
__device__ __forceinline__ Four load_four(const Rows& x, std::int64_t at, int count,
                                          bool in_fours) {
    Four four{};
    if (count <= 0) return four;
    if (x.type == DType::kFloat32) {
        const auto* const from = static_cast<const std::uint32_t*>(x.data) + at;
        if (in_fours) {
            const uint4 all = *reinterpret_cast<const uint4*>(from);
            return {{all.x, all.y, all.z, all.w}};
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < count) four.bits[i] = from[i];
        }
        return four;
    }
    const auto* const from = static_cast<const std::uint16_t*>(x.data) + at;
    if (in_fours) {
        const uint2 all = *reinterpret_cast<const uint2*>(from);
        return {{all.x, all.y, 0, 0}};
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < count) four.bits[i / 2] |= static_cast<std::uint32_t>(from[i]) << i % 2 * 16;
    }
    return four;
}

__device__ __forceinline__ void widen_four(const Four& four, DType type, float (&values)[4]) {
    if (type == DType::kFloat32) {
        std::memcpy(values, four.bits, sizeof values);
        return;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float2 pair = type == DType::kBFloat16 ? unpack<__nv_bfloat16>(four.bits[i])
                                                     : unpack<__half>(four.bits[i]);
        values[2 * i] = pair.x;
        values[2 * i + 1] = pair.y;
    }
}

__device__ __forceinline__ void store_four(const Rows& x, std::int64_t at, int count, bool in_fours,
                                           const float (&values)[4]) {
    if (x.type == DType::kFloat32) {
        auto* const to = static_cast<float*>(x.data) + at;
        if (in_fours) {
            uint4 all;
            std::memcpy(&all, values, sizeof all);
            *reinterpret_cast<uint4*>(to) = all;
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i < count) to[i] = values[i];
        }
        return;
    }
    const auto both = [&](int i) {
        return x.type == DType::kBFloat16 ? pack<__nv_bfloat16>(values[i], values[i + 1])
                                          : pack<__half>(values[i], values[i + 1]);
    };
    const uint2 all = {both(0), both(2)};
    auto* const to = static_cast<std::uint16_t*>(x.data) + at;
    if (in_fours) {
        *reinterpret_cast<uint2*>(to) = all;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < count) {
            to[i] = static_cast<std::uint16_t>((i < 2 ? all.x : all.y) >> i % 2 * 16);
        }
    }
}

// y times a number in [0, 1].
__device__ __forceinline__ float activate(float y, Activation activation) {
    if (activation == Activation::kNone) return y;
    if (activation == Activation::kGelu) return y * (0.5f + 0.5f * erff(y * 0.70710678f));
    // (1 + tanh(z / 2)) / 2 = 1 / (1 + e^-z)
    const float z =
        activation == Activation::kSilu ? y : y * (1.5957691216f + 0.0713548128f * (y * y));
    const float e = expf(-fabsf(z));
    return y * fast_divide(z < 0 ? e : 1.0f, 1.0f + e);  // by at most 2: within 2^-22
}

// Chunk `chunk` of y [16 x kN] to the warp's scratch.
template <int kN>
__device__ __forceinline__ void stage_chunk(const float (&y)[kN / 2], int chunk, bool is_glu,
                                            std::uint8_t* scratch) {
    const int lane = threadIdx.x % 32;
    // Eight columns, `from` of y, as the q-th of the chunk.
    const auto stage = [&](int from, int q) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float pair[2] = {y[4 * from + 2 * half], y[4 * from + 2 * half + 1]};
            uint2 bits;
            std::memcpy(&bits, pair, sizeof bits);
            *reinterpret_cast<uint2*>(
                scratch + scratch_offset(lane / 4 + 8 * half, 8 * q + lane % 4 * 2)) = bits;
        }
    };
#pragma unroll
    for (int i = 0; i < kN / kChunk; ++i) {
        if (i != chunk) continue;
#pragma unroll
        for (int q = 0; q < 4; ++q) {
            if (is_glu) {
                stage(q < 2 ? 2 * i + q : kN / 16 + 2 * i + q - 2, q);
            } else {
                stage(4 * i + q, q);
            }
        }
    }
}

__device__ __forceinline__ void fetch_four(const std::uint8_t* scratch, float (&values)[4]) {
    const uint4 all = *reinterpret_cast<const uint4*>(scratch);
    std::memcpy(values, &all, sizeof values);
}

__device__ __forceinline__ void store_bytes(const Rows& x, std::int64_t at, int count,
                                            bool in_fours, std::uint32_t bytes) {
    auto* const to = static_cast<std::uint8_t*>(x.data) + at;
    if (in_fours) {
        *reinterpret_cast<std::uint32_t*>(to) = bytes;
        return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (i < count) to[i] = static_cast<std::uint8_t>(bytes >> 8 * i);
    }
}

// What becomes of four outputs of which `count` exist, `at` elements into out, of the thread's i-th
// row in a chunk, row m of out.
struct StoreFloats {
    __device__ __forceinline__ void operator()(const End& end, std::int64_t at, int, int, int count,
                                               float (&values)[4]) const {
        store_four(end.out, at, count, end.in_fours, values);
    }
};

// Where a chunk of y that lies in a warp's scratch begins in out.
struct ChunkPlace {
    int row, column;
};

// `chunks` chunks of y: stage(i) puts the i-th into scratch, 16 rows x 32 columns, or for a gated
// activation 16 columns and 16 of what is activated; place(i) is where it goes; sync() lets those
// who stage and those who read meet.
template <typename Place, typename Stage, typename Sync, typename Store = StoreFloats>
__device__ __forceinline__ void finish_chunks(const End& end, int chunks, std::uint8_t* scratch,
                                              const Place& place, const Stage& stage,
                                              const Sync& sync, const Store& store = {}) {
    constexpr int kMost = kThreadRows;
    const int lane = threadIdx.x % 32, lanes = lanes_of_row(end.is_glu);
    const int step = 32 / lanes, first = lane / lanes, offset = lane % lanes * 4;
    // What of row `i` of this thread's, in a chunk at `at`, is there.
    const auto count = [&](int i, ChunkPlace at) {
        const bool exists = first + i * step < kWarpRows && at.row + first + i * step < end.M;
        return exists ? end.width - at.column - offset : 0;
    };
    const auto load_rows = [&](const Rows& x, ChunkPlace at, bool repeats, Four(&into)[kMost]) {
        if (x.data == nullptr) return;
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int m = at.row + first + i * step;
            const std::int64_t start = (repeats ? m / end.rows_of_gate : m) * x.stride;
            into[i] = load_four(x, start + at.column + offset, count(i, at), end.in_fours);
        }
    };
    Four next[kMost] = {};
    load_rows(end.residual, place(0), false, next);
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const ChunkPlace at = place(chunk);
        Four residual[kMost], gate[kMost] = {};
#pragma unroll
        for (int i = 0; i < kMost; ++i) residual[i] = next[i];
        load_rows(end.gate, at, true, gate);
        if (chunk + 1 < chunks) load_rows(end.residual, place(chunk + 1), false, next);
        stage(chunk);
        sync();
#pragma unroll
        for (int i = 0; i < kMost; ++i) {
            const int left = count(i, at), line = first + i * step;
            if (left <= 0) continue;
            float values[4];
            fetch_four(scratch + scratch_offset(line, offset), values);
            if (end.is_glu) {
                float other[4];
                fetch_four(scratch + scratch_offset(line, kChunk / 2 + offset), other);
#pragma unroll
                for (int j = 0; j < 4; ++j) values[j] *= activate(other[j], end.activation);
            } else {
#pragma unroll
                for (int j = 0; j < 4; ++j) values[j] = activate(values[j], end.activation);
            }
            float factor[4] = {1, 1, 1, 1}, sum[4] = {-0.0f, -0.0f, -0.0f, -0.0f};
            if (end.gate.data != nullptr) widen_four(gate[i], end.gate.type, factor);
            if (end.residual.data != nullptr) widen_four(residual[i], end.residual.type, sum);
#pragma unroll
            for (int j = 0; j < 4; ++j) values[j] = fmaf(factor[j], values[j], sum[j]);
            const int m = at.row + line;
            store(end, m * end.out.stride + at.column + offset, i, m, left, values);
        }
        sync();
    }
}

// The warp's 16 rows of y, of a tile's kN columns, from (row, column) of out on. `Q`: what outputs
// of 8 bits are, void for floating ones.
template <int kN, typename Q>
__device__ __forceinline__ void finish_rows(const End& end, const float (&y)[kN / 2], int row,
                                            int column, std::uint8_t* scratch) {
    const int lanes = lanes_of_row(end.is_glu);
    const auto finish = [&](const auto& store) {
        finish_chunks(
            end, kN / kChunk, scratch,
            [&](int chunk) { return ChunkPlace{row, column + chunk * 4 * lanes}; },
            [&](int chunk) { stage_chunk<kN>(y, chunk, end.is_glu, scratch); },
            [] { __syncwarp(); }, store);
    };
    if constexpr (std::is_void_v<Q>) {
        finish(StoreFloats{});
    } else {
        RowQuantizer<Q> quantizer{end.requantized};
        finish([&](const End&, std::int64_t at, int i, int m, int count, float (&values)[4]) {
            const std::uint32_t bytes = quantizer.round(i, m, values, count);
            store_bytes(end.out, at, count, end.in_fours, bytes);
        });
        const int first = threadIdx.x % 32 / lanes, step = 32 / lanes;
        quantizer.report(lanes, column, [&](int i) {
            const int m = row + first + i * step;
            return first + i * step < kWarpRows && m < end.M ? m : -1;
        });
    }
}

}  // namespace fewstep::cuda::gemm8
