// What attention_jvp_backward's Hopper kernels are made of: parameters, the tiles that a block of
// threads works on, their loads, and scores with what is made of them. The kernels and their
// symbols: attention_jvp_backward_sm90.cuh.
#pragma once

#include <type_traits>

#include "fewstep/cuda/attention_sm90.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

enum class Pass { kQueries, kKeys, kValues, kBoth };

// Rows that are streamed at a time: what leaves a thread's registers nothing to spill, by trial.
constexpr int tile_rows(Pass pass, int width, bool additive) {
    if (additive && (pass == Pass::kBoth || (pass == Pass::kQueries && width > 64))) return 32;
    return pass == Pass::kValues || (pass == Pass::kQueries && width <= 64) ? 64 : 48;
}

struct Gradient {
    void* data = nullptr;  // null where it is not wanted
    Strides strides{};
    int columns = 0;
};

// Where passes that own keys add up the gradients of queries: for each query head tiles as they
// are streamed, transposed and in the order in which threads hold them,
//
//     [dt_q, d_q][B, H][tile][block of 64 columns][8 queries][thread][4]
//
// so that a warp adds to 512 bytes in a row. Packed sequence s has the tiles from
// cu_q[s] / tile rows + s on.
struct QuerySums {
    float* data = nullptr;
    std::int64_t each, head;  // floats of a gradient, of a head

    // The tile in which the rows of a sequence begin.
    template <int kTile>
    __device__ static int first_tile(const std::int32_t* cu_q, int sequence) {
        return cu_q == nullptr ? 0 : max(cu_q[sequence], 0) / kTile + sequence;
    }
};

// Of one pass; the kernels' header has the table of what is owned, streamed and summed.
struct Params {
    TensorMap owned[4], streamed[4];
    Gradient sums[4];
    QuerySums queries;
    const float *lse, *mu, *delta0, *delta1, *lse_rest;
    const std::int32_t *cu_q, *cu_k;
    Mask mask, t_mask;
    bool mask_is_bool, is_causal;
    Grid grid;
    int heads, group, nq, nk;  // query heads
    int sequences;             // packed ones, 0 for none
    float scale;
    // Zeros that the compiler doesn't know: what is packed is unpacked late, from x ^ zero. Else it
    // is unpacked at once, and the floats take registers until they are used.
    std::uint32_t zero[3] = {0, 0, 0};
};

struct Launch {
    Pass pass;
    int width;  // 64 or 128
    bool masked;
    bool fused;      // with the gradients of queries
    bool is_static;  // without t_k and t_v
    int batches;
};

// Named barriers of both warpgroups where they add to queries' gradients: the weights of a tile are
// written; a group may overwrite its part of them.
constexpr int kWritten = kStaged + kGroups, kRead = kWritten + 1;

// Numbers of a query: lse in units of exp2 and inf where P is 0 (a query without keys, or none at
// all), mu, delta0, delta1. With an additive mask lse in units of the scores, and lse_rest.
constexpr int count_numbers(bool additive) {
    return additive ? 5 : 4;
}
// Tiles whose numbers are in shared memory. The ring holds two tiles at most, so when the first
// slot of the third is free again nobody reads the first any more.
constexpr int kNumberTiles = 3;

// What shared memory holds behind the barriers: numbers of streamed queries, and where their
// gradients are summed the weights dS0 and dS1 of the block's 128 keys, as tiles.
constexpr int numbers_bytes(Pass pass, int tile, bool fused, bool additive) {
    const int bytes =
        pass == Pass::kQueries ? 0 : kNumberTiles * count_numbers(additive) * tile * 4;
    return fused ? (bytes + 256 + 1023) / 1024 * 1024 - 256 : bytes;  // 256 of barriers before
}
constexpr int kWeightsBytes = kRows * kRowBytes;

// Matrices that a pass owns: without tangents of keys and values half of those on their side.
constexpr int owned_count(Pass pass, bool is_static) {
    return (pass == Pass::kValues ? 2 : 4) / (is_static && pass != Pass::kQueries ? 2 : 1);
}

