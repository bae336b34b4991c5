// The names of csrc/include/fewstep/cuda/hopper.cuh for a C++ compiler without CUDA: kernels for
// Hopper run on the host, block after block, each thread a coroutine (ucontext).
//
// What it holds kernels to: matrix operands are read through the bits of their descriptors and the
// hardware's swizzle; products and bulk loads happen late (at the wait, or a round of all threads
// after the issue), so code that does not wait reads old values; shared memory starts as NaN; what
// threads store there reaches products only by `store_shared` and then the same thread's
// `fence_shared_stores`, and a product that reads other bytes than the threads see is an error; a
// round in which nobody gets on is a deadlock. What it can't see: races between warps that the
// order of the coroutines hides, and what the compiler makes of the registers.
#pragma once

#include "fewstep/cuda/lanes.cuh"

namespace fewstep::cuda {

constexpr int kGroupThreads = 128;

struct Barrier {
    std::uint64_t index;

    emulation::TransactionBarrier& state() const { return emulation::machine().barriers.at(index); }
    void init(int count) {
        index = emulation::machine().barriers.size();
        emulation::machine().barriers.push_back({count, count, 0, 0});
    }
    void arrive() const {
        FEWSTEP_CHECK(state().pending > 0, "emulation: one arrival too many");
        --state().pending;
        state().check();
        ++emulation::machine().progress;
    }
    void arrive_and_expect_tx(int bytes) const {
        state().bytes += bytes;
        arrive();
    }
    void complete(int bytes) const {
        state().bytes -= bytes;
        state().check();
    }
    void wait(std::uint32_t parity) const {
        emulation::block_until([&] { return (state().phase & 1) != parity; });
    }
};
static_assert(sizeof(Barrier) == sizeof(std::uint64_t));

inline void sync_named(int id, int threads) {
    emulation::sync(id, threads, true);
}
inline void arrive_named(int id, int threads) {
    emulation::sync(id, threads, false);
}
inline void fence_compiler() {}
inline void fence_barriers() {}
template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

inline std::uint32_t shared_address(const void* p) {
    return static_cast<std::uint32_t>(static_cast<const std::uint8_t*>(p) -
                                      emulation::machine().shared());
}

template <typename T>
void store_shared(std::uint8_t* target, const T& value) {
    std::memcpy(target, &value, sizeof value);
    emulation::machine().thread().stored.emplace_back(shared_address(target), sizeof value);
}
inline void fence_shared_stores() {
    emulation::Machine& m = emulation::machine();
    for (const auto& [offset, bytes] : m.thread().stored) m.publish(offset, bytes);
    m.thread().stored.clear();
}

template <int kSlots>
struct RingPosition {
    int slot = 0;
    std::uint32_t parity = 0;

