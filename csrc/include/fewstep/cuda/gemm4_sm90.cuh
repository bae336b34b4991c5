// The product of 8-bit rows with a 4-bit weight on Hopper. In and the roles:
//
//   top_n  = max_g s_ng     f_ng = round(4096 (s_ng / top_n))     w8_nk = (q_nk f_ng + 128) >> 8
//   acc_nm = sum_k w8_nk a_mk                                exact in int32
//   y_nm   = fma(float(acc_nm) * a_scale_m, top_n / 16, bias_n) + sum_r up_nr low_mr
//   out    = what gemm8_end_sm90.cuh makes of y, transposed
//
// A block stays on its SM. One thread loads slabs of 128 k: rows of a, and the weight's in 4 bits.
// Two warps find the largest scales of a tile's weight, and write the factors f of each slab beside
// it. Two warpgroups multiply: each expands half a slab of its 64 rows to bytes, in the registers
// of the left operand, while the products of the half before run. The low-rank branch follows as
// slabs of 32 r, its left operand in registers too: so a tile's rows can be in any order, and those
// that a gated activation multiplies meet in a thread.
#pragma once

#include "fewstep/cuda/gemm4_plan.h"
#include "fewstep/cuda/gemm8_sm90.cuh"

namespace fewstep::cuda::gemm4 {

using gemm8::TilePlace;

// w_scale is null: `scales` are 16-bit, [N, groups].
struct Params : gemm8::Params {
    const std::uint16_t* scales;
    bool scales_are_half;  // else bfloat16
    bool in_eights;        // eight scales of a row are one access
    int groups;
    int group_shift;     // a group is 32 << group_shift k
    std::uint32_t zero;  // see multiply_slabs
};

// Warps of the loading warpgroup, behind its first, that see to the weight's scales.
constexpr int kFactorWarps = 2;
constexpr int kRowsOfThread = kWeightRows / (32 * kFactorWarps);
constexpr int kSectorScales = 16;  // that memory sends together

template <int kTiling>
struct Config {
    static constexpr Tile kTile = kTiles[kTiling];
    // As gemm8::for_tiles and weight_row see it: rows of a, and rows of w.
    static constexpr int kRows = kTile.columns, kN = kWeightRows;
    static constexpr int kSlots = slots_of(kTile);
    static constexpr int kWarps = gemm8::kMultipliers * kGroupThreads / 32;
    static constexpr int kSharedBytes = fixed_bytes(kTile) + kSlots * kTile.slot_bytes();
    static_assert(kSlots >= 3 && kSharedBytes <= kMaxSharedBytes);
    static_assert((2 * kSlots + 2) * sizeof(std::uint64_t) <= gemm8::kBarrierBytes);

    std::uint8_t* base;

