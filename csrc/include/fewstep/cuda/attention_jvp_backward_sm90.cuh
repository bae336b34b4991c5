// attention_jvp_backward on Hopper, in passes that share one shape. Each owns 128 rows, streams
// tiles of the other side, and sums gradients of its rows, in pairs a, b with weights W0, W1 of the
// pairs of a query and a key:
//
//     a += W0 L          b += W1 L + W0 tL
//
//               owns (x, t_x, y, t_y)    streams early, late      a, b         W0, W1
//     queries   q, t_q, dt_o, d_o        v, t_v      k, t_k       dt_q, d_q    dS0, dS1
//     keys      k, t_k, v, t_v           dt_o, d_o   q, t_q       dt_k, d_k    dS0^T, dS1^T
//     values    k, t_k                   q, t_q      dt_o, d_o    dt_v, d_v    P^T, tP^T
//     both      as keys                                           those of keys and of values
//
//     S = x u^T    tS = t_x u^T + x t_u^T    X0 = y w^T    X1 = t_y w^T + y t_w^T
//
// (u: the streamed partner of x, w that of y; L, tL: the late tiles.) 9, 9, 6 and 12 products. Up
// to 64 columns a thread's registers hold the four sums of "both": 21 products; above, keys and
// values are two passes: 24. Each gradient is summed in one order, in registers, without atomics.
// Where that is not asked for, "fused" passes over keys also add up the gradients of queries, in
// device memory (attention_jvp_backward_queries_sm90.cuh): 15 products, or 18. Two products are in
// flight at most beside the sums, and each score tile is packed before the next. Derivation and
// symbols: docs/ops/attention_jvp_backward.md.
//
// With static keys and values t_k and t_v are absent, and their products left out: 6, 7, 5 and 10.
#pragma once

#include "fewstep/cuda/attention_jvp_backward_queries_sm90.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

// One pair of sums: queries, keys or values.
template <class C>
__device__ void multiply_tiles(const Params& p, const Work& w, int group, const C& shared) {
    using T = typename C::T;
    constexpr int kTile = C::kTile;
    const int first_row = w.row + group * kGroupRows;
    const std::uint64_t x = shared.owned_rows(0, group), t_x = shared.owned_rows(1, group);
    const std::uint64_t y = shared.owned_rows(2, group), t_y = shared.owned_rows(3, group);
    const int thread = threadIdx.x % kGroupThreads;
    Numbers<C> numbers;
    if constexpr (C::kOwnsQueries) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            read_numbers(p, w.batch, w.owned_head, w.owned_first,
                         first_row + accumulator_row(thread, 2 * r), w.owned, numbers.kept[r]);
        }
    }

    float a[C::kD / 2], b[C::kD / 2];
#pragma unroll
    for (int i = 0; i < C::kD / 2; ++i) a[i] = b[i] = 0.0f;
    RingPosition<C::kSlots> at;

    if (w.tiles() > 0) shared.owned_full().wait(0);
    int tile = w.begin, head = 0;
#pragma unroll 1
    for (int i = 0; i < w.tiles(); ++i) {
        const int first = tile * kTile;
        const int query_head = C::kOwnsQueries ? w.owned_head : w.stream_head + head;
        const Slots early = next_slots(at, shared);
        if constexpr (!C::kOwnsQueries) {
            numbers.tile = shared.numbers(i) + accumulator_column(thread, 0);
        }
        Slots late = early;
        if constexpr (!C::kIsValues) late = next_slots(at, shared);
        // P, then what is added to a and b with L: W0 and W1; packed in pairs.
        std::uint32_t weights[kTile / 4], w0[kTile / 4], w1[kTile / 4];
        float s[kTile / 2];
        score<C>(s, x, late.primal, shared);
        scale_and_hide<C>(p, w, query_head, first_row, first, s);
        exponentiate<C>(s, numbers, weights);
        float r[kTile / 2];
        if constexpr (C::kIsValues) {
#pragma unroll
            for (int j = 0; j < kTile / 4; ++j) w0[j] = weights[j];
        } else {
            score<C>(s, y, after(early.primal, weights, p.zero[0]), shared);
            weigh_all<C, 2>(weights, p.zero[0], 1.0f, numbers, s);
            pack_all<T>(s, w0);
            tangent_score<C>(
                r, y, t_y, after(early.primal, w0, p.zero[0]),
                C::kOwnedTangents ? early.tangent : after(early.tangent, w0, p.zero[0]), shared);
            weigh_all<C, 3>(weights, p.zero[1], 1.0f, numbers, r);
            release(early, shared);
            tangent_score<C>(s, x, t_x, after(late.primal, r, p.zero[0]),
                             C::kOwnedTangents ? late.tangent : after(late.tangent, r, p.zero[0]),
                             shared);
        }
        if constexpr (C::kIsValues) {
            tangent_score<C>(s, x, t_x, early.primal, early.tangent, shared);
            release(early, shared);
            late = next_slots(at, shared);
        }
        // tP, or tP (X0 - D0) = dS0 (tS - mu).
        if constexpr (C::kAdditive) {
            add_mask<C>(p, p.t_mask, w, query_head, first_row, first, s);
        }
        weigh_all<C, 1>(w0, p.zero[2], C::kAdditive ? 1.0f : p.scale, numbers, s);
        if constexpr (!C::kIsValues) {
#pragma unroll
            for (int j = 0; j < kTile / 2; ++j) s[j] += r[j];
        }
        pack_all<T>(s, w1);
        if constexpr (C::kFused) {
            add_products_to_all<C>(p, w, group, i, tile, query_head, w0, w1, late, shared, a, b);
        } else {
            add_products<C>(w0, w1, late, shared, a, b);
            release(late, shared);
        }
        if (++tile == w.end) {
            tile = w.begin;
            ++head;
        }
    }

    leave_owned<C>(group);
    const float factor = C::kIsValues ? 1.0f : p.scale;
    store_sums(p, w, 0, group, shared, a, factor);
    store_sums(p, w, 1, group, shared, b, factor);
}

