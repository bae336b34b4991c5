// Outputs of a Hopper product in 8 bits, by a limit for each row that is given beforehand, so that
// nothing waits for a row to be whole (python/fewstep/ops/_requantize.py has the contract):
//
//   int8   q = round(clamp(v (127 / limit), +-127))     scale = limit / 127
//   e4m3   q = round(clamp(v / (limit / 448), +-448))   scale = limit / 448
//
// and what the next limits are made of: amax_m = max_n |v_mn|, and how many outputs exceeded
// theirs.
#pragma once

#include <cmath>
#include <cstring>

#include "fewstep/cuda/gemm8_plan.h"
#include "fewstep/cuda/hopper.cuh"
#include "fewstep/ops/quantize_fp8.h"
#include "fewstep/ops/quantize_int8.h"

namespace fewstep::cuda::gemm8 {

// All but the limits begin as zeros: tiles add what they find.
struct Requantized {
    const float* limit;       // [M]
    std::uint32_t* scale;     // [M], bits of floats
    std::uint32_t* amax;      // [M], likewise
    std::uint32_t* exceeded;  // one number
};

constexpr std::uint32_t kInfinityBits = 0x7f800000, kNanBits = 0x7fc00000;

__device__ __forceinline__ std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
__device__ __forceinline__ float float_of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

constexpr int kThreadRows = kWarpRows * kChunk / 4 / 32;  // of a chunk, that a thread finishes

// What a thread finds in its rows of a tile. Bits without the sign have
// the order of magnitudes, with infinity and NaN on top.
template <typename Q>
struct RowQuantizer {
    static constexpr bool kIsFloat = std::is_same_v<Q, Float8>;
    static constexpr float kTop = kIsFloat ? kQuantizeFp8Top : 127.0f;
    static constexpr float kTiny = kIsFloat ? kQuantizeFp8Tiny : kQuantizeInt8Tiny;

    const Requantized& given;
    std::uint32_t top[kThreadRows] = {}, exceeded = 0;

    __device__ __forceinline__ static bool is_used(float limit) {
        return limit >= kTiny && limit < INFINITY;
    }

    // Four outputs, of which `count` exist, of the thread's row i, which is row m of out, as bytes.
    // The limit is read again for every chunk: registers are what an end has least of.
    __device__ __forceinline__ std::uint32_t round(int i, int m, float (&v)[4], int count) {
        const float limit = given.limit[m];
        const bool used = is_used(limit);
        // int8 by a factor and e4m3 by a division, as quantize_int8 and quantize_fp8 have it.
        const float unit = !used ? 1.0f : kIsFloat ? limit / kTop : kTop / limit;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (j < count) {
                const std::uint32_t magnitude = bits_of(v[j]) & 0x7fffffff;
                top[i] = magnitude > top[i] ? magnitude : top[i];
                exceeded += !(fabsf(v[j]) <= limit);
            }
            const float x = kIsFloat ? v[j] / unit : v[j] * unit;
            v[j] = used ? fminf(fmaxf(x, -kTop), kTop) : 0.0f;
        }
        return pack_bytes<Q>(v);
    }

    // Once all columns of the tile, which begins at `column`, have been through; by whole warps, of
    // which `lanes` share a row, the i-th of them row m(i), or -1.
    template <typename RowOf>
    __device__ __forceinline__ void report(int lanes, int column, const RowOf& m) {
#pragma unroll
        for (int i = 0; i < kThreadRows; ++i) {
            std::uint32_t bits = top[i];
#pragma unroll
            for (int distance = 1; distance < 8; distance *= 2) {
                const std::uint32_t other = bits_of(shuffle_xor(float_of_bits(bits), distance));
                bits = distance < lanes && other > bits ? other : bits;
            }
            if (m(i) < 0 || threadIdx.x % lanes != 0) continue;
            const float limit = given.limit[m(i)];
            atomic_max_bits(given.amax + m(i), bits);
            // A row that is not finite leaves none of its integers plausible, whatever they are.
            const float scale = is_used(limit) ? limit / kTop : 1.0f;
            const bool finite = bits < kInfinityBits && limit < INFINITY;
            if (column == 0 || !finite) {
                atomic_max_bits(given.scale + m(i), finite ? bits_of(scale) : kNanBits);
            }
        }
        if (exceeded != 0) atomic_add(given.exceeded, exceeded);
    }
};

}  // namespace fewstep::cuda::gemm8