    __device__ Config() : base(gemm8::aligned_shared()) {}
    __device__ std::uint8_t* slot(int i) const { return base + i * kTile.slot_bytes(); }
    __device__ std::uint8_t* packed(int i) const { return slot(i) + kTile.packed_offset(); }
    __device__ std::uint8_t* factors(int i) const { return slot(i) + kTile.factor_offset(); }
    __device__ std::uint8_t* scratch(int warp) const {
        return slot(kSlots) + warp * gemm8::kScratchBytes;
    }
    // Scales of rows of a, then scales, then biases of rows of w.
    __device__ float* vectors(int buffer) const {
        return reinterpret_cast<float*>(scratch(gemm8::kMultipliers * 4)) +
               buffer * vectors_floats(kTile);
    }
    __device__ Barrier& barrier(int i) const { return reinterpret_cast<Barrier*>(vectors(2))[i]; }
    __device__ Barrier& full(int i) const { return barrier(i); }
    __device__ Barrier& empty(int i) const { return barrier(kSlots + i); }
    __device__ Barrier& vectors_empty(int i) const { return barrier(2 * kSlots + i); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kSlots; ++i) {
            full(i).init(1 + kFactorWarps);
            empty(i).init(kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            vectors_empty(i).init(kWarps);
        }
        fence_barriers();
    }
};

// By one thread.
template <class C>
__device__ void load_slabs(const Params& p, const C& shared) {
    RingPosition<C::kSlots> at;
    const auto load = [&](const TensorMap& right, int right_column, const TensorMap& left,
                          int left_column, int row, int column) {
        Barrier& full = shared.full(at.slot);
        shared.empty(at.slot).wait(at.parity ^ 1);
        full.arrive_and_expect_tx(C::kTile.factor_offset());
        load_block(right, {row, 0, 0}, right_column, shared.slot(at.slot), full);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_block(left, {gemm8::weight_row<C>(p, column, half * C::kN / 2), 0, 0}, left_column,
                       shared.packed(at.slot) + half * C::kN / 2 * kPackedBytes, full);
        }
        at.advance();
    };
    gemm8::for_tiles<C>(p, [&](int row, int column, int) {
        for (int s = 0; s < p.slabs; ++s) {
            load(p.a, s * kBlockColumns, p.w, s * kPackedBytes / 2, row, column);
        }
        // Half of what is loaded of low is multiplied, the other half in the next slab.
        for (int s = 0; s < p.branch_slabs; ++s) {
            load(p.low, s / 2 * kBlockColumns, p.up, s * kBranchColumns, row, column);
        }
    });
}

__device__ __forceinline__ float widen_scale(std::uint32_t bits, bool is_half) {
    return is_half ? unpack<__half>(bits).x : unpack<__nv_bfloat16>(bits).x;
}

// The largest of a row's scales, in bits: scales are not negative, so these are in order, and a NaN
// is above all.
__device__ __forceinline__ std::uint32_t largest_scale(const Params& p, int n) {
    const std::uint16_t* const row = p.scales + std::int64_t{n} * p.groups;
    std::uint32_t top = 0;
    const auto see = [&](std::uint32_t bits) { top = max(top, bits & 0x7fffu); };
    if (p.in_eights) {
#pragma unroll 4
        for (int g = 0; g < p.groups; g += 8) {
            const uint4 eight = *reinterpret_cast<const uint4*>(row + g);
            for (const std::uint32_t pair : {eight.x, eight.y, eight.z, eight.w}) {
                see(pair);
                see(pair >> 16);
            }
        }
        return top;
    }
    for (int g = 0; g < p.groups; ++g) see(row[g]);
    return top;
}

// f of a scale; 0 where the row has no largest scale, or an infinite one. The division and the
// rounding are IEEE's: every implementation has the same f.
__device__ __forceinline__ std::uint32_t factor_of(float scale, float top) {
    const bool used = top > 0.0f && top <= 3.4028235e38f;
    return used ? static_cast<std::uint32_t>(rintf(4096.0f * (scale / top))) : 0u;
}

