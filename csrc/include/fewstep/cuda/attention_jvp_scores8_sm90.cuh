// attention_jvp on Hopper with 8-bit scores: attention_jvp_sm90.cuh, but S and tS are products of
// bytes, twice as fast; those of the values are as there.
//
//     S = scale u_i w_j (q8 k8^T)        tS = scale a u_i w_j (t_q8 k8^T + q8 t_k8^T)
//
// u, w, a: scales of queries and keys, and of the tangents over the primals. With one a for a head
// the products of tS have one sum; with scales of their own they would need two, 56 registers. A
// row of S lacks scale q z, one of tS scale (t_q z + q t_z): lse and mu get them at the end.
//
// Slots: k8 beside t_k8, t_v, v. The loading warp copies the keys' scales by ordinary loads, since
// sequences begin anywhere and bulk copies at multiples of 16 bytes.
#pragma once

#include "fewstep/cuda/attention_jvp_quantize.cuh"
#include "fewstep/cuda/attention_jvp_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

// q and k map the bytes, as if they were 16-bit values; t_q and t_k are not used.
struct Scores8Params : Params {
    const float *q_scales, *shift, *t_shift, *k_scales, *largest;
};

// Keys of a tile: the most that leave a thread's registers nothing to spill, by trial.
constexpr int keys_of_tile8(int width) {
    return width <= 64 ? 128 : 96;
}

constexpr int kMostSlots8 = 6;

// Format: std::int8_t or Float8. kD: head dims, 64 or 128.
template <typename T, typename Format_, int kD, bool kStatic_, bool kMasked_>
struct Config8 : Layout<T, kD, 1, keys_of_tile8(kD), kMostSlots8,
                        (4 + kMostSlots8 * keys_of_tile8(kD)) * sizeof(float)> {
    using Format = Format_;
    static constexpr bool kStatic = kStatic_, kMasked = kMasked_, kAdditive = false;
    static constexpr int kKeys = Config8::kTileRows;
    static constexpr int kPerTile = kStatic ? 2 : 3;
    static constexpr int kKeyBlocks = kStatic ? 1 : Config8::kBlocks;
    static constexpr int kSteps8 = kD / 32;  // products of 32 columns
    // The loading warp has more to hold than others; 128 columns leave it nothing, and it fits.
    static constexpr int kLoaderRegisters = kD == 64 ? 40 : 24;
    static constexpr int kMultiplierRegisters = kD == 64 ? 232 : 240;
    static_assert(Config8::kSlots > kPerTile);

    // The tangents' scales over the primals', times log 2: kept here, since a register for it is
    // one too many with float16 and masks.
    __device__ float& ratio() const { return *reinterpret_cast<float*>(this->extra()); }
    __device__ float* scales(int slot) const { return &ratio() + 4 + slot * kKeys; }
    // From the descriptor of a primal's rows of a tile of `rows` rows to that of the tangent's.
    static constexpr std::uint64_t to_tangent(int rows) { return columns_step(kSteps8, rows) >> 4; }
};

// The loading warp.
template <class C>
__device__ void load_tiles8(const Scores8Params& p, const Work& w, const C& shared) {
    const bool elected = threadIdx.x == 0;
    if (elected) {
        const TileIndex rows{w.first_query + w.row, w.head, w.batch};
        load_tile<C::kBlocks>(p.q, rows, kRows, shared.owned(0), shared.owned_full());
    }
    const int kv_head = w.head / p.group, kv = w.batch * (p.heads / p.group) + kv_head;
    const float* scales = p.k_scales + static_cast<std::int64_t>(kv) * p.nk + w.first_key;
    if (elected) {  // before the first tile arrives
        shared.ratio() = tangent_ratio<typename C::Format>(p.largest + kv * 4) / kLog2e;
    }
    RingPosition<C::kSlots> at;
    std::uint32_t landings = 0;
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int first = tile * C::kKeys, left = w.keys - first;
        const TileIndex keys{w.first_key + first, kv_head, w.batch};
        // Of keys only scores are taken, which a mask hides.
        const bool cut = C::kMasked && p.cu_k != nullptr && left < C::kKeys;
        shared.empty(at.slot).wait(at.parity ^ 1);
        for (int i = threadIdx.x; i < C::kKeys; i += 32) {
            shared.scales(at.slot)[i] = i < left ? scales[first + i] : 0.0f;
        }
        __syncwarp();  // the elected lane's arrival tells of all lanes' stores
        if (elected) {
            load_tile<C::kKeyBlocks>(p.k, keys, C::kKeys, shared.slot(at.slot),
                                     shared.full(at.slot));
        }
        __syncwarp();
        at.advance();
        if constexpr (!C::kStatic) stream_tile(shared, p.t_v, keys, at, cut, left, landings);
        stream_tile(shared, p.v, keys, at, cut, left, landings);
    }
}

