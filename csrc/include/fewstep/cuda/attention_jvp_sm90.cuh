// attention_jvp on Hopper: the recurrence of docs/ops/attention_jvp.md on wgmma.
//
// A block of threads owns 128 queries of one head: one warpgroup loads (bulk tensor copies into a
// ring of slots), two multiply, 64 queries each. Per tile of keys a multiplying warpgroup does
//
//     S  = q k^T            P = exp(S - m) rounded and packed     (S finished before tS is begun:
//     tS = t_q k^T + q t_k^T                                       one tile of scores is live)
//     c' = c + sum P (tS - c) / l'     T -= (c' - c) O     H = P (tS - c')
//     T += P t_v            O += P v            T += H v
//
// in three batches of products (S; tS; the sums), each waited for before its numbers are used: what
// keeps the tensor cores busy meanwhile is the other warpgroup. Slots: k, t_k, t_v, v of a tile in
// the order in which they are given back. l, c and H are taken from the rounded P: then what all tS
// of a row share cancels to the last bit, as docs/ops/attention_jvp.md (Centring) wants.
//
// With static keys and values t_k and t_v are absent: 4 products instead of 6.
#pragma once

#include "fewstep/cuda/attention_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

// What decides which pairs meet, and what is added to their scores.
enum class Masking {
    kNone,      // all keys
    kPairs,     // causal, packed sequences, a boolean mask
    kAdditive,  // an additive mask, or a scale not above 0; the above too
};

struct Params {
    TensorMap q, k, v, t_q, t_k, t_v;
    void *o, *t_o;
    Strides o_strides, t_o_strides;
    float *lse, *mu, *lse_rest;
    const std::int32_t *cu_q, *cu_k;
    Mask mask, t_mask;
    bool mask_is_bool, is_causal;
    Grid grid;
    int heads, group, nq, nk, dv, sequences;  // sequences: packed ones, 0 for none
    float scale;
    // Zeros that the compiler doesn't know: P is unpacked three times, from P ^ zero. Else it
    // unpacks once and keeps the floats, which take twice the registers, and others spill.
    std::uint32_t zero[2] = {0, 0};
};

constexpr int kMostColumns = 128;  // attention_jvp_wide_sm90.cuh takes what has more

// The head dims that there are kernels for: without masks (nearly) every multiple of 16. Columns
// that a tensor doesn't have are zero in shared memory, and multiplied.
inline int padded_width(Masking masking, int width) {
    for (const int kernel : {48, 64, 80, 96, 112, 128}) {
        const bool exists = masking == Masking::kNone || kernel == 64 || kernel == 128;
        if (exists && width <= kernel) return kernel;
    }
    FEWSTEP_CHECK(false, "q, v: expected head dims up to ", kMostColumns, ", got ", width);
}

// Keys of a tile: the most that leave a thread's registers nothing to spill, by trial.
constexpr int keys_of_tile(Masking masking, int width, bool is_static) {
    if (masking == Masking::kAdditive) return width <= 64 ? 64 : 48;
    if (width <= 80) return 128;
    if (width == 96) return is_static ? 112 : 128;
    return width == 112 || is_static ? 96 : 112;
}

// Which kernel.
struct Launch {
    int width;  // of `padded_width` or `wide_width`
    bool is_static;
    Masking masking;
    int batches;
};

// Whether the multiplying warpgroups take turns, a tile's products after S at a time. By count they
// need not: exponentials and centring are 1300 cycles of a tile against 3072 of products (D 128),
// so both warpgroups seldom leave the tensor cores alone at once, and whoever holds the turn leaves
// them alone while it centres. To be measured.
#ifdef FEWSTEP_ATTENTION_JVP_TURNS
constexpr bool kTurns = true;
#else
constexpr bool kTurns = false;
#endif

