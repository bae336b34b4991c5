// attention_jvp on Hopper, head dims 136 to 256: the recurrence of attention_jvp_sm90.cuh where two
// sums of 64 queries don't fit the registers of a warpgroup.
//
// A block of threads owns 64 queries of one head. Its two multiplying warpgroups share them: the
// first keeps columns 0 ... 127 of the sums O and T, the second the others. Scores are done once,
// each group has those that the other lacks:
//
//     first, "weighing"                          second, "centring"
//     S = q k^T                                  tS = t_q k^T + q t_k^T
//     m, l, P = exp(S - m)       P, alpha, l ->
//     T += P t_v                                 O, T *= alpha
//     S of the next tile         <- H, c' - c    c' = c + sum P (tS - c) / l',  H = P (tS - c')
//     T -= (c' - c) O                            T -= (c' - c) O
//     O += P v,  T += H v                        T += P t_v,  O += P v,  T += H v
//
// P and H are left operands, which are read from registers: a thread needs what the thread of the
// same number in the other group has, and finds it in a mailbox in shared memory. So no statistic
// is put together from two groups' parts, and l, c and H are what one group alone makes of the
// rounded P, as in the narrow kernels.
//
// The tensor cores have what the other group has issued while one does arithmetic: tS and the sums
// of the tile before during the exponentials, the next S and P t_v while H is made.
#pragma once

#include "fewstep/cuda/attention_jvp_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

constexpr int kWeighingColumns = 128;  // of the sums; the centring group has the rest

// Named barriers, of both groups: the one's numbers are in the mailbox, and the other's. A group
// arrives at one and waits for the other, so neither comes round before all have passed it.
constexpr int kWeighed = kTurn, kCentered = kTurn + 1;

// The head dims that there are kernels for, with an additive mask only the last. There is none of
// their own for no masking at all: what kPairs asks for is done while the tensor cores are busy.
inline int wide_width(Masking masking, int width) {
    FEWSTEP_CHECK(width <= 256, "q, v: expected head dims up to 256, got ", width);
    return masking == Masking::kPairs && width <= 160 ? 160 : 256;
}

constexpr int kWideKeys = 64;  // of a tile
// P or H, and two pairs of numbers, for each thread of a group.
constexpr int kMailboxBytes = kGroupThreads * (kWideKeys / 4 * 4 + 2 * 8);

template <typename T, int kD, bool kStatic_, Masking kMasking>
struct WideConfig : Layout<T, kD, 2, kWideKeys, kStatic_ ? 4 : 8, kMailboxBytes, kGroupRows> {
    static constexpr bool kStatic = kStatic_;
    static constexpr bool kMasked = kMasking != Masking::kNone;
    static constexpr bool kAdditive = kMasking == Masking::kAdditive;
    static constexpr int kKeys = WideConfig::kTileRows;
    static constexpr int kPerTile = kStatic ? 2 : 4;
    static constexpr int kCenteringColumns = kD - kWeighingColumns;
    // Whether the next tile's k can be there before this tile's v is given back; else the weighing
    // group would wait for it with H at hand.
    static constexpr bool kAhead = WideConfig::kSlots > kPerTile;
    static_assert(WideConfig::kSlots >= kPerTile);

    // What a thread leaves for its counterpart: 16 bytes of P or H at a time, numbers of its rows.
    __device__ uint4* packed() const {
        return reinterpret_cast<uint4*>(this->extra()) + threadIdx.x % kGroupThreads;
    }
    __device__ float2* numbers(int i) const {
        std::uint8_t* const first = this->extra() + kGroupThreads * kKeys;
        return reinterpret_cast<float2*>(first) + i * kGroupThreads + threadIdx.x % kGroupThreads;
    }
};

// Into a thread's mailbox, out of it. There is one for both directions, without a further barrier:
// P is read before H is written, and H before the next P, each by the thread that writes next.
template <class C>
__device__ __forceinline__ void leave(const C& shared, const std::uint32_t (&x)[C::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
        uint4 four;
        four.x = x[4 * i], four.y = x[4 * i + 1], four.z = x[4 * i + 2], four.w = x[4 * i + 3];
        shared.packed()[i * kGroupThreads] = four;
    }
}
template <class C>
__device__ __forceinline__ void collect(const C& shared, std::uint32_t (&x)[C::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < C::kKeys / 16; ++i) {
        const uint4 four = shared.packed()[i * kGroupThreads];
        x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
    }
}
__device__ __forceinline__ void leave(float2* at, const float (&x)[2]) {
    *at = float2{x[0], x[1]};
}
__device__ __forceinline__ void collect(const float2* at, float (&x)[2]) {
    const float2 pair = *at;
    x[0] = pair.x, x[1] = pair.y;
}

