// What attention's Hopper kernels share. A block of threads owns some rows of some matrices
// (queries in the forward) and streams tiles of others through a ring of slots: one warpgroup
// loads, two multiply, 64 rows each: of the 128 that the block owns, or both the same.
#pragma once

#include <cmath>
#include <limits>

#include "fewstep/cuda/hopper.cuh"

namespace fewstep::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kGroups = 2;  // multiplying warpgroups
constexpr int kGroupRows = 64;
constexpr int kRows = kGroups * kGroupRows;  // of a block of threads, unless it says otherwise
constexpr int kThreads = (kGroups + 1) * kGroupThreads;

// Named barriers, by warpgroup.
constexpr int kTurn = 0, kStaged = kGroups;

struct Strides {
    std::int64_t b, h, row, column;

    static Strides of(const TensorView& x, int first) {
        return {x.stride(first), x.stride(first + 1), x.stride(first + 2), x.stride(first + 3)};
    }
};

struct Mask {
    const void* data = nullptr;
    Strides strides{};

    template <typename T>
    __device__ const T* at(int batch, int head) const {
        if (data == nullptr) return nullptr;
        return static_cast<const T*>(data) + batch * strides.b + head * strides.h;
    }
};

// The blocks of threads of a launch: for each batch item and owned head the tiles of its rows.
// Packed sequences share a head's tiles, one more for each sequence than there are whole ones:
// sequence s has those from cu[s] / kRows + s on, which is never fewer than it needs, and known
// without adding up the lengths of those before it. Some find nothing to do.
struct Grid {
    int tiles, heads;

    static Grid of(std::int64_t rows, std::int64_t sequences, std::int64_t heads,
                   int block_rows = kRows) {
        const std::int64_t tiles =
            sequences == 0 ? (rows + block_rows - 1) / block_rows : rows / block_rows + sequences;
        return {static_cast<int>(tiles), static_cast<int>(heads)};
    }
    dim3 blocks(std::int64_t batches) const {
        const std::int64_t count = batches * heads * tiles;
        FEWSTEP_CHECK(count < (std::int64_t{1} << 31), "expected fewer than 2^31 tiles, got ",
                      count);
        return dim3(static_cast<unsigned>(count));
    }
};

// The number of packed sequences, 0 for none; refuses offsets that don't fit together or with the
// rest.
inline std::int64_t count_sequences(const TensorView* cu_q, const TensorView* cu_k,
                                    const TensorView* attn_mask, std::int64_t batches) {
    FEWSTEP_CHECK((cu_q == nullptr) == (cu_k == nullptr),
                  "cu_seqlens_q, cu_seqlens_k: expected both or none");
    if (cu_q == nullptr) return 0;
    const std::int64_t sequences = cu_q->size(0) - 1;
    expect_contiguous(*cu_q, "cu_seqlens_q", DType::kInt32, {sequences + 1});
    expect_contiguous(*cu_k, "cu_seqlens_k", DType::kInt32, {sequences + 1});
    FEWSTEP_CHECK(sequences > 0, "cu_seqlens_q: expected at least one sequence, got none");
    FEWSTEP_CHECK(batches == 1, "q: expected one packed batch item, got ", batches);
    FEWSTEP_CHECK(attn_mask == nullptr, "attn_mask: expected none with cu_seqlens_q, got one");
    return sequences;
}

// Rows of one side that belong to a sequence: the first, and how many.
struct Rows {
    int first, count;
};

// Of sequence s; offsets that don't fit the tensor are cut to it.
__device__ __forceinline__ Rows rows_of(const std::int32_t* cu, int s, int rows) {
    const int begin = min(max(cu[s], 0), rows);
    return {begin, min(max(cu[s + 1], begin), rows) - begin};
}

// This block's batch item, head and first row, and the rows of its sequence on both sides; the
// sequence is 0 where none are packed.
struct Place {
    int batch, head, row, sequence;
    Rows owned, streamed;
};

// `last_first`: tiles in reverse, for owners whose later rows have more to do.
template <int kBlockRows = kRows>
__device__ __forceinline__ Place find_place(const Grid& grid, int rows, int other_rows,
                                            const std::int32_t* cu, const std::int32_t* other_cu,
                                            int sequences, bool last_first) {
    Place place;
    int tile = static_cast<int>(blockIdx.x) % grid.tiles;
    const int rest = static_cast<int>(blockIdx.x) / grid.tiles;
    place.head = rest % grid.heads;
    place.batch = rest / grid.heads;
    if (last_first) tile = grid.tiles - 1 - tile;
    place.owned = {0, rows};
    place.streamed = {0, other_rows};
    place.sequence = 0;
    if (cu != nullptr) {
        int low = 0, high = sequences;  // the last sequence whose tiles begin at or before this one
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            (cu[middle] / kBlockRows + middle <= tile ? low : high) = middle;
        }
        tile -= cu[low] / kBlockRows + low;
        place.sequence = low;
        place.owned = rows_of(cu, low, rows);
        place.streamed = rows_of(other_cu, low, other_rows);
    }
    // Offsets that don't rise could leave a tile behind all rows, or before them.
    place.row = tile < 0 ? rows : tile * kBlockRows;
    return place;
}

