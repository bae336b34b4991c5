// Products of rows in 8 bits on Hopper: the loop over tiles and slabs. In and the roles:
//
//   acc_mn = sum_k a_mk w_nk                   int8: exact in int32; e4m3: float32 every 128 k
//   y_mn   = fma(float(acc_mn) * a_scale_m, w_scale_n, bias_n) + sum_r low_mr up_nr
//   out    = what gemm8_end_sm90.cuh makes of y
//
// A block stays on its SM. One thread loads: slabs of 128 k of both operands through a ring of
// slots, then the low-rank branch as slabs of 64 r, which meet y as it lies in the accumulator's
// registers. One warp fetches the scales and the bias of a tile's columns ahead of time. Two
// warpgroups multiply, as gemm8_plan.h says. A gated activation's tile takes half of its columns
// from either half of the weight.
#pragma once

#include "fewstep/cuda/gemm8_end_sm90.cuh"

namespace fewstep::cuda::gemm8 {

constexpr int kThreads = (1 + kMultipliers) * kGroupThreads;
// Registers of a thread by role: together 168 for each of 384 threads, all that there are.
constexpr int kLoaderRegisters = 40, kMultiplierRegisters = 232;
static_assert(kLoaderRegisters + kMultipliers * kMultiplierRegisters == 504);

struct Params {
    TensorMap a, w, low, up;
    const float* a_scale;
    const float* w_scale;
    const void* bias;
    DType bias_type;
    bool low_is_half;  // else bfloat16
    int N;             // rows of w
    int slabs, branch_slabs, rank;
    int row_tiles, column_tiles;
    End end;
};

__device__ __forceinline__ std::uint8_t* aligned_shared() {
    std::uint8_t* const raw = dynamic_shared();
    const std::uint32_t past = shared_address(raw) % kAlignment;
    return raw + (past == 0 ? 0 : kAlignment - past);
}

// Several products with the same N, K and activation, whose tiles make one list.
constexpr int kMostProblems = 8;
struct GroupParams {
    Params problems[kMostProblems];
    int tiles;
};
static_assert(sizeof(GroupParams) <= 32764);  // of a kernel, from CUDA 12.1 on

// The warp-wide facts of a kernel, and its shared memory.
template <typename In_, int kTiling, typename Given_ = Params, bool kRequantizes = false>
struct Config {
    using In = In_;
    using Given = Given_;
    using Output = std::conditional_t<kRequantizes, In, void>;  // of 8 bits, else floating
    static constexpr bool kPromotes = !std::is_same_v<In, std::int8_t>;
    static constexpr Tile kTile = kTiles[kPromotes][kTiling];
    static constexpr int kParts = kTile.parts, kN = kTile.columns, kRows = kTile.rows();
    static constexpr bool kInTurns = kTile.in_turns;
    static constexpr int kSlots = slots_of(kTile);
    static constexpr int kWarps = (kInTurns ? 1 : kMultipliers) * kGroupThreads / 32;  // of a tile
    static constexpr int kSharedBytes = fixed_bytes(kTile) + kSlots * kTile.slot_bytes();
    static_assert(kSlots >= 3 && kSharedBytes <= kMaxSharedBytes);
    static_assert((2 * kSlots + 6) * sizeof(std::uint64_t) <= kBarrierBytes);

    std::uint8_t* base;

    __device__ Config() : base(aligned_shared()) {}
    __device__ std::uint8_t* slot(int i) const { return base + i * kTile.slot_bytes(); }
    __device__ std::uint8_t* scratch(int warp) const { return slot(kSlots) + warp * kScratchBytes; }
    // Scales, then biases of a tile's columns.
    __device__ float* vectors(int buffer) const {
        return reinterpret_cast<float*>(scratch(kMultipliers * 4)) + buffer * 2 * kN;
    }
    __device__ Barrier& barrier(int i) const { return reinterpret_cast<Barrier*>(vectors(2))[i]; }
    __device__ Barrier& full(int i) const { return barrier(i); }
    __device__ Barrier& empty(int i) const { return barrier(kSlots + i); }
    __device__ Barrier& vectors_full(int i) const { return barrier(2 * kSlots + i); }
    __device__ Barrier& vectors_empty(int i) const { return barrier(2 * kSlots + 2 + i); }
    __device__ Barrier& turn(int group) const { return barrier(2 * kSlots + 4 + group); }