template <typename T, int kD, Pass kPass_, bool kMasked_, bool kFused_, bool kStatic_>
struct Config
    : Layout<T, kD, owned_count(kPass_, kStatic_), tile_rows(kPass_, kD, kStatic_&& kMasked_), 8,
             numbers_bytes(kPass_, tile_rows(kPass_, kD, kStatic_&& kMasked_), kFused_,
                           kStatic_&& kMasked_) +
                 (kFused_ ? 2 * kWeightsBytes : 0)> {
    static constexpr Pass kPass = kPass_;
    static constexpr bool kMasked = kMasked_, kFused = kFused_;
    // Additive masks are for static keys and values, where text is attended to.
    static constexpr bool kAdditive = kStatic_ && kMasked;
    static constexpr int kNumbers = count_numbers(kAdditive);
    static constexpr bool kOwnsQueries = kPass == Pass::kQueries;
    static constexpr bool kIsValues = kPass == Pass::kValues;
    static constexpr int kTile = Config::kTileRows;
    // Whether there are tangents of what is owned, of what is streamed.
    static constexpr bool kOwnedTangents = !kStatic_ || kOwnsQueries;
    static constexpr bool kStreamedTangents = !kStatic_ || !kOwnsQueries;
    static constexpr int kPerTile = kStreamedTangents ? 4 : 2;
    // The loading warp also copies numbers: it needs more registers, and the others leave them to
    // it.
    static constexpr int kLoaderRegisters = kOwnsQueries ? 24 : 40;
    static constexpr int kMultiplierRegisters = kOwnsQueries ? 240 : 232;
    static_assert(Config::kSlots > kPerTile);
    static_assert(kOwnsQueries || Config::kSlots <= 2 * kPerTile);  // kNumberTiles
    static_assert(!(kFused && kStatic_));

    // Descriptors of x, t_x, y, t_y (0 ... 3); of a tangent that is not there nobody asks.
    __device__ std::uint64_t owned_rows(int i, int group) const {
        return this->rows(kOwnedTangents ? i : i / 2, group);
    }
    // dS0 and dS1: rows are the block's keys, columns the queries of a tile.
    __device__ std::uint8_t* weights(int i) const {
        constexpr int kBefore = numbers_bytes(kPass, kTile, true, false);
        static_assert((Config::kBarrierBytes + kBefore) % Config::kAlignment == 0);
        return this->extra() + kBefore + i * kWeightsBytes;
    }
    // Numbers of the queries of a streamed tile, [kNumbers][kTile].
    __device__ float* numbers(int tile) const {
        return reinterpret_cast<float*>(this->extra()) + tile % kNumberTiles * kNumbers * kTile;
    }
};

// The rows that a block of threads owns and the tiles that it streams.
struct Work {
    int batch, owned_head;
    int stream_head, stream_heads;  // the first, and how many: query heads that share keys
    int owned_first, owned;         // of the sequence, in the tensor
    int stream_first, stream;
    int row;         // first row of the block, in its sequence
    int sums_tile;   // of the sums of its sequence's queries, the first tile
    int begin, end;  // tiles of each streamed head

    __device__ int tiles() const { return (end - begin) * stream_heads; }
};

template <class C>
__device__ Work find_work(const Params& p) {
    const bool causal = C::kMasked && p.is_causal;
    const std::int32_t* cu_q = C::kMasked ? p.cu_q : nullptr;
    const std::int32_t* cu_k = C::kMasked ? p.cu_k : nullptr;
    const Place place = C::kOwnsQueries
                            ? find_place(p.grid, p.nq, p.nk, cu_q, cu_k, p.sequences, causal)
                            : find_place(p.grid, p.nk, p.nq, cu_k, cu_q, p.sequences, false);
    Work w;
    w.batch = place.batch;
    w.owned_head = place.head;
    w.stream_head = C::kOwnsQueries ? w.owned_head / p.group : w.owned_head * p.group;
    w.stream_heads = C::kOwnsQueries ? 1 : p.group;
    w.owned_first = place.owned.first;
    w.owned = place.owned.count;
    w.stream_first = place.streamed.first;
    w.stream = place.streamed.count;
    w.row = place.row;
    w.sums_tile = C::kFused ? QuerySums::first_tile<C::kTile>(cu_q, place.sequence) : 0;
    w.begin = causal && !C::kOwnsQueries ? w.row / C::kTile : 0;
    const int seen = causal && C::kOwnsQueries ? min(w.stream, w.row + kRows) : w.stream;
    w.end = max(w.begin, (seen + C::kTile - 1) / C::kTile);
    return w;
}