// kD: head dims, rounded up to 16. kStatic: without t_k and t_v.
template <typename T, int kD, bool kStatic_, Masking kMasking>
struct Config : Layout<T, kD, 2, keys_of_tile(kMasking, kD, kStatic_), kStatic_ ? 4 : 8> {
    static constexpr bool kStatic = kStatic_;
    static constexpr bool kMasked = kMasking != Masking::kNone;
    static constexpr bool kAdditive = kMasking == Masking::kAdditive;
    static constexpr int kKeys = Config::kTileRows;
    static constexpr int kPerTile = kStatic ? 2 : 4;
    static_assert(Config::kSlots > kPerTile);
};

// The queries and keys that a block of threads works on.
struct Work {
    int head, batch;
    int first_query, queries;  // of the sequence, in the tensor
    int first_key, keys;
    int row;    // first query of the block, in its sequence
    int tiles;  // of keys
};

template <class C>
__device__ Work find_work(const Params& p) {
    const bool causal = C::kMasked && p.is_causal;
    const Place place = find_place<C::kOwnedRows>(p.grid, p.nq, p.nk, C::kMasked ? p.cu_q : nullptr,
                                                  p.cu_k, p.sequences, causal);
    Work w;
    w.head = place.head;
    w.batch = place.batch;
    w.first_query = place.owned.first;
    w.queries = place.owned.count;
    w.first_key = place.streamed.first;
    w.keys = place.streamed.count;
    w.row = place.row;
    const int seen = causal ? min(w.keys, w.row + C::kOwnedRows) : w.keys;
    w.tiles = (seen + C::kKeys - 1) / C::kKeys;
    return w;
}

// The loading warp.
template <class C>
__device__ void load_tiles(const Params& p, const Work& w, const C& shared) {
    if (threadIdx.x == 0) {
        const TileIndex rows{w.first_query + w.row, w.head, w.batch};
        load_tile<C::kBlocks>(p.q, rows, C::kOwnedRows, shared.owned(0), shared.owned_full());
        load_tile<C::kBlocks>(p.t_q, rows, C::kOwnedRows, shared.owned(1), shared.owned_full());
    }
    RingPosition<C::kSlots> at;
    std::uint32_t landings = 0;
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int left = w.keys - tile * C::kKeys;
        const TileIndex keys{w.first_key + tile * C::kKeys, w.head / p.group, w.batch};
        // Of keys only scores are taken, which a mask hides.
        const bool cut = C::kMasked && p.cu_k != nullptr && left < C::kKeys;
        stream_tile(shared, p.k, keys, at, false, left, landings);
        if constexpr (!C::kStatic) {
            stream_tile(shared, p.t_k, keys, at, false, left, landings);
            stream_tile(shared, p.t_v, keys, at, cut, left, landings);
        }
        stream_tile(shared, p.v, keys, at, cut, left, landings);
    }
}

// Puts -inf where pairs don't meet.
template <class C>
__device__ __forceinline__ void hide(const Params& p, const Work& w, int first_row, int first_key,
                                     float (&s)[C::kKeys / 2]) {
    const int end = first_key + C::kKeys;
    if constexpr (C::kMasked) {
        const bool reads = p.mask.data != nullptr && p.mask_is_bool;
        if (!reads && end <= w.keys && (!p.is_causal || end <= first_row + 1)) return;
        const std::uint64_t bits = meeting_pairs<C::kKeys / 2, false>(
            reads ? p.mask.at<bool>(w.batch, w.head) : nullptr, p.mask.strides, p.is_causal,
            first_row, first_key, w.queries, w.keys);
#pragma unroll
        for (int i = 0; i < C::kKeys / 2; ++i) s[i] = bits >> i & 1 ? s[i] : -kInfinity;
    } else {
        if (end <= w.keys) return;
#pragma unroll
        for (int i = 0; i < C::kKeys / 2; ++i) {
            if (first_key + accumulator_column(threadIdx.x, i) >= w.keys) s[i] = -kInfinity;
        }
    }
}