template <class C>
__device__ void weigh_tiles(const Params& p, const Work& w, const C& shared) {
    using T = typename C::T;
    const std::uint64_t q = shared.rows(0, 0);
    // Masked scores are in natural units already.
    const float unit = (C::kAdditive ? 1.0f : p.scale) * kLog2e, units[2] = {unit, unit};
    State<kWeighingColumns> state;
    float s[C::kKeys / 2], alpha[2];
    std::uint32_t weights[C::kKeys / 4];
    RingPosition<C::kSlots> at;
    const auto score = [&](int slot) {
        multiply_scores<T, C::kKeys, C::kSteps, false>(q, C::kOwnedRows, shared.tile(slot), s);
    };
    const auto add_tangents = [&](int slot) {
        multiply_values<T, kWeighingColumns, C::kKeys>(weights, shared.values(slot), state.t_o);
    };
    const auto finish_scores = [&](int slot) {
        wait_products<0>();
        fence_registers(s);
        shared.release(slot);
    };
    const auto weigh = [&](int tile, std::uint32_t (&out)[C::kKeys / 4]) {
        if constexpr (C::kAdditive) {
            add_mask<C>(p, p.mask_is_bool ? Mask{} : p.mask, w, w.row, tile * C::kKeys, s);
        }
        hide<C>(p, w, w.row, tile * C::kKeys, s);
        exponentiate<C>(state, s, units, out, alpha);
        leave(shared, out);
        leave(shared.numbers(0), alpha);
        leave(shared.numbers(1), state.l);
        arrive_named(kWeighed, kGroups * kGroupThreads);
    };

    if (w.tiles > 0) {
        shared.owned_full().wait(0);
        const int slot = next_slot(at, shared);
        fence_registers(s);
        begin_products();
        score(slot);
        commit_products();
        finish_scores(slot);
        weigh(0, weights);  // alpha has nothing to rescale yet
    }
#pragma unroll 1
    for (int tile = 0; tile < w.tiles; ++tile) {
        const bool more = tile + 1 < w.tiles;
        int t_v_slot = 0;
        if constexpr (!C::kStatic) {
            shared.release(next_slot(at, shared));  // t_k is the other group's
            t_v_slot = next_slot(at, shared);
            fence_registers(weights);
            fence_registers(state.t_o);
        }
        const int v_slot = at.slot;
        const std::uint32_t v_parity = at.parity;
        at.advance();
        if (C::kAhead && more) {
            const int slot = next_slot(at, shared);
            fence_registers(s);
            begin_products();
            score(slot);
            if constexpr (!C::kStatic) add_tangents(t_v_slot);
            commit_products();
            finish_scores(slot);
        } else if constexpr (!C::kStatic) {
            begin_products();
            add_tangents(t_v_slot);
            commit_products();
            wait_products<0>();
        }
        if constexpr (!C::kStatic) {
            fence_registers(state.t_o);
            shared.release(t_v_slot);
        }

        sync_named(kCentered, kGroups * kGroupThreads);
        std::uint32_t h[C::kKeys / 4], next[C::kKeys / 4];
        float shift[2];
        collect(shared, h);
        collect(shared.numbers(0), shift);
        state.recenter(shift);
        shared.full(v_slot).wait(v_parity);
        fence_registers(weights);
        fence_registers(h);
        fence_registers(state.o);
        fence_registers(state.t_o);
        begin_products();
        multiply_values<T, kWeighingColumns, C::kKeys>(weights, shared.values(v_slot), state.o);
        multiply_values<T, kWeighingColumns, C::kKeys>(h, shared.values(v_slot), state.t_o);
        commit_products();
        if (!C::kAhead && more) {
            const int slot = next_slot(at, shared);
            fence_registers(s);
            begin_products();
            score(slot);
            commit_products();
            finish_scores(slot);
        }
        const auto finish_sums = [&] {
            wait_products<0>();
            fence_registers(state.o);
            fence_registers(state.t_o);
            shared.release(v_slot);
        };
        // The addresses of a mask leave no registers to products that are under way.
        if constexpr (C::kAdditive) finish_sums();
        if (more) weigh(tile + 1, next);
        if constexpr (!C::kAdditive) finish_sums();
        if (more) {
            state.rescale(alpha);
#pragma unroll
            for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = next[i];
        }
    }
    // Both groups have read the queries for the last time.
    sync_named(kStaged, kGroups * kGroupThreads);
    finish<C, true, false>(p, w, 0, 0, shared, state);
}

