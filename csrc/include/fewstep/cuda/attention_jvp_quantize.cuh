// 8-bit operands of attention_jvp's scores: what is rounded to what is in
// python/fewstep/reference/_scores8.py. Three passes over the rows of queries and keys:
//
//     centres   z and t_z, the means of k and t_k over 128 of the keys
//     sizes     the largest rows of q, t_q, k - z, t_k - t_z, for the ratio a of a head
//     rows      rotated (int8), scaled, rounded; what z and t_z are to the scores of a query
//
// A row and its tangent are the two halves of one row of bytes, so that one bulk load brings both.
#pragma once

#include "fewstep/cuda/attention_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

constexpr int kSamples = 128;
constexpr int kRowThreads = 8;  // that share a row: chunks of 8 columns in turn
constexpr int kQuantizeThreads = 256;
constexpr int kQuantizeRows = kQuantizeThreads / kRowThreads;  // of a block

// Queries or keys. [B, heads, rows, D].
struct Side {
    const void *x, *t_x;  // t_x: null for zero, and no second half of the row of bytes
    Strides strides, t_strides;
    std::uint8_t* bytes;     // [B, heads, rows, kW or 2 kW]
    float* scales;           // [B, heads, rows]
    float *shift, *t_shift;  // the same, of queries: q z and t_q z + q t_z
    int heads, rows, tiles;  // tiles: blocks of a head
};

struct QuantizeParams {
    Side queries, keys;
    float* centres;  // [B, G, 2, kW]: z, t_z
    float* largest;  // [B, G, 4]: 1-norms of q, t_q, k - z, t_k - t_z
    int head_dim, query_blocks;
};