// Two pairs of sums: keys and values. tS - mu stays in float32 until it has met X0 - D0; onto the
// product of the two the tensor cores add X1, and one more factor P makes dS1 of it:
//
//     dS1 = P ((tS - mu) (X0 - D0) + X1 - D1)
//
// The sums of the values come first, so that their tP is gone by then.
template <class C>
__device__ void multiply_both(const Params& p, const Work& w, int group, const C& shared) {
    using T = typename C::T;
    constexpr int kTile = C::kTile;
    const int first_row = w.row + group * kGroupRows;
    const std::uint64_t k = shared.owned_rows(0, group), t_k = shared.owned_rows(1, group);
    const std::uint64_t v = shared.owned_rows(2, group), t_v = shared.owned_rows(3, group);
    Numbers<C> numbers;

    float dt_k[C::kD / 2], d_k[C::kD / 2], dt_v[C::kD / 2], d_v[C::kD / 2];
#pragma unroll
    for (int i = 0; i < C::kD / 2; ++i) dt_k[i] = d_k[i] = dt_v[i] = d_v[i] = 0.0f;
    RingPosition<C::kSlots> at;

    if (w.tiles() > 0) shared.owned_full().wait(0);
    int tile = w.begin, head = 0;
#pragma unroll 1
    for (int i = 0; i < w.tiles(); ++i) {
        const Slots outputs = next_slots(at, shared), queries = next_slots(at, shared);
        numbers.tile = shared.numbers(i) + accumulator_column(threadIdx.x % kGroupThreads, 0);
        std::uint32_t weights[kTile / 4];
        float s[kTile / 2];
        score<C>(s, k, queries.primal, shared);
        scale_and_hide<C>(p, w, w.stream_head + head, first_row, tile * kTile, s);
        exponentiate<C>(s, numbers, weights);

        tangent_score<C>(s, k, t_k, queries.primal, queries.tangent, shared);
        if constexpr (C::kAdditive) {
            add_mask<C>(p, p.t_mask, w, w.stream_head + head, first_row, tile * kTile, s);
        }
        {
            std::uint32_t t_weights[kTile / 4];
#pragma unroll
            for (int j = 0; j < kTile / 4; ++j) {
                const float2 pair = unpack<T>(weights[j] ^ p.zero[0]);
                float product[2];
#pragma unroll
                for (int l = 0; l < 2; ++l) {
                    float& x = s[2 * j + l];
                    const float weight = l == 0 ? pair.x : pair.y;
                    x = fmaf(C::kAdditive ? 1.0f : p.scale, x, -numbers.template get<1>(2 * j + l));
                    product[l] = C::kMasked && weight == 0.0f ? 0.0f : weight * x;
                }
                t_weights[j] = pack<T>(product[0], product[1]);
            }
            add_products<C>(weights, t_weights, outputs, shared, dt_v, d_v);
        }

        std::uint32_t w0[kTile / 4];
        {
            float r[kTile / 2];
            score<C>(r, v, outputs.primal, shared);
#pragma unroll
            for (int j = 0; j < kTile / 2; ++j) s[j] *= r[j] - numbers.template get<2>(j);
            weigh_all<C, 2>(weights, p.zero[1], 1.0f, numbers, r);
            pack_all<T>(r, w0);
        }
        tangent_score<C, true>(s, v, t_v, outputs.primal, outputs.tangent, shared);
        release(outputs, shared);
        weigh_all<C, 3>(weights, p.zero[2], 1.0f, numbers, s);
        std::uint32_t w1[kTile / 4];
        pack_all<T>(s, w1);
        if constexpr (C::kFused) {
            add_products_to_all<C>(p, w, group, i, tile, w.stream_head + head, w0, w1, queries,
                                   shared, dt_k, d_k);
        } else {
            add_products<C>(w0, w1, queries, shared, dt_k, d_k);
            release(queries, shared);
        }
        if (++tile == w.end) {
            tile = w.begin;
            ++head;
        }
    }

    leave_owned<C>(group);
    store_sums(p, w, 0, group, shared, dt_k, p.scale);
    store_sums(p, w, 1, group, shared, d_k, p.scale);
    store_sums(p, w, 2, group, shared, dt_v, 1.0f);
    store_sums(p, w, 3, group, shared, d_v, 1.0f);
}

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    attention_jvp_backward_sm90_kernel(const __grid_constant__ Params p) {
    const Work w = find_work<C>(p);
    if (w.row >= w.owned) return;
    const C shared;
    const auto load = [&] {
        if (w.tiles() > 0) load_tiles<C>(p, w, shared);
    };
    run_roles(shared, load, [&](int group) {
        if constexpr (C::kPass == Pass::kBoth) {
            multiply_both<C>(p, w, group, shared);
        } else {
            multiply_tiles<C>(p, w, group, shared);
        }
    });
}

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