// s = scale s + mask: scores or their tangents in natural units.
template <class C>
__device__ __forceinline__ void add_mask(const Params& p, const Mask& mask, const Work& w,
                                         int first_row, int first_key, float (&s)[C::kKeys / 2]) {
    using T = typename C::T;
    const int thread = threadIdx.x % kGroupThreads;
    const T* data = mask.at<T>(w.batch, w.head);
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) {
        const int row = first_row + accumulator_row(thread, i);
        const int key = first_key + accumulator_column(thread, i);
        s[i] *= p.scale;
        if (data == nullptr || key >= w.keys || row >= w.queries) continue;
        s[i] += load(data[row * mask.strides.row + key * mask.strides.column]);
    }
}

// What a warpgroup keeps of its 64 queries; index 0 and 1 of the statistics: a thread's two rows.
template <int kColumns>
struct State {
    float o[kColumns / 2], t_o[kColumns / 2];
    float m[2], l[2], c[2];

    __device__ __forceinline__ State() {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) o[i] = t_o[i] = 0.0f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            m[r] = -kInfinity;
            l[r] = c[r] = 0.0f;
        }
    }
    // Takes the sums to a maximum that is larger by -log alpha.
    __device__ __forceinline__ void rescale(const float (&alpha)[2]) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
            o[i] *= alpha[i / 2 % 2];
            t_o[i] *= alpha[i / 2 % 2];
        }
    }
    // Takes t_o to a mean that is larger by `shift`.
    __device__ __forceinline__ void recenter(const float (&shift)[2]) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) {
            t_o[i] = fmaf(-shift[i / 2 % 2], o[i], t_o[i]);
        }
    }
};

// Takes scores into m and l and returns exp(S - m), rounded and packed; the sums are to be rescaled
// by alpha. `unit`: what a score of a row is multiplied by for a power of 2.
template <class C, int kColumns>
__device__ __forceinline__ void exponentiate(State<kColumns>& state, const float (&s)[C::kKeys / 2],
                                             const float (&unit)[2],
                                             std::uint32_t (&p)[C::kKeys / 4], float (&alpha)[2]) {
    float top[2] = {state.m[0], state.m[1]}, origin[2] = {0, 0};
    // Of the two, the first is one instruction. Large values of a mask need the second: the product
    // of a fused multiply-add is not rounded, but origin is.
    const auto power = [&](float x, int r) {
        return fast_exp2(C::kAdditive ? (x - origin[r]) * unit[r] : fmaf(x, unit[r], -origin[r]));
    };
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) top[i / 2 % 2] = fmaxf(top[i / 2 % 2], s[i]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        top[r] = quad_max(top[r]);
        // A row that met no key so far: P must come out 0, not NaN.
        const bool nowhere = C::kMasked && top[r] == -kInfinity;
        origin[r] = nowhere ? 0.0f : top[r] * (C::kAdditive ? 1 : unit[r]);
        alpha[r] = power(state.m[r], r);
        state.m[r] = top[r];
    }
    float sum[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < C::kKeys / 4; ++i) {
        p[i] = pack<typename C::T>(power(s[2 * i], i % 2), power(s[2 * i + 1], i % 2));
        const float2 weights = unpack<typename C::T>(p[i]);
        sum[i % 2] += weights.x + weights.y;
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) state.l[r] = fmaf(state.l[r], alpha[r], quad_sum(sum[r]));
}