// Bit i: whether the pair of value i of this thread's scores meets. Not unrolled: the answers take
// a register or two, their addresses would take many. Rows are queries, or with kOwnsKeys keys.
template <int kValues, bool kOwnsKeys>
__device__ __forceinline__ std::uint64_t meeting_pairs(const bool* mask, const Strides& strides,
                                                       bool is_causal, int first_row,
                                                       int first_column, int queries, int keys) {
    const int thread = threadIdx.x % kGroupThreads;
    std::uint64_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < kValues; ++i) {
        const int row = first_row + accumulator_row(thread, i);
        const int column = first_column + accumulator_column(thread, i);
        const int query = kOwnsKeys ? column : row, key = kOwnsKeys ? row : column;
        bool meets = key < keys && query < queries && (!is_causal || key <= query);
        if (mask != nullptr && meets) meets = mask[query * strides.row + key * strides.column];
        bits |= static_cast<std::uint64_t>(meets) << i;
    }
    return bits;
}

// Shared memory: kOwned matrices of kOwnedRows rows, a ring of tiles of kTileRows rows, barriers,
// kExtraBytes for what a kernel likes. Matrices have kD_ columns, in blocks of 64.
template <typename T_, int kD_, int kOwned_, int kTileRows_, int kMostSlots, int kExtraBytes = 0,
          int kOwnedRows_ = kRows>
struct Layout {
    using T = T_;
    static constexpr int kD = kD_, kOwned = kOwned_, kTileRows = kTileRows_;
    static constexpr int kOwnedRows = kOwnedRows_;
    static constexpr int kSteps = kD / kStepK;
    // Registers of a thread by role; together 168 for each of 384 threads, all that there are.
    static constexpr int kLoaderRegisters = 24, kMultiplierRegisters = 240;
    static constexpr int kBlocks = (kD + kBlockColumns - 1) / kBlockColumns;
    static constexpr int kOwnedBytes = kOwnedRows * kBlocks * kRowBytes;
    static constexpr int kSlotBytes = kTileRows * kBlocks * kRowBytes;
    static constexpr int kAlignment = kSwizzleRows * kRowBytes;
    static constexpr int kBarrierBytes = 256;
    static constexpr int kFit =
        (kMaxSharedBytes - kAlignment - kBarrierBytes - kExtraBytes - kOwned * kOwnedBytes) /
        kSlotBytes;
    static constexpr int kSlots = kFit < kMostSlots ? kFit : kMostSlots;
    static constexpr int kSharedBytes =
        kAlignment + kOwned * kOwnedBytes + kSlots * kSlotBytes + kBarrierBytes + kExtraBytes;
    static_assert((2 * kSlots + 2) * sizeof(std::uint64_t) <= kBarrierBytes);
    // Distance of the blocks of columns of a tile, where it is multiplied from the right.
    static constexpr int kLeading = kTileRows * kRowBytes;

    std::uint8_t* base;

    __device__ Layout() {
        std::uint8_t* const raw = dynamic_shared();
        const std::uint32_t past = shared_address(raw) % kAlignment;
        base = raw + (past == 0 ? 0 : kAlignment - past);
    }
    __device__ std::uint8_t* owned(int i) const { return base + i * kOwnedBytes; }
    __device__ std::uint8_t* slot(int i) const {
        return base + kOwned * kOwnedBytes + i * kSlotBytes;
    }
    __device__ Barrier& barrier(int i) const { return reinterpret_cast<Barrier*>(slot(kSlots))[i]; }
    __device__ std::uint8_t* extra() const { return slot(kSlots) + kBarrierBytes; }
    __device__ Barrier& full(int i) const { return barrier(i); }
    __device__ Barrier& empty(int i) const { return barrier(kSlots + i); }
    __device__ Barrier& owned_full() const { return barrier(2 * kSlots); }
    __device__ Barrier& landed() const { return barrier(2 * kSlots + 1); }

    // By one thread, before all others go on.
    __device__ void init_barriers() const {
        for (int i = 0; i < kSlots; ++i) {
            full(i).init(1);
            empty(i).init(kGroups * kGroupThreads / 32);
        }
        owned_full().init(kOwned);
        landed().init(1);
        fence_barriers();
    }