// By kFactorWarps warps: the factors of every slab's groups; before them, the vectors of its tile,
// so that who has waited for a slab finds these, too.
template <class C>
__device__ void load_factors(const Params& p, const C& shared) {
    const int thread = threadIdx.x % (32 * kFactorWarps);
    RingPosition<C::kSlots> at;
    gemm8::for_tiles<C>(p, [&](int row, int column, int index) {
        const int buffer = index % 2;
        int rows[kRowsOfThread];  // of w; those that are not there have n = N
        float tops[kRowsOfThread];
        // Before the first tile nobody has anything to do but wait for these scales: they come at
        // once, not one after the other.
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            rows[i] = gemm8::weight_row<C>(p, column, thread + i * 32 * kFactorWarps);
            rows[i] = rows[i] < p.N ? rows[i] : p.N;
            if (index > 0 || rows[i] == p.N) continue;
            for (int g = 0; g < p.groups; g += kSectorScales) {
                prefetch_global(p.scales + std::int64_t{rows[i]} * p.groups + g);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            const std::uint32_t top = rows[i] < p.N ? largest_scale(p, rows[i]) : 0;
            tops[i] = widen_scale(top, p.scales_are_half);
        }
        shared.vectors_empty(buffer).wait((index / 2 & 1) ^ 1);
        float* const vectors = shared.vectors(buffer);
        for (int i = thread; i < C::kRows; i += 32 * kFactorWarps) {
            vectors[i] = row + i < p.end.M ? p.a_scale[row + i] : 0;
        }
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            float* const mine = vectors + C::kRows + thread + i * 32 * kFactorWarps;
            mine[0] = tops[i] * 0.0625f;
            mine[kWeightRows] = rows[i] < p.N && p.bias != nullptr
                                    ? gemm8::load_bias(p.bias, p.bias_type, rows[i])
                                    : 0;
        }
#pragma unroll 1
        for (int s = 0; s < p.slabs + p.branch_slabs; ++s) {
            std::uint32_t scales[kRowsOfThread][kFactors] = {};
            // Asked for before the wait. A group of more than 32 k is looked up once.
            const auto begins = [&](int k) { return (k & ((1 << p.group_shift) - 1)) == 0; };
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) {
#pragma unroll
                for (int k = 0; k < kFactors; ++k) {
                    const int g = (s * kFactors + k) >> p.group_shift;
                    if (begins(k) && rows[i] < p.N && g < p.groups) {
                        scales[i][k] = p.scales[std::int64_t{rows[i]} * p.groups + g];
                    }
                }
            }
            shared.empty(at.slot).wait(at.parity ^ 1);
            if (s < p.slabs) {
#pragma unroll
                for (int i = 0; i < kRowsOfThread; ++i) {
                    std::uint32_t f[kFactors];
#pragma unroll
                    for (int k = 0; k < kFactors; ++k) {
                        if (k == 0 || begins(k)) {
                            f[k] = factor_of(widen_scale(scales[i][k], p.scales_are_half), tops[i]);
                        } else {
                            f[k] = f[k > 0 ? k - 1 : 0];
                        }
                    }
                    const uint2 packed = {f[0] | f[1] << 16, f[2] | f[3] << 16};
                    const int line = thread + i * 32 * kFactorWarps;
                    *reinterpret_cast<uint2*>(shared.factors(at.slot) + line * kFactors * 2) =
                        packed;
                }
                __syncwarp();
            }
            gemm8::release(shared.full(at.slot));
            at.advance();
        }
    });
}

// Four neighbouring w8 from four nibbles: two by two (u f + 0x8080 - 8 f) in halves of a word, of
// which the upper bytes are w8 + 128 (csrc/cpu/gemm_w4a8.cpp has the bounds).
__device__ __forceinline__ std::uint32_t expand(std::uint32_t nibbles, std::uint32_t f,
                                                std::uint32_t offsets, std::uint32_t mask) {
    const std::uint32_t apart = permute_bytes(nibbles, 0, 0x4140);
    const std::uint32_t even = two_nibbles(apart, mask) * f + offsets;
    const std::uint32_t odd = two_nibbles(apart >> 4, mask) * f + offsets;
    return permute_bytes(even, odd, 0x7351) ^ 0x80808080u;
}

// Where a multiplying thread's two rows of a left operand lie in a slot, 64 bytes each.
struct LeftRows {
    int row;       // of the tile's weight
    int distance;  // to the second

    __device__ LeftRows(int group, int thread, bool is_glu) {
        row = tile_row(group, accumulator_row(thread, 0), is_glu);
        distance = tile_row(group, accumulator_row(thread, 2), is_glu) - row;
    }
    // Both rows are swizzled alike, as they are a multiple of eight apart.
    template <typename T>
    __device__ __forceinline__ T read(const std::uint8_t* packed, int second, int at) const {
        return *reinterpret_cast<const T*>(packed + half_row_offset(row, at) +
                                           second * distance * kPackedBytes);
    }
};