    __device__ void init_barriers() const {
        for (int i = 0; i < kSlots; ++i) {
            full(i).init(1);
            empty(i).init(kWarps);
        }
        for (int i = 0; i < 2; ++i) {
            vectors_full(i).init(1);
            vectors_empty(i).init(kWarps);
            turn(i).init(1);
        }
        fence_barriers();
    }
};

// Calls f(row, first column of out, index in the block) for each of this block's tiles.
template <class C, typename F>
__device__ __forceinline__ void for_tiles(const Params& p, const F& f) {
    const int columns = p.end.is_glu ? C::kN / 2 : C::kN;
    int i = 0;
    for (int tile = blockIdx.x; tile < p.row_tiles * p.column_tiles; tile += gridDim.x, ++i) {
        const TilePlace place = place_of(tile, p.row_tiles, p.column_tiles, C::kTile.group);
        f(place.row * C::kRows, place.column * columns, i);
    }
}

// Likewise f(product, row, first column, index), where there may be several products.
template <class C, typename F>
__device__ __forceinline__ void for_products(const Params& p, const F& f) {
    for_tiles<C>(p, [&](int row, int column, int i) { f(p, row, column, i); });
}
template <class C, typename F>
__device__ __forceinline__ void for_products(const GroupParams& group, const F& f) {
    int i = 0;
    for (int at = blockIdx.x; at < group.tiles; at += gridDim.x, ++i) {
        const Params* p = group.problems;
        int tile = at;
        for (; tile >= p->row_tiles * p->column_tiles; ++p) {
            tile -= p->row_tiles * p->column_tiles;
        }
        const TilePlace place = place_of(tile, p->row_tiles, p->column_tiles, C::kTile.group);
        f(*p, place.row * C::kRows, place.column * (p->end.is_glu ? C::kN / 2 : C::kN), i);
    }
}

// The row of w that column `i` of a tile stands for; the second half of a gated one's is N / 2
// further on.
template <class C>
__device__ __forceinline__ int weight_row(const Params& p, int column, int i) {
    return column + i + (p.end.is_glu && i >= C::kN / 2 ? p.N / 2 - C::kN / 2 : 0);
}

// By one thread.
template <class C>
__device__ void load_slabs(const typename C::Given& given, const C& shared) {
    RingPosition<C::kSlots> at;
    const auto load = [&](const Params& p, const TensorMap& left, const TensorMap& right, int row,
                          int column, int slab) {
        std::uint8_t* const slot = shared.slot(at.slot);
        Barrier& full = shared.full(at.slot);
        shared.empty(at.slot).wait(at.parity ^ 1);
        full.arrive_and_expect_tx(C::kTile.slot_bytes());
        load_block(left, {row, 0, 0}, slab * kBlockColumns, slot, full);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            load_block(right, {weight_row<C>(p, column, half * C::kN / 2), 0, 0},
                       slab * kBlockColumns, slot + (C::kRows + half * C::kN / 2) * kRowBytes,
                       full);
        }
        at.advance();
    };
    for_products<C>(given, [&](const Params& p, int row, int column, int) {
        for (int s = 0; s < p.slabs; ++s) load(p, p.a, p.w, row, column, s);
        for (int s = 0; s < p.branch_slabs; ++s) load(p, p.low, p.up, row, column, s);
    });
}

__device__ __forceinline__ float load_bias(const void* bias, DType type, int at) {
    switch (type) {
        case DType::kFloat32: return static_cast<const float*>(bias)[at];
        case DType::kBFloat16: return load(static_cast<const __nv_bfloat16*>(bias)[at]);
        default: return load(static_cast<const __half*>(bias)[at]);
    }
}

// By one warp.
template <class C>
__device__ void load_vectors(const typename C::Given& given, const C& shared) {
    const int lane = threadIdx.x % 32;
    for_products<C>(given, [&](const Params& p, int, int column, int index) {
        const int buffer = index % 2;
        shared.vectors_empty(buffer).wait((index / 2 & 1) ^ 1);
        float* const vectors = shared.vectors(buffer);
        for (int i = lane; i < C::kN; i += 32) {
            const int n = weight_row<C>(p, column, i);
            vectors[i] = n < p.N ? p.w_scale[n] : 0;
            vectors[C::kN + i] =
                n < p.N && p.bias != nullptr ? load_bias(p.bias, p.bias_type, n) : 0;
        }
        __syncwarp();
        if (lane == 0) shared.vectors_full(buffer).arrive();
    });
}

// Lane 0 speaks for its warp.
__device__ __forceinline__ void release(Barrier& barrier) {
    if (threadIdx.x % 32 == 0) barrier.arrive();
}