// A query's numbers; `query` counts from the start of its sequence.
template <int kNumbers>
__device__ __forceinline__ void read_numbers(const Params& p, int batch, int head, int first,
                                             int query, int queries, float (&numbers)[kNumbers]) {
    constexpr bool kAdditive = kNumbers == count_numbers(true);
    const std::int64_t at =
        (static_cast<std::int64_t>(batch) * p.heads + head) * p.nq + first + query;
    const bool exists = query < queries;
    const float lse = exists ? p.lse[at] : -kInfinity;
    numbers[0] = lse == -kInfinity ? kInfinity : kAdditive ? lse : lse * kLog2e;
    numbers[1] = exists ? p.mu[at] : 0.0f;
    numbers[2] = exists ? p.delta0[at] : 0.0f;
    numbers[3] = exists ? p.delta1[at] : 0.0f;
    if constexpr (kAdditive) {
        numbers[4] = exists && p.lse_rest != nullptr ? p.lse_rest[at] : 0.0f;
    }
}

// The loading warp.
template <class C>
__device__ void load_tiles(const Params& p, const Work& w, const C& shared) {
    std::uint32_t landings = 0;
    {
        const TileIndex rows{w.owned_first + w.row, w.owned_head, w.batch};
        const int left = w.owned - w.row;
        // Fused passes sum over the rows of k and t_k, too. Not unrolled: that would take registers
        // that the loading warp doesn't have.
        const bool cut = C::kFused && C::kMasked && p.cu_k != nullptr && left < kRows;
#pragma unroll 1
        for (int i = 0; i < C::kOwned; ++i) {
            if (cut && i < 2) {
                load_cut_tile(shared, p.owned[i], rows, kRows, left, shared.owned(i),
                              shared.owned_full(), landings);
            } else if (threadIdx.x == 0) {
                load_tile<C::kBlocks>(p.owned[i], rows, kRows, shared.owned(i),
                                      shared.owned_full());
            }
        }
    }
    RingPosition<C::kSlots> at;
    int count = 0;
    for (int head = w.stream_head; head < w.stream_head + w.stream_heads; ++head) {
        for (int tile = w.begin; tile < w.end; ++tile, ++count) {
            const int first = tile * C::kTile, left = w.stream - first;
            const TileIndex from{w.stream_first + first, head, w.batch};
            const bool cut = C::kMasked && p.cu_q != nullptr && left < C::kTile;
            if constexpr (!C::kOwnsQueries) {
                shared.empty(at.slot).wait(at.parity ^ 1);
                for (int column = threadIdx.x; column < C::kTile; column += 32) {
                    float numbers[C::kNumbers];
                    read_numbers(p, w.batch, head, w.stream_first, first + column, w.stream,
                                 numbers);
#pragma unroll
                    for (int i = 0; i < C::kNumbers; ++i) {
                        shared.numbers(count)[i * C::kTile + column] = numbers[i];
                    }
                }
                __syncwarp();  // before the first slot is reported full
            }
#pragma unroll
            for (int i = 0; i < C::kPerTile; ++i) {
                // Where only scores are taken of the early ones, a mask hides what is behind.
                const bool summed = i >= C::kPerTile / 2 || C::kPass == Pass::kBoth;
                stream_tile(shared, p.streamed[i], from, at, cut && summed, left, landings);
            }
        }
    }
}

// The queries' numbers by value of a thread's scores: with queries owned they belong to its two
// rows and stay in registers, with queries streamed they belong to its columns.
template <class C>
struct Numbers {
    float kept[2][C::kNumbers];
    const float* tile;  // of this thread's first column

    template <int kWhich>
    __device__ float get(int i) const {
        if constexpr (C::kOwnsQueries) {
            return kept[i / 2 % 2][kWhich];
        } else {
            return tile[kWhich * C::kTile + i / 4 * 8 + i % 2];
        }
    }
};

// s = scale s + mask: scores or their tangents in natural units. `mask`: additive, or none.
template <class C>
__device__ __forceinline__ void add_mask(const Params& p, const Mask& mask, const Work& w,
                                         int query_head, int first_row, int first_column,
                                         float (&s)[C::kTile / 2]) {
    using T = typename C::T;
    const int thread = threadIdx.x % kGroupThreads;
    const T* data = mask.at<T>(w.batch, query_head);
    const std::int64_t to_row = C::kOwnsQueries ? mask.strides.row : mask.strides.column;
    const std::int64_t to_column = C::kOwnsQueries ? mask.strides.column : mask.strides.row;
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
        const int row = first_row + accumulator_row(thread, i);
        const int column = first_column + accumulator_column(thread, i);
        s[i] *= p.scale;
        if (data == nullptr || row >= w.owned || column >= w.stream) continue;
        s[i] += load(data[row * to_row + column * to_column]);
    }
}