// The least power of 2 that isn't below x > 0.
__device__ __forceinline__ float power_above(float x) {
    int exponent;
    const float mantissa = frexpf(x, &exponent);
    return ldexpf(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}

// The tangents' scales over the primals', of the heads that share keys.
template <typename Format>
__device__ __forceinline__ float tangent_ratio(const float* largest) {
    float ratio = 0;
#pragma unroll
    for (int side = 0; side < 4; side += 2) {
        const float size = largest[side], t_size = largest[side + 1];
        if (size > 0 && t_size > 0) ratio = fmaxf(ratio, t_size / size);
    }
    if (ratio == 0) return 1;
    return std::is_same_v<Format, std::int8_t> ? ratio : power_above(ratio);
}

// The rows of a block of threads.
struct Rows8 {
    const Side& side;
    bool are_keys;
    int batch, head, row;  // row: of this thread
    int kv;                // batch item and key head, in centres and largest

    __device__ explicit Rows8(const QuantizeParams& p)
        : side(static_cast<int>(blockIdx.x) < p.query_blocks ? p.queries : p.keys),
          are_keys(static_cast<int>(blockIdx.x) >= p.query_blocks) {
        const int block = static_cast<int>(blockIdx.x) - (are_keys ? p.query_blocks : 0);
        row = block % side.tiles * kQuantizeRows + static_cast<int>(threadIdx.x) / kRowThreads;
        head = block / side.tiles % side.heads;
        batch = block / side.tiles / side.heads;
        kv = batch * p.keys.heads + head / (side.heads / p.keys.heads);
    }
    __device__ bool exists() const { return row < side.rows; }
    __device__ std::int64_t index() const {
        return (static_cast<std::int64_t>(batch) * side.heads + head) * side.rows + row;
    }
};

// Column of value i of this thread, i a multiple of 8.
__device__ __forceinline__ int column_of(int i) {
    return (i + static_cast<int>(threadIdx.x) % kRowThreads) * 8;
}

template <typename T, int kW>
__device__ __forceinline__ void load_row(const Rows8& at, const void* data, const Strides& strides,
                                         int head_dim, float (&x)[kW / 8]) {
#pragma unroll
    for (int i = 0; i < kW / 8; i += 8) {
        uint4 chunk = {};
        if (data != nullptr && at.exists() && column_of(i) < head_dim) {
            const T* row = static_cast<const T*>(data) + at.batch * strides.b +
                           at.head * strides.h + at.row * strides.row;
            chunk = *reinterpret_cast<const uint4*>(row + column_of(i));
        }
        const std::uint32_t pairs[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float2 pair = unpack<T>(pairs[j]);
            x[i + 2 * j] = pair.x;
            x[i + 2 * j + 1] = pair.y;
        }
    }
}

// This block's row and its tangent, keys about their centres.
template <typename T, int kW>
__device__ __forceinline__ void load_rows(const QuantizeParams& p, const Rows8& at,
                                          float (&x)[kW / 8], float (&t_x)[kW / 8]) {
    load_row<T, kW>(at, at.side.x, at.side.strides, p.head_dim, x);
    load_row<T, kW>(at, at.side.t_x, at.side.t_strides, p.head_dim, t_x);
    if (!at.are_keys) return;
    const float* centre = p.centres + static_cast<std::int64_t>(at.kv) * 2 * kW;
#pragma unroll
    for (int i = 0; i < kW / 8; ++i) {
        x[i] -= centre[column_of(i / 8 * 8) + i % 8];
        t_x[i] -= centre[kW + column_of(i / 8 * 8) + i % 8];
    }
}

__device__ __forceinline__ float row_sum(float x) {
#pragma unroll
    for (int distance = 1; distance < kRowThreads; distance *= 2) x += shuffle_xor(x, distance);
    return x;
}
__device__ __forceinline__ float row_max(float x) {
#pragma unroll
    for (int distance = 1; distance < kRowThreads; distance *= 2) {
        x = fmaxf(x, shuffle_xor(x, distance));
    }
    return x;
}

// x R, by butterflies: among a thread's values, then between the threads of the row.
template <int kW>
__device__ __forceinline__ void rotate(float (&x)[kW / 8]) {
#pragma unroll
    for (int step = 1; step < kW / 8; step *= 2) {
#pragma unroll
        for (int i = 0; i < kW / 8; ++i) {
            if (i / step % 2 != 0) continue;
            const float low = x[i], high = x[i + step];
            x[i] = low + high;
            x[i + step] = low - high;
        }
    }
#pragma unroll
    for (int distance = 1; distance < kRowThreads; distance *= 2) {
        const bool is_high = threadIdx.x / distance % 2 != 0;
#pragma unroll
        for (int i = 0; i < kW / 8; ++i) {
            const float other = shuffle_xor(x[i], distance);
            x[i] = is_high ? other - x[i] : x[i] + other;
        }
    }
    static_assert(kW == 64 || kW == 128);
#pragma unroll
    for (int i = 0; i < kW / 8; ++i) x[i] *= kW == 64 ? 0.125f : 0.088388347648318447f;
}

// A block for each batch item and key head, a thread for each column.
template <typename T, int kW>
__global__ void __launch_bounds__(kW)
    attention_jvp_centres_kernel(const __grid_constant__ QuantizeParams p) {
    const int kv = static_cast<int>(blockIdx.x), column = static_cast<int>(threadIdx.x);
    const Side& keys = p.keys;
    const auto mean = [&](const void* data, const Strides& strides) {
        if (data == nullptr || column >= p.head_dim) return 0.0f;
        const T* x = static_cast<const T*>(data) + kv / keys.heads * strides.b +
                     kv % keys.heads * strides.h + column;
        const int count = min(keys.rows, kSamples);
        float sum = 0;
        for (int i = 0; i < count; ++i) {
            const std::int64_t row = static_cast<std::int64_t>(i) * keys.rows / count;
            const float value = load(x[row * strides.row]);
            if (fabsf(value) < kInfinity) sum += value;
        }
        return sum / static_cast<float>(count);
    };
    float* centre = p.centres + static_cast<std::int64_t>(kv) * 2 * kW;
    centre[column] = mean(keys.x, keys.strides);
    centre[kW + column] = mean(keys.t_x, keys.t_strides);
    if (column < 4) p.largest[kv * 4 + column] = 0;
}

template <typename T, int kW>
__global__ void __launch_bounds__(kQuantizeThreads)
    attention_jvp_sizes_kernel(const __grid_constant__ QuantizeParams p) {
    const Rows8 at(p);
    float values[2][kW / 8];
    load_rows<T, kW>(p, at, values[0], values[1]);
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        float size = 0;
#pragma unroll
        for (int i = 0; i < kW / 8; ++i) size += fabsf(values[t][i]);
        size = row_sum(size);
        // Rows that don't exist say nothing, and neither do those that aren't finite.
        if (!at.exists() || !(size < kInfinity)) size = 0;
#pragma unroll
        for (int distance = kRowThreads; distance < 32; distance *= 2) {
            size = fmaxf(size, shuffle_xor(size, distance));
        }
        if (threadIdx.x % 32 == 0) {
            atomic_max(p.largest + at.kv * 4 + (at.are_keys ? 2 : 0) + t, size);
        }
    }
}