// Takes tS into c, which moves by `shift`, and returns H = P (tS - c), rounded and packed in place;
// s is destroyed. `unit`: what tS of a row is multiplied by to be in natural units.
template <class C, int kColumns>
__device__ __forceinline__ void center(const Params& params, const float (&unit)[2],
                                       State<kColumns>& state,
                                       const std::uint32_t (&p)[C::kKeys / 4],
                                       float (&s)[C::kKeys / 2], std::uint32_t (&h)[C::kKeys / 4],
                                       float (&shift)[2]) {
    float off[2] = {0, 0};
    // tS is scaled already where it met a mask.
    const auto weigh = [&](float weight, float t_s, int r) {
        const float x = C::kAdditive ? t_s - state.c[r] : fmaf(t_s, unit[r], -state.c[r]);
        // Behind a mask tS may be anything.
        const float product = C::kMasked && weight == 0.0f ? 0.0f : weight * x;
        off[r] += product;
        return product;
    };
#pragma unroll
    for (int i = 0; i < C::kKeys / 4; ++i) {
        const float2 weights = unpack<typename C::T>(p[i] ^ params.zero[0]);
        s[2 * i] = weigh(weights.x, s[2 * i], i % 2);
        s[2 * i + 1] = weigh(weights.y, s[2 * i + 1], i % 2);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        off[r] = quad_sum(off[r]);
        shift[r] = C::kMasked && state.l[r] == 0.0f ? 0.0f : fast_divide(off[r], state.l[r]);
        state.c[r] += shift[r];
    }
    state.recenter(shift);  // what O is here comes from the tiles before
#pragma unroll
    for (int i = 0; i < C::kKeys / 4; ++i) {
        const float2 weights = unpack<typename C::T>(p[i] ^ params.zero[1]);
        h[i] = pack<typename C::T>(fmaf(-shift[i % 2], weights.x, s[2 * i]),
                                   fmaf(-shift[i % 2], weights.y, s[2 * i + 1]));
    }
}

// T += P t_v + H v and O += P v with the tile's t_v and v, whose slots are next.
template <class C>
__device__ __forceinline__ void add_values(const C& shared, RingPosition<C::kSlots>& at,
                                           State<C::kD>& state,
                                           std::uint32_t (&weights)[C::kKeys / 4],
                                           std::uint32_t (&h)[C::kKeys / 4]) {
    using T = typename C::T;
    const int t_v_slot = at.slot;
    if constexpr (!C::kStatic) {
        shared.full(at.slot).wait(at.parity);
        at.advance();
    }
    const int v_slot = at.slot;
    shared.full(at.slot).wait(at.parity);
    at.advance();
    fence_registers(weights);
    fence_registers(h);
    fence_registers(state.o);
    fence_registers(state.t_o);
    begin_products();
    if constexpr (!C::kStatic) {
        multiply_values<T, C::kD, C::kKeys>(weights, shared.values(t_v_slot), state.t_o);
    }
    multiply_values<T, C::kD, C::kKeys>(weights, shared.values(v_slot), state.o);
    multiply_values<T, C::kD, C::kKeys>(h, shared.values(v_slot), state.t_o);
    commit_products();
    wait_products<0>();
    fence_registers(state.o);
    fence_registers(state.t_o);
    if constexpr (!C::kStatic) shared.release(t_v_slot);
    shared.release(v_slot);
}

// Writes results: statistics, and columns from first_column on (of a block of 64 the first) of
// rows from first_row of the block's on, through where the queries were.
template <class C, bool kLse, bool kMu, int kColumns>
__device__ void finish(const Params& p, const Work& w, int first_row, int first_column,
                       const C& shared, const State<kColumns>& state) {
    const int thread = threadIdx.x % kGroupThreads;
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float l = state.l[r];
        inverse[r] = l == 0.0f ? 0.0f : 1.0f / l;
        const int row = w.row + first_row + accumulator_row(thread, 2 * r);
        if (thread % 4 != 0 || row >= w.queries) continue;
        const std::int64_t at =
            (static_cast<std::int64_t>(w.batch) * p.heads + w.head) * p.nq + w.first_query + row;
        if constexpr (kMu) p.mu[at] = state.c[r];
        if constexpr (kLse) {
            const float log_l = fast_log(l);
            const float m = C::kAdditive ? state.m[r] : state.m[r] * p.scale;
            p.lse[at] = l == 0.0f ? -kInfinity : m + log_l;
            if (C::kAdditive && p.lse_rest != nullptr) {
                p.lse_rest[at] = l == 0.0f ? 0.0f : log_l - (m + log_l - m);
            }
        }
    }
    const auto store = [&](int i, const float (&values)[kColumns / 2], void* x,
                           const Strides& strides) {
        using T = typename C::T;
        T* const target = static_cast<T*>(x) + w.batch * strides.b + w.head * strides.h +
                          (w.first_query + w.row) * strides.row + first_column;
        std::uint8_t* const staging =
            shared.owned(i) + first_column / kBlockColumns * C::kOwnedRows * kRowBytes;
        store_rows<T, C::kOwnedRows>(staging, first_row, values, inverse, target, strides.row,
                                     w.queries - w.row, p.dv - first_column);
    };
    store(0, state.o, p.o, p.o_strides);
    __syncwarp();  // one matrix may serve both
    store(C::kOwned - 1, state.t_o, p.t_o, p.t_o_strides);
}