// Takes scores to units of exp2 (with an additive mask: adds it) and puts -inf where pairs don't
// meet: rows from first_row on, columns from first_column on. Queries past the last have lse = inf
// already.
template <class C>
__device__ __forceinline__ void scale_and_hide(const Params& p, const Work& w, int query_head,
                                               int first_row, int first_column,
                                               float (&s)[C::kTile / 2]) {
    if constexpr (C::kAdditive) {
        add_mask<C>(p, p.mask_is_bool ? Mask{} : p.mask, w, query_head, first_row, first_column, s);
    } else {
        const float unit = p.scale * kLog2e;
#pragma unroll
        for (int i = 0; i < C::kTile / 2; ++i) s[i] *= unit;
    }
    const int end = first_column + C::kTile;
    const int thread = threadIdx.x % kGroupThreads;
    if constexpr (C::kMasked) {
        const int first_query = C::kOwnsQueries ? first_row : first_column;
        const int last_key = C::kOwnsQueries ? end - 1 : first_row + kGroupRows - 1;
        const bool crosses = p.is_causal && last_key > first_query;
        const bool reads = p.mask.data != nullptr && p.mask_is_bool;
        if (!reads && end <= w.stream && !crosses) return;
        const std::uint64_t bits = meeting_pairs<C::kTile / 2, !C::kOwnsQueries>(
            reads ? p.mask.at<bool>(w.batch, query_head) : nullptr, p.mask.strides, p.is_causal,
            first_row, first_column, C::kOwnsQueries ? w.owned : w.stream,
            C::kOwnsQueries ? w.stream : w.owned);
#pragma unroll
        for (int i = 0; i < C::kTile / 2; ++i) s[i] = bits >> i & 1 ? s[i] : -kInfinity;
    } else if constexpr (C::kOwnsQueries) {
        if (end <= w.stream) return;
#pragma unroll
        for (int i = 0; i < C::kTile / 2; ++i) {
            if (first_column + accumulator_column(thread, i) >= w.stream) s[i] = -kInfinity;
        }
    }
}

// acc = (kAdd: acc +) rows times a tile, and then: plus others times another; waits for it.
template <class C, bool kAdd = false>
__device__ __forceinline__ void score(float (&acc)[C::kTile / 2], std::uint64_t rows, int slot,
                                      const C& shared) {
    using T = typename C::T;
    fence_registers(acc);
    begin_products();
    multiply_scores<T, C::kTile, C::kSteps, kAdd>(rows, kRows, shared.tile(slot), acc);
    commit_products();
    wait_products<0>();
    fence_registers(acc);
}
template <class C, bool kAdd = false>
__device__ __forceinline__ void score(float (&acc)[C::kTile / 2], std::uint64_t rows, int slot,
                                      std::uint64_t others, int other_slot, const C& shared) {
    using T = typename C::T;
    fence_registers(acc);
    begin_products();
    multiply_scores<T, C::kTile, C::kSteps, kAdd>(rows, kRows, shared.tile(slot), acc);
    multiply_scores<T, C::kTile, C::kSteps, true>(others, kRows, shared.tile(other_slot), acc);
    commit_products();
    wait_products<0>();
    fence_registers(acc);
}

// acc = t_rows times a tile + rows times its tangent, of which one may not be there.
template <class C, bool kAdd = false>
__device__ __forceinline__ void tangent_score(float (&acc)[C::kTile / 2], std::uint64_t rows,
                                              std::uint64_t t_rows, int slot, int t_slot,
                                              const C& shared) {
    if constexpr (C::kOwnedTangents && C::kStreamedTangents) {
        score<C, kAdd>(acc, t_rows, slot, rows, t_slot, shared);
    } else if constexpr (C::kOwnedTangents) {
        score<C, kAdd>(acc, t_rows, slot, shared);
    } else {
        score<C, kAdd>(acc, rows, t_slot, shared);
    }
}

// P of scores in units of exp2, packed in pairs.
template <class C>
__device__ __forceinline__ void exponentiate(const float (&s)[C::kTile / 2],
                                             const Numbers<C>& numbers,
                                             std::uint32_t (&weights)[C::kTile / 4]) {
    const auto power = [&](int i) {
        const float x = s[i] - numbers.template get<0>(i);
        // The difference is exact where a mask is large; what lse lost to rounding comes off after.
        if constexpr (C::kAdditive) return fast_exp2((x - numbers.template get<4>(i)) * kLog2e);
        return fast_exp2(x);
    };
#pragma unroll
    for (int j = 0; j < C::kTile / 4; ++j) {
        weights[j] = pack<typename C::T>(power(2 * j), power(2 * j + 1));
    }
}