    // Descriptors: of a warpgroup's rows of an owned matrix; of a tile whose columns or (values,
    // from a block of columns on) rows are summed over.
    __device__ std::uint64_t rows(int i, int group) const {
        return matrix_descriptor(shared_address(owned(i) + group * kGroupRows * kRowBytes), 0);
    }
    __device__ std::uint64_t tile(int i) const {
        return matrix_descriptor(shared_address(slot(i)), 0);
    }
    __device__ std::uint64_t values(int i, int block = 0) const {
        return matrix_descriptor(shared_address(slot(i)) + block * kLeading, kLeading);
    }
    // Lane 0 speaks for its warp: after ordinary loads of the slot, unlike products, __syncwarp().
    __device__ void release(int i) const {
        if (threadIdx.x % 32 == 0) empty(i).arrive();
    }
};

// By one warp, a tile of which `left` rows belong to the sequence: those behind are zeroed (they
// are the next one's, and 0 x NaN is NaN) before `full` hears of it.
template <class L>
__device__ __forceinline__ void load_cut_tile(const L& shared, const TensorMap& source,
                                              TileIndex from, int rows, int left,
                                              std::uint8_t* tile, Barrier& full,
                                              std::uint32_t& landings) {
    const bool elected = threadIdx.x == 0;
    if (elected) load_tile<L::kBlocks>(source, from, rows, tile, shared.landed());
    shared.landed().wait(landings);
    landings ^= 1;
    for (int i = threadIdx.x; i < (rows - left) * (kRowBytes / 16); i += 32) {
#pragma unroll
        for (int block = 0; block < L::kBlocks; ++block) {
            store_shared(tile + (block * rows + left) * kRowBytes + i * 16, uint4{});
        }
    }
    fence_shared_stores();
    __syncwarp();
    if (elected) full.arrive();
}

// By one warp, a tile into the next slot once it is empty. `left`: rows that belong to the
// sequence; with `cut`, rows behind it are zeroed.
template <class L>
__device__ void stream_tile(const L& shared, const TensorMap& source, TileIndex from,
                            RingPosition<L::kSlots>& at, bool cut, int left,
                            std::uint32_t& landings) {
    const bool elected = threadIdx.x == 0;
    std::uint8_t* const tile = shared.slot(at.slot);
    shared.empty(at.slot).wait(at.parity ^ 1);
    if (cut) {
        load_cut_tile(shared, source, from, L::kTileRows, left, tile, shared.full(at.slot),
                      landings);
    } else if (elected) {
        load_tile<L::kBlocks>(source, from, L::kTileRows, tile, shared.full(at.slot));
    }
    __syncwarp();  // no lane is a round ahead of the others
    at.advance();
}

// The next slot of the ring, once it is full.
template <class L>
__device__ __forceinline__ int next_slot(RingPosition<L::kSlots>& at, const L& shared) {
    const int slot = at.slot;
    shared.full(slot).wait(at.parity);
    at.advance();
    return slot;
}

// Writes values * factor (by row of the thread) to rows of `target`, 16 bytes a thread, through
// kStagingRows rows of shared memory, where nobody reads this warp's any more. first_row: the
// warpgroup's, of the block's, in `staging` and `target`; `rows`: of the block's that exist.
template <typename T, int kStagingRows, int kCount>
__device__ void store_rows(std::uint8_t* staging, int first_row, const float (&values)[kCount],
                           const float (&factor)[2], T* target, std::int64_t stride, int rows,
                           int columns) {
    const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
    for (int j = 0; j < kCount / 2; ++j) {
        const int row = first_row + accumulator_row(thread, 2 * j);
        const int offset = tile_offset(row, accumulator_column(thread, 2 * j), kStagingRows);
        *reinterpret_cast<std::uint32_t*>(staging + offset) =
            pack<T>(values[2 * j] * factor[j % 2], values[2 * j + 1] * factor[j % 2]);
    }
    __syncwarp();
    constexpr int kChunks = kCount / 4;
    for (int j = thread % 32; j < 16 * kChunks; j += 32) {
        const int row = first_row + thread / 32 * 16 + j / kChunks, column = j % kChunks * 8;
        if (row >= rows || column >= columns) continue;
        *reinterpret_cast<uint4*>(target + row * stride + column) =
            *reinterpret_cast<const uint4*>(staging + tile_offset(row, column, kStagingRows));
    }
}

// The roles of a block's threads: load() by one warp, multiply(group) by the multiplying
// warpgroups.
template <class L, typename Load, typename Multiply>
__device__ __forceinline__ void run_roles(const L& shared, const Load& load,
                                          const Multiply& multiply) {
    // 168 for each of three groups of threads: with more the last to take waits for ever.
    static_assert(L::kLoaderRegisters + kGroups * L::kMultiplierRegisters == 504);
    if (threadIdx.x == 0) shared.init_barriers();
    __syncthreads();
    if (threadIdx.x < kGroupThreads) {
        give_registers<L::kLoaderRegisters>();
        if (threadIdx.x < 32) load();
    } else {
        take_registers<L::kMultiplierRegisters>();
        multiply(static_cast<int>(threadIdx.x / kGroupThreads) - 1);
    }
}

}  // namespace fewstep::cuda