template <class C>
__device__ void multiply_tiles(const Params& p, const Work& w, int group, const C& shared) {
    using T = typename C::T;
    const int first_row = w.row + group * kGroupRows;
    const std::uint64_t q = shared.rows(0, group), t_q = shared.rows(1, group);
    // Masked scores are in natural units already.
    const float unit = (C::kAdditive ? 1.0f : p.scale) * kLog2e;
    const float units[2] = {unit, unit}, t_units[2] = {p.scale, p.scale};

    State<C::kD> state;
    float s[C::kKeys / 2];
    RingPosition<C::kSlots> at;
    const auto wait = [&](const RingPosition<C::kSlots>& from) {
        shared.full(from.slot).wait(from.parity);
    };

    if (w.tiles > 0) shared.owned_full().wait(0);
    if (kTurns && group == 1) arrive_named(kTurn, kGroups * kGroupThreads);
#pragma unroll 1
    for (int tile = 0; tile < w.tiles; ++tile) {
        const int first_key = tile * C::kKeys;
        std::uint32_t weights[C::kKeys / 4], h[C::kKeys / 4];
        const int k_slot = at.slot;
        wait(at);
        at.advance();
        fence_registers(s);
        begin_products();
        multiply_scores<T, C::kKeys, C::kSteps, false>(q, kRows, shared.tile(k_slot), s);
        commit_products();
        wait_products<0>();
        fence_registers(s);
        if constexpr (C::kAdditive) {
            add_mask<C>(p, p.mask_is_bool ? Mask{} : p.mask, w, first_row, first_key, s);
        }
        hide<C>(p, w, first_row, first_key, s);
        float alpha[2], shift[2];
        exponentiate<C>(state, s, units, weights, alpha);
        state.rescale(alpha);

        if constexpr (kTurns) sync_named(kTurn + group, kGroups * kGroupThreads);
        const int t_k_slot = at.slot;
        if constexpr (!C::kStatic) {
            wait(at);
            at.advance();
        }
        fence_registers(s);
        begin_products();
        multiply_scores<T, C::kKeys, C::kSteps, false>(t_q, kRows, shared.tile(k_slot), s);
        if constexpr (!C::kStatic) {
            multiply_scores<T, C::kKeys, C::kSteps, true>(q, kRows, shared.tile(t_k_slot), s);
        }
        commit_products();
        wait_products<0>();
        fence_registers(s);
        shared.release(k_slot);
        if constexpr (!C::kStatic) shared.release(t_k_slot);
        if constexpr (C::kAdditive) add_mask<C>(p, p.t_mask, w, first_row, first_key, s);
        center<C>(p, t_units, state, weights, s, h, shift);

        add_values(shared, at, state, weights, h);
        // The second group's last turn is nobody's to take.
        if (kTurns && (tile + 1 < w.tiles || group == 0)) {
            arrive_named(kTurn + 1 - group, kGroups * kGroupThreads);
        }
    }
    // Every warp of the group has read the queries for the last time.
    sync_named(kStaged + group, kGroupThreads);
    finish<C, true, true>(p, w, group * kGroupRows, 0, shared, state);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_jvp_sm90_kernel(const __grid_constant__ Params p) {
    const Work w = find_work<C>(p);
    if (w.row >= w.queries) return;
    const C shared;
    const auto load = [&] {
        if (w.tiles > 0) load_tiles<C>(p, w, shared);
    };
    run_roles(shared, load, [&](int group) { multiply_tiles<C>(p, w, group, shared); });
}

}  // namespace fewstep::cuda::attention_jvp_kernel