// x in pairs, rounded to 16 bits.
template <typename T, int kCount>
__device__ __forceinline__ void pack_all(const float (&x)[kCount],
                                         std::uint32_t (&pairs)[kCount / 2]) {
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) pairs[j] = pack<T>(x[2 * j], x[2 * j + 1]);
}

// The slot, as far as the compiler knows only once the values (of 32 bits) are computed; `zero`:
// see Params. It would else begin the next product first, and the tile before would wait in
// float32.
template <typename Value, int kCount>
__device__ __forceinline__ int after(int slot, const Value (&values)[kCount], std::uint32_t zero) {
    std::uint32_t all = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) all |= reinterpret_cast<const std::uint32_t&>(values[j]);
    return slot ^ static_cast<int>(all & zero);
}

// x = weight (factor x - number), with the query's number kWhich. `zero`: see Params.
template <class C, int kWhich>
__device__ __forceinline__ void weigh_all(const std::uint32_t (&weights)[C::kTile / 4],
                                          std::uint32_t zero, float factor,
                                          const Numbers<C>& numbers, float (&x)[C::kTile / 2]) {
#pragma unroll
    for (int i = 0; i < C::kTile / 2; ++i) {
        const float2 pair = unpack<typename C::T>(weights[i / 2] ^ zero);
        const float weight = i % 2 == 0 ? pair.x : pair.y;
        const float product = weight * fmaf(factor, x[i], -numbers.template get<kWhich>(i));
        // What does not meet has weight 0, and x may then be anything.
        x[i] = C::kMasked && weight == 0.0f ? 0.0f : product;
    }
}

// The next tile's slot and its tangent's, if there is one.
struct Slots {
    int primal, tangent;
};
template <class C>
__device__ __forceinline__ Slots next_slots(RingPosition<C::kSlots>& at, const C& shared) {
    const int primal = next_slot(at, shared);
    return {primal, C::kStreamedTangents ? next_slot(at, shared) : primal};
}
template <class C>
__device__ __forceinline__ void release(Slots slots, const C& shared) {
    shared.release(slots.primal);
    if constexpr (C::kStreamedTangents) shared.release(slots.tangent);
}

// a += W0 L, b += W1 L + W0 tL, if there is tL; waits for it.
template <class C>
__device__ __forceinline__ void add_products(std::uint32_t (&w0)[C::kTile / 4],
                                             std::uint32_t (&w1)[C::kTile / 4], Slots late,
                                             const C& shared, float (&a)[C::kD / 2],
                                             float (&b)[C::kD / 2]) {
    using T = typename C::T;
    fence_registers(w0);
    fence_registers(w1);
    fence_registers(a);
    fence_registers(b);
    begin_products();
    multiply_values<T, C::kD, C::kTile>(w0, shared.values(late.primal), a);
    if constexpr (C::kStreamedTangents) {
        multiply_values<T, C::kD, C::kTile>(w0, shared.values(late.tangent), b);
    }
    multiply_values<T, C::kD, C::kTile>(w1, shared.values(late.primal), b);
    commit_products();
    wait_products<0>();
    fence_registers(a);
    fence_registers(b);
}

// Until every warp that reads the group's owned rows has read them for the last time.
template <class C>
__device__ __forceinline__ void leave_owned(int group) {
    if constexpr (C::kFused) {
        sync_named(kWritten, kGroups * kGroupThreads);  // both groups read all keys
    } else {
        sync_named(kStaged + group, kGroupThreads);
    }
}

// A gradient of the owned rows, times `factor`, by way of an owned matrix; nobody reads these any
// more.
template <class C>
__device__ void store_sums(const Params& p, const Work& w, int i, int group, const C& shared,
                           const float (&values)[C::kD / 2], float factor) {
    const Gradient& target = p.sums[i];
    if (target.data == nullptr) return;
    using T = typename C::T;
    const Strides& strides = target.strides;
    T* rows = static_cast<T*>(target.data) + w.batch * strides.b + w.owned_head * strides.h +
              (w.owned_first + w.row) * strides.row;
    const float factors[2] = {factor, factor};
    if (i >= C::kOwned) __syncwarp();  // what went there before is read
    store_rows<T, kRows>(shared.owned(i % C::kOwned), group * kGroupRows, values, factors, rows,
                         strides.row, w.owned - w.row, target.columns);
}

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