// Sums of products, times the keys' scales.
template <class C>
__device__ __forceinline__ void scale_keys(const Sum<typename C::Format> (&sums)[C::kKeys / 2],
                                           const float* scales, float (&s)[C::kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; i += 4) {
        const int column = accumulator_column(threadIdx.x % kGroupThreads, i);
        const float2 w = *reinterpret_cast<const float2*>(scales + column);
        s[i] = widen(sums[i]) * w.x;
        s[i + 1] = widen(sums[i + 1]) * w.y;
        s[i + 2] = widen(sums[i + 2]) * w.x;
        s[i + 3] = widen(sums[i + 3]) * w.y;
    }
}

// What the pass over the rows left for this thread's two.
struct QueryRows {
    std::int64_t at[2];

    __device__ QueryRows(const Params& p, const Work& w, int first_row) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row + accumulator_row(threadIdx.x % kGroupThreads, 2 * r);
            at[r] = (static_cast<std::int64_t>(w.batch) * p.heads + w.head) * p.nq + w.first_query +
                    min(row, w.queries - 1);
        }
    }
};

template <class C>
__device__ void multiply_tiles8(const Scores8Params& p, const Work& w, int group, const C& shared) {
    using T = typename C::T;
    using Format = typename C::Format;
    const int first_row = w.row + group * kGroupRows;
    const std::uint64_t q = shared.rows(0, group), t_q = q + C::to_tangent(kRows);
    float units[2];
    {
        const QueryRows rows(p, w, first_row);
#pragma unroll
        for (int r = 0; r < 2; ++r) units[r] = p.scale * kLog2e * p.q_scales[rows.at[r]];
    }

    State<C::kD> state;
    float s[C::kKeys / 2];
    Sum<Format> sums[C::kKeys / 2];
    RingPosition<C::kSlots> at;
    const auto wait = [&](const RingPosition<C::kSlots>& from) {
        shared.full(from.slot).wait(from.parity);
    };

    if (w.tiles > 0) shared.owned_full().wait(0);
#pragma unroll 1
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int first_key = tile * C::kKeys;
        std::uint32_t weights[C::kKeys / 4], h[C::kKeys / 4];
        const int k_slot = at.slot;
        const std::uint64_t k = shared.tile(k_slot);
        wait(at);
        at.advance();
        fence_registers(sums);
        begin_products();
        multiply_scores<Format, C::kKeys, C::kSteps8, false>(q, kRows, k, sums);
        commit_products();
        wait_products<0>();
        fence_registers(sums);
        scale_keys<C>(sums, shared.scales(k_slot), s);
        hide<C>(p, w, first_row, first_key, s);
        float alpha[2], shift[2];
        exponentiate<C>(state, s, units, weights, alpha);
        state.rescale(alpha);

        fence_registers(sums);
        begin_products();
        multiply_scores<Format, C::kKeys, C::kSteps8, false>(t_q, kRows, k, sums);
        if constexpr (!C::kStatic) {
            multiply_scores<Format, C::kKeys, C::kSteps8, true>(q, kRows,
                                                                k + C::to_tangent(C::kKeys), sums);
        }
        commit_products();
        wait_products<0>();
        fence_registers(sums);
        scale_keys<C>(sums, shared.scales(k_slot), s);
        __syncwarp();
        shared.release(k_slot);
        const float t_units[2] = {units[0] * shared.ratio(), units[1] * shared.ratio()};
        center<C>(p, t_units, state, weights, s, h, shift);

        add_values(shared, at, state, weights, h);
    }
    const QueryRows rows(p, w, first_row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (state.l[r] == 0.0f) continue;  // met no key
        state.m[r] = fmaf(state.m[r], p.q_scales[rows.at[r]], p.shift[rows.at[r]]);
        state.c[r] = fmaf(p.scale, p.t_shift[rows.at[r]], state.c[r]);
    }
    // Every warp of the group has read the queries for the last time.
    sync_named(kStaged + group, kGroupThreads);
    finish<C, true, true>(p, w, group * kGroupRows, 0, shared, state);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_jvp_scores8_sm90_kernel(const __grid_constant__ Scores8Params p) {
    const Work w = find_work<C>(p);
    if (w.row >= w.queries) return;
    const C shared;
    const auto load = [&] {
        if (w.tiles > 0) load_tiles8<C>(p, w, shared);
    };
    run_roles(shared, load, [&](int group) { multiply_tiles8<C>(p, w, group, shared); });
}

}  // namespace fewstep::cuda::attention_jvp_kernel