template <class C>
__device__ void center_tiles(const Params& p, const Work& w, const C& shared) {
    using T = typename C::T;
    constexpr int kColumns = C::kCenteringColumns;
    constexpr int kBlock = kWeighingColumns / kBlockColumns;
    const std::uint64_t q = shared.rows(0, 0), t_q = shared.rows(1, 0);
    State<kColumns> state;
    float s[C::kKeys / 2];
    std::uint32_t weights[C::kKeys / 4];
    RingPosition<C::kSlots> at;
    int k_slot = 0, t_k_slot = 0;
    const auto begin_scores = [&] {
        k_slot = next_slot(at, shared);
        if constexpr (!C::kStatic) t_k_slot = next_slot(at, shared);
        fence_registers(s);
        begin_products();
        multiply_scores<T, C::kKeys, C::kSteps, false>(t_q, C::kOwnedRows, shared.tile(k_slot), s);
        if constexpr (!C::kStatic) {
            multiply_scores<T, C::kKeys, C::kSteps, true>(q, C::kOwnedRows, shared.tile(t_k_slot),
                                                          s);
        }
        commit_products();
    };
    // With these scores still under way.
    const auto take_weights = [&] {
        float alpha[2];
        sync_named(kWeighed, kGroups * kGroupThreads);
        collect(shared, weights);
        collect(shared.numbers(0), alpha);
        collect(shared.numbers(1), state.l);
        state.rescale(alpha);
        wait_products<0>();
        fence_registers(s);
        shared.release(k_slot);
        if constexpr (!C::kStatic) shared.release(t_k_slot);
    };

    if (w.tiles > 0) {
        shared.owned_full().wait(0);
        begin_scores();
        take_weights();
    }
#pragma unroll 1
    for (int tile = 0; tile < w.tiles; ++tile) {
        std::uint32_t h[C::kKeys / 4];
        float shift[2];
        if constexpr (C::kAdditive) add_mask<C>(p, p.t_mask, w, w.row, tile * C::kKeys, s);
        const float t_units[2] = {p.scale, p.scale};
        center<C>(p, t_units, state, weights, s, h, shift);
        leave(shared, h);
        leave(shared.numbers(0), shift);
        arrive_named(kCentered, kGroups * kGroupThreads);

        int t_v_slot = 0;
        if constexpr (!C::kStatic) t_v_slot = next_slot(at, shared);
        const int v_slot = next_slot(at, shared);
        fence_registers(weights);
        fence_registers(h);
        fence_registers(state.o);
        fence_registers(state.t_o);
        begin_products();
        if constexpr (!C::kStatic) {
            multiply_values<T, kColumns, C::kKeys>(weights, shared.values(t_v_slot, kBlock),
                                                   state.t_o);
        }
        multiply_values<T, kColumns, C::kKeys>(weights, shared.values(v_slot, kBlock), state.o);
        multiply_values<T, kColumns, C::kKeys>(h, shared.values(v_slot, kBlock), state.t_o);
        commit_products();
        const auto finish_sums = [&] {
            fence_registers(state.o);
            fence_registers(state.t_o);
            if constexpr (!C::kStatic) shared.release(t_v_slot);
            shared.release(v_slot);
        };
        if (tile + 1 < w.tiles) {
            begin_scores();
            wait_products<1>();
            finish_sums();
            take_weights();
        } else {
            wait_products<0>();
            finish_sums();
        }
    }
    sync_named(kStaged, kGroups * kGroupThreads);
    finish<C, false, true>(p, w, 0, kWeighingColumns, shared, state);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_jvp_wide_sm90_kernel(const __grid_constant__ Params p) {
    const Work w = find_work<C>(p);
    if (w.row >= w.queries) return;
    const C shared;
    const auto load = [&] {
        if (w.tiles > 0) load_tiles<C>(p, w, shared);
    };
    const auto multiply = [&](int group) {
        if (group == 0) {
            weigh_tiles<C>(p, w, shared);
        } else {
            center_tiles<C>(p, w, shared);
        }
    };
    run_roles(shared, load, multiply);
}

}  // namespace fewstep::cuda::attention_jvp_kernel