template <typename T, typename Format, int kW>
__global__ void __launch_bounds__(kQuantizeThreads)
    attention_jvp_rows_kernel(const __grid_constant__ QuantizeParams p) {
    constexpr bool kInteger = std::is_same_v<Format, std::int8_t>;
    const Rows8 at(p);
    const Side& side = at.side;
    float x[kW / 8], t_x[kW / 8];
    load_rows<T, kW>(p, at, x, t_x);
    const bool writes = at.exists() && threadIdx.x % kRowThreads == 0;
    if (!at.are_keys) {
        const float* centre = p.centres + static_cast<std::int64_t>(at.kv) * 2 * kW;
        float shift = 0, t_shift = 0;
#pragma unroll
        for (int i = 0; i < kW / 8; ++i) {
            const int column = column_of(i / 8 * 8) + i % 8;
            const float z = centre[column], t_z = centre[kW + column];
            shift = fmaf(x[i], z, shift);
            t_shift = fmaf(t_x[i], z, fmaf(x[i], t_z, t_shift));
        }
        shift = row_sum(shift);
        t_shift = row_sum(t_shift);
        if (writes) {
            side.shift[at.index()] = shift;
            side.t_shift[at.index()] = t_shift;
        }
    }
    if constexpr (kInteger) {
        rotate<kW>(x);
        rotate<kW>(t_x);
    }
    const float ratio = tangent_ratio<Format>(p.largest + at.kv * 4), inverse_ratio = 1 / ratio;
    float top = 0, poison = 0;  // poison: NaN if a value isn't finite, which maxima don't see
#pragma unroll
    for (int i = 0; i < kW / 8; ++i) {
        top = fmaxf(top, fmaxf(fabsf(x[i]), fabsf(t_x[i]) * inverse_ratio));
        poison += 0 * x[i] + 0 * t_x[i];
    }
    top = row_max(top);
    if (top == 0) top = 1;
    const float unit = (kInteger ? top / 127.0f : power_above(top / 448.0f)) + row_sum(poison);
    if (writes) side.scales[at.index()] = unit;
    if (!at.exists()) return;
    const int row_bytes = side.t_x == nullptr ? kW : 2 * kW;
    std::uint8_t* bytes = side.bytes + at.index() * row_bytes;
    const float inverse = 1 / unit, t_inverse = inverse * inverse_ratio;
#pragma unroll
    for (int i = 0; i < kW / 8; i += 8) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            x[i + j] *= inverse;
            t_x[i + j] *= t_inverse;
        }
        const auto store = [&](std::uint8_t* target, const float* values) {
            *reinterpret_cast<uint2*>(target) = {pack_bytes<Format>(values),
                                                 pack_bytes<Format>(values + 4)};
        };
        store(bytes + column_of(i), x + i);
        if (side.t_x != nullptr) store(bytes + kW + column_of(i), t_x + i);
    }
}

}  // namespace fewstep::cuda::attention_jvp_kernel