// The left operand of half a slab: its bytes of 64 k.
template <int kHalf>
__device__ __forceinline__ void expand_half(const LeftRows& rows, const std::uint8_t* packed,
                                            const uint2 (&factors)[2], std::uint32_t mask,
                                            int thread, std::uint32_t (&left)[8]) {
#pragma unroll
    for (int second = 0; second < 2; ++second) {
        const std::uint32_t pair = kHalf == 0 ? factors[second].x : factors[second].y;
#pragma unroll
        for (int step = 0; step < 2; ++step) {
            const std::uint32_t f = step == 0 ? pair & 0xffffu : pair >> 16;
            const std::uint32_t offsets = offsets_of(f);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int i = 2 * half + second;
                const int at = (kHalf * 64 + step * 32 + mixed_column(thread, i)) / 2;
                left[4 * step + i] =
                    expand(rows.template read<std::uint16_t>(packed, second, at), f, offsets, mask);
            }
        }
    }
}

// acc += w8 a^T over all slabs.
template <class C>
__device__ __forceinline__ void multiply_slabs(const Params& p, const C& shared,
                                               const LeftRows& rows, int thread,
                                               RingPosition<C::kSlots>& at,
                                               std::uint32_t (&acc)[C::kRows / 2]) {
    // Of an instruction's two constants only one is free. The compiler knows neither from here on
    // that this is one, so it keeps it in a register instead of making two instructions.
    const std::uint32_t mask = kNibbles ^ p.zero;
    std::uint32_t left[2][8];
    int previous = 0;
    const auto multiply = [&](std::uint32_t (&half)[8], std::uint64_t right) {
        fence_registers(half);
        fence_registers(acc);
        begin_products();
        multiply_mixed<std::int8_t, C::kRows, 2>(half, right, acc);
        commit_products();
        wait_products<1>();
        fence_registers(acc);
    };
#pragma unroll 1
    for (int s = 0; s < p.slabs; ++s) {
        shared.full(at.slot).wait(at.parity);
        const std::uint8_t* const packed = shared.packed(at.slot);
        const std::uint32_t right = shared_address(shared.slot(at.slot));
        uint2 factors[2];
#pragma unroll
        for (int second = 0; second < 2; ++second) {
            factors[second] = *reinterpret_cast<const uint2*>(
                shared.factors(at.slot) + (rows.row + second * rows.distance) * kFactors * 2);
        }
        expand_half<0>(rows, packed, factors, mask, thread, left[0]);
        multiply(left[0], matrix_descriptor(right, 0));
        if (s > 0) gemm8::release(shared.empty(previous));
        expand_half<1>(rows, packed, factors, mask, thread, left[1]);
        multiply(left[1], matrix_descriptor(right + 64, 0));
        previous = at.slot;
        at.advance();
    }
    wait_products<0>();
    fence_registers(acc);
    gemm8::release(shared.empty(previous));
}

// y += up low^T, products of 16-bit values with float32 sums.
template <typename T, class C>
__device__ __forceinline__ void add_branch(const Params& p, const C& shared, const LeftRows& rows,
                                           int thread, RingPosition<C::kSlots>& at,
                                           float (&y)[C::kRows / 2]) {
#pragma unroll 1
    for (int s = 0; s < p.branch_slabs; ++s) {
        shared.full(at.slot).wait(at.parity);
        std::uint32_t left[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            left[i] = rows.template read<std::uint32_t>(shared.packed(at.slot), i % 2,
                                                        i / 4 * 32 + mixed_column(thread, i % 4));
        }
        fence_registers(left);
        fence_registers(y);
        begin_products();
        multiply_mixed<T, C::kRows, 2>(
            left,
            matrix_descriptor(shared_address(shared.slot(at.slot)) + s % 2 * (kRowBytes / 2), 0),
            y);
        commit_products();
        wait_products<0>();
        fence_registers(y);
        gemm8::release(shared.empty(at.slot));
        at.advance();
    }
}

