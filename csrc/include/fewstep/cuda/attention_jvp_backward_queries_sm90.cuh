// Gradients of queries, added up by the blocks of threads that own keys:
//
//     dt_q^T += k^T dS0^T          d_q^T += k^T dS1^T + t_k^T dS0^T
//
// Here a tile's dS0^T and dS1^T are in the registers of both warpgroups, 64 keys each. Both write
// them to shared memory, and each takes half of the three products over all 128 keys: with two
// blocks of columns one block; with a single one d_q^T or dt_q^T, in turns. What comes out is added
// to float32 sums in device memory, in whatever order blocks get there: the last bits differ
// from run to run. A second kernel rounds the sums.
#pragma once

#include "fewstep/cuda/attention_jvp_backward_parts_sm90.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

// Weights of the block's `rows` keys, and 0 of those behind: nothing has hidden these, since their
// own sums are not stored, but here they are summed over.
template <class C>
__device__ __forceinline__ void write_weights(int i, int group, int rows, const C& shared,
                                              const std::uint32_t (&weights)[C::kTile / 4]) {
    const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
    for (int j = 0; j < C::kTile / 4; ++j) {
        const int row = group * kGroupRows + accumulator_row(thread, 2 * j);
        const int offset = tile_offset(row, accumulator_column(thread, 2 * j), kRows);
        store_shared(shared.weights(i) + offset, row < rows ? weights[j] : 0u);
    }
}

// As `add_products`, with the queries' part. `count` tiles were added before; `tile` and `head` are
// those of the queries.
template <class C>
__device__ __forceinline__ void add_products_to_all(const Params& p, const Work& w, int group,
                                                    int count, int tile, int head,
                                                    std::uint32_t (&w0)[C::kTile / 4],
                                                    std::uint32_t (&w1)[C::kTile / 4], Slots late,
                                                    const C& shared, float (&a)[C::kD / 2],
                                                    float (&b)[C::kD / 2]) {
    using T = typename C::T;
    constexpr int kTile = C::kTile, kBoth = kGroups * kGroupThreads;
    const int thread = threadIdx.x % kGroupThreads;
    if (count > 0) sync_named(kRead + group, kBoth);
    write_weights(0, group, w.owned - w.row, shared, w0);
    write_weights(1, group, w.owned - w.row, shared, w1);
    fence_shared_stores();
    sync_named(kWritten, kBoth);

    const auto keys = [&](int i, int block) {
        return matrix_descriptor(shared_address(shared.owned(i) + block * kRows * kRowBytes), 0);
    };
    const auto weights = [&](int i) {
        return matrix_descriptor(shared_address(shared.weights(i)), 0);
    };
    const auto add = [&](int which, int block, const float (&values)[kTile / 2]) {
        float* const sums = p.queries.data + which * p.queries.each +
                            (static_cast<std::int64_t>(w.batch) * p.heads + head) * p.queries.head +
                            static_cast<std::int64_t>(w.sums_tile + tile) * (kTile * C::kD);
        add_to_global<4 * kGroupThreads>(sums + block * kTile * kBlockColumns + thread * 4, values);
    };
    const auto finish = [&] {
        wait_products<0>();
        fence_registers(a);
        fence_registers(b);
        release(late, shared);
        if (count + 1 < w.tiles()) arrive_named(kRead + 1 - group, kBoth);
    };
    float r[kTile / 2];
    fence_registers(w0);
    fence_registers(w1);
    fence_registers(a);
    fence_registers(b);
    fence_registers(r);
    if constexpr (C::kBlocks == 1) {
        const int primal = (count + group) % 2;
        begin_products();
        multiply_values<T, C::kD, kTile>(w0, shared.values(late.primal), a);
        multiply_values<T, C::kD, kTile>(w0, shared.values(late.tangent), b);
        multiply_values<T, C::kD, kTile>(w1, shared.values(late.primal), b);
        multiply_transposed<T, kTile, kRows, false>(keys(0, 0), weights(primal), r);
        commit_products();
        if (primal) {
            begin_products();
            multiply_transposed<T, kTile, kRows, true>(keys(1, 0), weights(0), r);
            commit_products();
        }
        finish();
        fence_registers(r);
        add(primal, 0, r);
    } else {
        float t[kTile / 2];
        fence_registers(t);
        begin_products();
        multiply_values<T, C::kD, kTile>(w0, shared.values(late.primal), a);
        multiply_values<T, C::kD, kTile>(w0, shared.values(late.tangent), b);
        multiply_values<T, C::kD, kTile>(w1, shared.values(late.primal), b);
        multiply_transposed<T, kTile, kRows, false>(keys(0, group), weights(0), t);
        multiply_transposed<T, kTile, kRows, false>(keys(0, group), weights(1), r);
        multiply_transposed<T, kTile, kRows, true>(keys(1, group), weights(0), r);
        commit_products();
        finish();
        fence_registers(t);
        fence_registers(r);
        add(0, group, t);
        add(1, group, r);
    }
}

// What the sums are rounded to, and where they are. Blocks of 128 queries.
struct RoundParams {
    QuerySums queries;
    Gradient to[2];  // dt_q, d_q
    const std::int32_t* cu_q;
    Grid grid;
    int nq, sequences, tile, width;
    float scale;
};

template <typename T>
__global__ void __launch_bounds__(kGroupThreads)
    round_query_gradients_kernel(const __grid_constant__ RoundParams p) {
    const Place place = find_place(p.grid, p.nq, p.nq, p.cu_q, p.cu_q, p.sequences, false);
    const int begin =
        p.cu_q == nullptr ? 0 : max(p.cu_q[place.sequence], 0) / p.tile + place.sequence;
    const int rows = min(kRows, place.owned.count - place.row);
    for (int which = 0; which < 2; ++which) {
        const Gradient& to = p.to[which];
        if (to.data == nullptr) continue;
        const float* const sums =
            p.queries.data + which * p.queries.each +
            (static_cast<std::int64_t>(place.batch) * p.grid.heads + place.head) * p.queries.head;
        T* const out = static_cast<T*>(to.data) + place.batch * to.strides.b +
                       place.head * to.strides.h + (place.owned.first + place.row) * to.strides.row;
        const int chunks = to.columns / 8;
        for (int i = threadIdx.x; i < rows * chunks; i += kGroupThreads) {
            const int row = i / chunks, column = i % chunks * 8, query = place.row + row;
            const float* const tile =
                sums + static_cast<std::int64_t>(begin + query / p.tile) * p.tile * p.width +
                column / kBlockColumns * p.tile * kBlockColumns;
            std::uint32_t pairs[4];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                // The thread and the value of accumulator_row, accumulator_column.
                const int channel = column % kBlockColumns + j, in_tile = query % p.tile;
                const int thread = channel / 16 * 32 + channel % 8 * 4 + in_tile % 8 / 2;
                const int value = channel / 8 % 2 * 2 + in_tile % 2;
                const float sum =
                    tile[(in_tile / 8 * kGroupThreads + thread) * 4 + value] * p.scale;
                const std::uint32_t bits = pack<T>(sum, 0.0f);
                pairs[j / 2] = j % 2 == 0 ? bits : pairs[j / 2] | bits << 16;
            }
            *reinterpret_cast<uint4*>(out + row * to.strides.row + column) =
                uint4{pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    }
}

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