    void advance() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

struct TensorMap {
    MapDescription description;
    const std::uint8_t* data = nullptr;
    int box_rows = 0, box_columns = 0;
};
inline TensorMap make_tensor_map(const TensorView& x, int box_rows,
                                 int box_columns = kBlockColumns) {
    FEWSTEP_CHECK(is_loadable(x), "emulation: expected a tensor that the copy engine can read");
    const MapDescription d = describe(x);
    for (const std::uint64_t size : d.sizes) {
        FEWSTEP_CHECK(size > 0, "emulation: expected sizes above 0 for the copy engine");
    }
    return {d, x.ptr<std::uint8_t>(), box_rows, box_columns};
}

inline void load_block(const TensorMap& source, TileIndex at, int column, std::uint8_t* target,
                       Barrier& barrier) {
    emulation::machine().loads.push_back([=, &barrier] {
        const int row_bytes = 2 * source.box_columns;
        const MapDescription& d = source.description;
        const auto head = static_cast<std::uint64_t>(at.head * d.head_step);
        const auto batch = static_cast<std::uint64_t>(at.batch * d.batch_step);
        for (int r = 0; r < source.box_rows; ++r) {
            for (int i = 0; i < source.box_columns; ++i) {
                const auto row = static_cast<std::uint64_t>(at.row + r);
                const auto from = static_cast<std::uint64_t>(column + i);
                std::uint16_t value = 0;
                if (from < d.sizes[0] && row < d.sizes[1] && head < d.sizes[2] &&
                    batch < d.sizes[3]) {
                    std::memcpy(&value,
                                source.data + 2 * from + row * d.strides[0] + head * d.strides[1] +
                                    batch * d.strides[2],
                                sizeof value);
                }
                const std::uint32_t to =
                    emulation::swizzled(shared_address(target) + r * row_bytes + i * 2, row_bytes);
                std::memcpy(emulation::machine().shared() + to, &value, sizeof value);
                emulation::machine().publish(to, sizeof value);
            }
        }
        barrier.complete(source.box_rows * row_bytes);
    });
}
template <int kBlocks>
void load_tile(const TensorMap& source, TileIndex at, int box_rows, std::uint8_t* target,
               Barrier& barrier) {
    FEWSTEP_CHECK(box_rows == source.box_rows, "emulation: expected the box of the tensor map");
    barrier.arrive_and_expect_tx(kBlocks * box_rows * kRowBytes);
    for (int block = 0; block < kBlocks; ++block) {
        load_block(source, at, block * kBlockColumns, target + block * box_rows * kRowBytes,
                   barrier);
    }
}

inline void begin_products() {}
inline void commit_products() {
    emulation::Thread& thread = emulation::machine().thread();
    thread.batches.push_back(std::move(thread.issued));
    thread.issued.clear();
}
template <int kLeft>
void wait_products() {
    __syncwarp();  // the others of the quad have issued what this thread reads
    emulation::Thread& thread = emulation::machine().thread();
    while (thread.batches.size() > kLeft) {
        for (const emulation::Task& product : thread.batches.front()) product();
        thread.batches.pop_front();
    }
}
template <typename T, int kCount>
void fence_registers(T (&)[kCount]) {}

template <typename T, int kN, int kSteps, bool kAdd>
void multiply_scores(std::uint64_t a, int a_rows, std::uint64_t b, Sum<T> (&acc)[kN / 2]) {
    constexpr int kColumns = 32 / sizeof(T);
    const int thread = emulation::machine().running % kGroupThreads;
    emulation::machine().thread().issued.push_back([=, &acc] {
        for (int k = 0; k < kSteps; ++k) {
            const emulation::Descriptor left(a + (columns_step(k, a_rows) >> 4));
            const emulation::Descriptor right(b + (columns_step(k, kN) >> 4));
            for (int i = 0; i < kN / 2; ++i) {
                Sum<T> sum = kAdd || k > 0 ? acc[i] : Sum<T>{0};
                const int row = accumulator_row(thread, i), column = accumulator_column(thread, i);
                for (int j = 0; j < kColumns; ++j) {
                    sum += left.k_major<T>(row, j) * right.k_major<T>(column, j);
                }
                acc[i] = sum;
            }
        }
    });
}

inline void prefetch_global(const void*) {}

template <typename T, int kN, int kSteps>
void multiply_mixed(const std::uint32_t (&a)[4 * kSteps], std::uint64_t b, Sum<T> (&acc)[kN / 2]) {
    constexpr int kSize = sizeof(T), kColumns = 32 / kSize;
    emulation::Machine& m = emulation::machine();
    const int self = m.running;
    const std::size_t issue = m.thread().operands.size();
    m.thread().operands.emplace_back(a, a + 4 * kSteps);
    m.thread().issued.push_back([=, &acc, &m] {
        for (int k = 0; k < kSteps; ++k) {
            // Registers of the quad, as the instruction's table of the left operand has them.
            Sum<T> left[2][kColumns];
            for (int j = 0; j < 2 * kColumns; ++j) {
                const int second_row = j / kColumns, at = j % kColumns * kSize;
                const int mate = self / 4 * 4 + at % 16 / 4, index = at / 16 * 2 + second_row;
                const std::uint32_t word = m.threads[mate].operands.at(issue)[4 * k + index];
                T value;
                std::memcpy(&value, reinterpret_cast<const char*>(&word) + at % 4, kSize);
                left[second_row][j % kColumns] = emulation::widened(value);
            }
            const emulation::Descriptor right(b + (columns_step(k, kN) >> 4));
            for (int i = 0; i < kN / 2; ++i) {
                const int column = accumulator_column(self % kGroupThreads, i);
                for (int j = 0; j < kColumns; ++j) {
                    acc[i] += left[i / 2 % 2][j] * right.k_major<T>(column, j);
                }
            }
        }
    });
}

template <typename T, int kN, int kRows>
void multiply_values(const std::uint32_t (&a)[kRows / 4], std::uint64_t b, float (&acc)[kN / 2]) {
    emulation::Machine& m = emulation::machine();
    const int self = m.running;
    const std::size_t issue = m.thread().operands.size();
    m.thread().operands.emplace_back(a, a + kRows / 4);
    m.thread().issued.push_back([=, &acc, &m] {
        // Registers of the quad, as the instruction's table of the left operand has them.
        const auto left = [&](bool second_row, int k, int column) {
            const int mate = self / 4 * 4 + column % 8 / 2;
            const int index = 4 * k + column / 8 * 2 + second_row;
            const float2 pair = unpack<T>(m.threads[mate].operands.at(issue)[index]);
            return column % 2 == 0 ? pair.x : pair.y;
        };
        for (int k = 0; k < kRows / kStepK; ++k) {
            const emulation::Descriptor right(b + (rows_step(k) >> 4));
            for (int i = 0; i < kN / 2; ++i) {
                const int column = accumulator_column(self % kGroupThreads, i);
                for (int j = 0; j < kStepK; ++j) {
                    acc[i] += left(i / 2 % 2 == 1, k, j) * right.mn_major<T>(j, column);
                }
            }
        }
    });
}

template <typename T, int kN, int kRows, bool kAdd>
void multiply_transposed(std::uint64_t a, std::uint64_t b, float (&acc)[kN / 2]) {
    const int thread = emulation::machine().running % kGroupThreads;
    emulation::machine().thread().issued.push_back([=, &acc] {
        for (int k = 0; k < kRows / kStepK; ++k) {
            const emulation::Descriptor left(a + (rows_step(k) >> 4));
            const emulation::Descriptor right(b + (rows_step(k) >> 4));
            for (int i = 0; i < kN / 2; ++i) {
                float sum = kAdd || k > 0 ? acc[i] : 0.0f;
                const int row = accumulator_row(thread, i), column = accumulator_column(thread, i);
                for (int j = 0; j < kStepK; ++j) {
                    sum += left.mn_major<T>(j, row) * right.mn_major<T>(j, column);
                }
                acc[i] = sum;
            }
        }
    });
}

template <int kStride, int kCount>
void add_to_global(float* target, const float (&values)[kCount]) {
    FEWSTEP_CHECK(reinterpret_cast<std::uintptr_t>(target) % 16 == 0 && kStride % 4 == 0,
                  "emulation: expected multiples of 16 bytes to add to");
    for (int i = 0; i < kCount; ++i) target[i / 4 * kStride + i % 4] += values[i];
}

template <typename T>
std::uint32_t pack_bytes(const float* x) {
    std::uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        std::uint8_t byte;
        if constexpr (std::is_same_v<T, std::int8_t>) {
            FEWSTEP_CHECK(!(std::fabs(x[i]) > 127.5f), "emulation: ", x[i], " is not in range");
            byte = x[i] == x[i] ? static_cast<std::uint8_t>(std::lrint(x[i])) : 0;
        } else {
            byte = emulation::to_e4m3(x[i]);
        }
        bytes |= static_cast<std::uint32_t>(byte) << 8 * i;
    }
    return bytes;
}
inline std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high, std::uint32_t selector) {
    const std::uint64_t bytes = static_cast<std::uint64_t>(high) << 32 | low;
    std::uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
        const std::uint32_t digit = selector >> 4 * i & 15;
        FEWSTEP_CHECK(digit < 8, "emulation: expected the numbers of eight bytes, got ", digit);
        result |= static_cast<std::uint32_t>(bytes >> 8 * digit & 0xff) << 8 * i;
    }
    return result;
}
inline float widen(float sum) {
    return sum;
}
inline float widen(std::uint32_t sum) {
    const auto value = static_cast<std::int32_t>(sum);
    FEWSTEP_CHECK(std::abs(value) < 1 << 22, "emulation: the sum ", value, " is not in range");
    return static_cast<float>(value);
}
inline void atomic_max(float* target, float x) {
    *target = std::max(*target, x);
}
inline void atomic_max_bits(std::uint32_t* target, std::uint32_t bits) {
    *target = std::max(*target, bits);
}
inline void atomic_add(std::uint32_t* target, std::uint32_t count) {
    *target += count;
}
inline int clears = 0;  // so far
inline void clear(void* target, std::size_t bytes, cudaStream_t) {
    ++clears;
    std::memset(target, 0, bytes);
}

inline float quad_max(float x) {
    x = fmaxf(x, shuffle_xor(x, 1));
    return fmaxf(x, shuffle_xor(x, 2));
}
inline float quad_sum(float x) {
    x += shuffle_xor(x, 1);
    return x + shuffle_xor(x, 2);
}
inline float fast_log(float x) {
    return std::log(x);
}
}  // namespace fewstep::cuda