// 32 rows of a of a warpgroup's y, from `chunk`, to the scratches of its four warps.
template <int kRows>
__device__ __forceinline__ void stage_chunk(const float (&y)[kRows / 2], int chunk, bool is_glu,
                                            int thread, std::uint8_t* scratch) {
#pragma unroll
    for (int i = 0; i < kRows / gemm8::kChunk; ++i) {
        if (i != chunk) continue;
#pragma unroll
        for (int v = 0; v < 16; ++v) {
            const ScratchPlace to =
                scratch_place(accumulator_row(thread, v), accumulator_column(thread, v), is_glu);
            *reinterpret_cast<float*>(scratch + to.warp * gemm8::kScratchBytes +
                                      gemm8::scratch_offset(to.row, to.column)) = y[16 * i + v];
        }
    }
}

template <class C>
__device__ void multiply_tiles(const Params& p, const C& shared, int group) {
    constexpr int kRows = C::kRows;
    const int thread = threadIdx.x % kGroupThreads, warp = thread / 32;
    const bool is_glu = p.end.is_glu;
    const LeftRows rows(group, thread, is_glu);
    std::uint8_t* const scratch = shared.scratch(group * 4);
    RingPosition<C::kSlots> at;
    gemm8::for_tiles<C>(p, [&](int row, int column, int index) {
        float y[kRows / 2];
        {
            std::uint32_t acc[kRows / 2];
#pragma unroll
            for (int i = 0; i < kRows / 2; ++i) acc[i] = 0;
            multiply_slabs(p, shared, rows, thread, at, acc);
            const int buffer = index % 2;  // full since the tile's first slab was
            const float* const vectors = shared.vectors(buffer);
            const float* const mine = vectors + kRows + rows.row;
            const float w_scale[2] = {mine[0], mine[rows.distance]};
            const float bias[2] = {mine[kWeightRows], mine[kWeightRows + rows.distance]};
#pragma unroll
            for (int i = 0; i < kRows / 2; i += 4) {
                const float2 a_scale =
                    *reinterpret_cast<const float2*>(vectors + accumulator_column(thread, i));
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float scaled =
                        gemm8::as_float(acc[i + j]) * (j % 2 == 0 ? a_scale.x : a_scale.y);
                    y[i + j] = fmaf(scaled, w_scale[j / 2], bias[j / 2]);
                }
            }
            __syncwarp();  // all lanes have read
            gemm8::release(shared.vectors_empty(buffer));
        }
        if (p.branch_slabs > 0) {
            if (p.low_is_half) {
                add_branch<__half>(p, shared, rows, thread, at, y);
            } else {
                add_branch<__nv_bfloat16>(p, shared, rows, thread, at, y);
            }
        }
        // The four scratches are two by two: 16 rows of a, then columns of out.
        const int width = 4 * gemm8::lanes_of_row(is_glu);
        const int chunks = gemm8::tiles_of(p.end.M - row, gemm8::kChunk);
        gemm8::finish_chunks(
            p.end, chunks < kRows / gemm8::kChunk ? chunks : kRows / gemm8::kChunk,
            scratch + warp * gemm8::kScratchBytes,
            [&](int chunk) {
                return gemm8::ChunkPlace{row + chunk * gemm8::kChunk + warp / 2 * 16,
                                         column + (2 * group + warp % 2) * width};
            },
            [&](int chunk) { stage_chunk<kRows>(y, chunk, is_glu, thread, scratch); },
            [&] { sync_named(1 + group, kGroupThreads); });
    });
}

template <class C>
__global__ void __launch_bounds__(gemm8::kThreads, 1)
    gemm4_sm90_kernel(const __grid_constant__ Params p) {
    const C shared;
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    if (threadIdx.x < kGroupThreads) {
        give_registers<gemm8::kLoaderRegisters>();
        if (threadIdx.x == 0) load_slabs(p, shared);
        if (threadIdx.x / 64 == 1) load_factors(p, shared);
    } else {
        take_registers<gemm8::kMultiplierRegisters>();
        multiply_tiles(p, shared, static_cast<int>(threadIdx.x / kGroupThreads) - 1);
    }
}

}  // namespace fewstep::cuda::gemm4