template <int kSlots>
__device__ __forceinline__ void skip(RingPosition<kSlots>& at, int slots) {
    const int to = at.slot + slots;
    at.slot = to % kSlots;
    at.parity ^= to / kSlots & 1;
}

__device__ __forceinline__ float as_float(float sum) {
    return sum;
}
__device__ __forceinline__ float as_float(std::uint32_t sum) {
    return static_cast<float>(static_cast<std::int32_t>(sum));
}

// This warpgroup's products of slot `slot`, `rows` rows into the tile: all of a slab, or the half
// of it that begins at byte `from` of its rows.
template <class C, typename T, int kSteps, bool kAdd>
__device__ __forceinline__ void multiply_slot(const C& shared, int slot, int rows,
                                              Sum<T> (&acc)[C::kParts][C::kN / 2], int from = 0) {
    const std::uint32_t left = shared_address(shared.slot(slot)) + from + rows * kRowBytes;
    const std::uint64_t right =
        matrix_descriptor(shared_address(shared.slot(slot)) + from + C::kRows * kRowBytes, 0);
    begin_products();
#pragma unroll
    for (int part = 0; part < C::kParts; ++part) {
        multiply_scores<T, C::kN, kSteps, kAdd>(
            matrix_descriptor(left + part * kPartRows * kRowBytes, 0), C::kRows, right, acc[part]);
    }
    commit_products();
}

template <typename T, int kParts, int kCount>
__device__ __forceinline__ void fence_parts(T (&acc)[kParts][kCount]) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) fence_registers(acc[part]);
}

// Where groups multiply in turns: the one of tile `index` waits until the other has found the slabs
// of the tile before. A barrier's parity tells a round from the next, not from the one after that,
// so nobody may wait for a slot that has rounds to go; and products follow upon products.
template <class C>
__device__ __forceinline__ void take_turn(const C& shared, int group, int index) {
    if (C::kInTurns && index > 0) shared.turn(group).wait((index - 1) / 2 & 1);
}
template <class C>
__device__ __forceinline__ void pass_turn(const C& shared, int group) {
    if (C::kInTurns && threadIdx.x % kGroupThreads == 0) shared.turn(1 - group).arrive();
}

// acc = a w^T in one accumulator; all but the last batch of products are waited for late.
template <class C>
__device__ __forceinline__ void multiply_slabs(const Params& p, const C& shared, int group,
                                               int rows, RingPosition<C::kSlots>& at,
                                               Sum<typename C::In> (&acc)[C::kParts][C::kN / 2]) {
    using In = typename C::In;
    int previous = at.slot;
    shared.full(at.slot).wait(at.parity);
    fence_parts(acc);
    multiply_slot<C, In, 4, false>(shared, at.slot, rows, acc);
    at.advance();
#pragma unroll 1
    for (int s = 1; s < p.slabs; ++s) {
        shared.full(at.slot).wait(at.parity);
        fence_parts(acc);
        multiply_slot<C, In, 4, true>(shared, at.slot, rows, acc);
        wait_products<1>();
        fence_parts(acc);
        release(shared.empty(previous));
        previous = at.slot;
        at.advance();
    }
    if (p.branch_slabs == 0) pass_turn(shared, group);
    wait_products<0>();
    fence_parts(acc);
    release(shared.empty(previous));
}

// total = a w^T, added to in float32 after every slab.
template <class C>
__device__ __forceinline__ void multiply_and_promote(const Params& p, const C& shared, int group,
                                                     int rows, RingPosition<C::kSlots>& at,
                                                     float (&total)[C::kParts][C::kN / 2]) {
    float acc[C::kParts][C::kN / 2];
#pragma unroll
    for (int part = 0; part < C::kParts; ++part) {
#pragma unroll
        for (int i = 0; i < C::kN / 2; ++i) total[part][i] = 0;
    }
#pragma unroll 1
    for (int s = 0; s < p.slabs; ++s) {
        shared.full(at.slot).wait(at.parity);
        fence_parts(acc);
        multiply_slot<C, typename C::In, 4, false>(shared, at.slot, rows, acc);
        if (s + 1 == p.slabs && p.branch_slabs == 0) pass_turn(shared, group);
        wait_products<0>();
        fence_parts(acc);
        release(shared.empty(at.slot));
        at.advance();
#pragma unroll
        for (int part = 0; part < C::kParts; ++part) {
#pragma unroll
            for (int i = 0; i < C::kN / 2; ++i) total[part][i] += acc[part][i];
        }
    }
}

// y += low up^T, products of 16-bit values with float32 sums. A last slab of at most 32 r is half
// of one.
template <typename T, class C>
__device__ __forceinline__ void add_branch(const Params& p, const C& shared, int group, int rows,
                                           RingPosition<C::kSlots>& at,
                                           float (&y)[C::kParts][C::kN / 2]) {
#pragma unroll 1
    for (int s = 0; s < p.branch_slabs; ++s) {
        shared.full(at.slot).wait(at.parity);
        fence_parts(y);
        multiply_slot<C, T, 2, true>(shared, at.slot, rows, y);
        if (p.rank - s * kBlockColumns > kBlockColumns / 2) {
            multiply_slot<C, T, 2, true>(shared, at.slot, rows, y, kRowBytes / 2);
        }
        if (s + 1 == p.branch_slabs) pass_turn(shared, group);
        wait_products<0>();
        fence_parts(y);
        release(shared.empty(at.slot));
        at.advance();
    }
}

template <class C>
__device__ void multiply_tiles(const typename C::Given& given, const C& shared, int group) {
    using In = typename C::In;
    constexpr int kGroupRows = C::kParts * kPartRows;
    const int thread = threadIdx.x % kGroupThreads;
    const int rows = C::kInTurns ? 0 : group * kGroupRows;  // of the tile, before this group's
    std::uint8_t* const scratch = shared.scratch(group * 4 + thread / 32);
    RingPosition<C::kSlots> at;
    for_products<C>(given, [&](const Params& p, int row, int column, int index) {
        if (C::kInTurns && index % kMultipliers != group) {
            return skip(at, p.slabs + p.branch_slabs);
        }
        const int first = row + rows;  // of this group's
        float a_scale[C::kParts][2];
#pragma unroll
        for (int i = 0; i < 2 * C::kParts; ++i) {
            const int m = first + i / 2 * kPartRows + accumulator_row(thread, i % 2 * 2);
            a_scale[i / 2][i % 2] = m < p.end.M ? p.a_scale[m] : 0;
        }
        take_turn(shared, group, index);
        float y[C::kParts][C::kN / 2];
        const auto scale = [&](const auto& acc) {
            const int buffer = index % 2;
            shared.vectors_full(buffer).wait(index / 2 & 1);
            const float* const vectors = shared.vectors(buffer);
#pragma unroll
            for (int i = 0; i < C::kN / 2; i += 4) {
                const int n = accumulator_column(thread, i);
                const float2 w_scale = *reinterpret_cast<const float2*>(vectors + n);
                const float2 bias = *reinterpret_cast<const float2*>(vectors + C::kN + n);
#pragma unroll
                for (int j = 0; j < 4 * C::kParts; ++j) {
                    const int part = j / 4, v = i + j % 4;
                    const float scaled = as_float(acc[part][v]) * a_scale[part][v / 2 % 2];
                    y[part][v] = v % 2 == 0 ? fmaf(scaled, w_scale.x, bias.x)
                                            : fmaf(scaled, w_scale.y, bias.y);
                }
            }
            __syncwarp();  // all lanes have read
            release(shared.vectors_empty(buffer));
        };
        if constexpr (C::kPromotes) {
            multiply_and_promote(p, shared, group, rows, at, y);
            scale(y);
        } else {
            Sum<In> acc[C::kParts][C::kN / 2];
            multiply_slabs(p, shared, group, rows, at, acc);
            scale(acc);
        }
        if (p.branch_slabs > 0) {
            if (p.low_is_half) {
                add_branch<__half>(p, shared, group, rows, at, y);
            } else {
                add_branch<__nv_bfloat16>(p, shared, group, rows, at, y);
            }
        }
#pragma unroll
        for (int part = 0; part < C::kParts; ++part) {
            finish_rows<C::kN, typename C::Output>(
                p.end, y[part], first + part * kPartRows + thread / 32 * kWarpRows, column,
                scratch);
        }
    });
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    gemm8_sm90_kernel(const __grid_constant__ typename C::Given given) {
    const C shared;
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    if (threadIdx.x < kGroupThreads) {
        give_registers<kLoaderRegisters>();
        if (threadIdx.x == 0) load_slabs(given, shared);
        if (threadIdx.x / 32 == 1) load_vectors(given, shared);
    } else {
        take_registers<kMultiplierRegisters>();
        multiply_tiles(given, shared, static_cast<int>(threadIdx.x / kGroupThreads) - 1);
    }
}

}  // namespace fewstep::cuda::gemm8
