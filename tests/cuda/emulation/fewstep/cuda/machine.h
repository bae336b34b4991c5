// The machine under the emulated kernels: one block of threads at a time, each thread a coroutine
// (ucontext); barriers, late loads and products, shared memory that remembers who stored where, and
// matrix descriptors read by their bits. hopper.cuh beside this has the names that kernels use.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cuda/hopper_layout.h"
#include "fewstep/cuda/tensor_map.h"
#include "fewstep/numeric.h"
#include "fewstep/tensor.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define threadIdx (::fewstep::emulation::thread_index())
#define blockIdx (::fewstep::emulation::machine().block)
#define blockDim (::fewstep::emulation::block_size())
#define gridDim (::fewstep::emulation::machine().grid)

using __nv_bfloat16 = fewstep::bfloat16;
using __half = fewstep::float16;
using cudaStream_t = std::uintptr_t;
using std::max;
using std::min;

struct float2 {
    float x, y;
};
struct uint2 {
    std::uint32_t x = 0, y = 0;
};
struct uint4 {
    std::uint32_t x = 0, y = 0, z = 0, w = 0;
};
struct dim3 {
    unsigned x, y, z;
    dim3(std::int64_t a = 1, std::int64_t b = 1, std::int64_t c = 1)
        : x(static_cast<unsigned>(a)), y(static_cast<unsigned>(b)), z(static_cast<unsigned>(c)) {}
};

namespace fewstep::cuda {

struct Float8 {
    std::uint8_t bits;
};
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::uint32_t, float>;

}  // namespace fewstep::cuda

namespace fewstep::emulation {

using cuda::Float8;

constexpr std::size_t kStackBytes = 512 << 10;
constexpr std::size_t kSharedBytes = 256 << 10;  // addresses fit the 18 bits of a descriptor
constexpr int kWholeBlock = 1000, kWarp = 2000;  // ids of barriers that have no number

using Task = std::function<void()>;

struct Thread {
    ucontext_t context{};
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    bool done = false;
    std::vector<Task> issued;                          // products not committed yet
    std::deque<std::vector<Task>> batches;             // committed, not waited for
    std::vector<std::vector<std::uint32_t>> operands;  // left operands in registers, by issue
    std::uint32_t exchanged = 0;                       // what a shuffle offers
    // Stores to shared memory since the last fence: offset and bytes.
    std::vector<std::pair<std::uint32_t, std::size_t>> stored;
};

struct TransactionBarrier {
    int count, pending;
    long bytes;
    std::uint32_t phase;

    void check() {
        if (pending != 0 || bytes != 0) return;
        phase ^= 1;
        pending = count;
    }
};

struct NamedBarrier {
    int arrived = 0;
    long generation = 0;
};

struct Machine {
    dim3 grid, block;
    std::vector<Thread> threads;
    int running = 0;
    ucontext_t scheduler{};
    std::vector<std::uint8_t> memory = std::vector<std::uint8_t>(2 * kSharedBytes);
    // Shared memory as the tensor cores see it: bulk loads, and what threads stored and fenced.
    std::vector<std::uint8_t> seen = std::vector<std::uint8_t>(kSharedBytes);
    std::vector<TransactionBarrier> barriers;
    std::vector<std::pair<int, NamedBarrier>> named;
    std::vector<Task> loads;  // under way
    long progress = 0;
    std::exception_ptr error;
    Task body;

    // At an odd multiple of 16: kernels align what they need.
    std::uint8_t* shared() {
        const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
        return memory.data() + (kSharedBytes - start % kSharedBytes) % kSharedBytes;
    }
    void publish(std::uint32_t offset, std::size_t bytes) {
        std::memcpy(seen.data() + offset, shared() + offset, bytes);
    }
    Thread& thread() { return threads[running]; }
    NamedBarrier& named_barrier(int id) {
        for (auto& [key, barrier] : named) {
            if (key == id) return barrier;
        }
        return named.emplace_back(id, NamedBarrier{}).second;
    }
};

inline Machine& machine() {
    static Machine instance;
    return instance;
}
inline dim3 thread_index() {
    return dim3(machine().running);
}
inline dim3 block_size() {
    return dim3(static_cast<std::int64_t>(machine().threads.size()));
}

template <typename Condition>
void block_until(const Condition& condition) {
    Machine& m = machine();
    while (!condition()) swapcontext(&m.thread().context, &m.scheduler);
    ++m.progress;
}

inline void sync(int id, int threads, bool waits) {
    const long generation = machine().named_barrier(id).generation;
    NamedBarrier& barrier = machine().named_barrier(id);
    ++machine().progress;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    } else if (waits) {
        block_until([&] { return machine().named_barrier(id).generation != generation; });
    }
}

inline void run_thread() {
    Machine& m = machine();
    try {
        m.body();
    } catch (...) {
        m.error = std::current_exception();
    }
    m.thread().done = true;
    ++m.progress;
    swapcontext(&m.thread().context, &m.scheduler);
}

inline void run_block(int threads) {
    Machine& m = machine();
    m.named.clear();
    m.barriers.clear();
    m.loads.clear();
    m.threads.clear();
    m.threads.resize(threads);
    std::fill(m.memory.begin(), m.memory.end(), std::uint8_t{0xff});
    std::fill(m.seen.begin(), m.seen.end(), std::uint8_t{0xff});
    for (Thread& thread : m.threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.get();
        thread.context.uc_stack.ss_size = kStackBytes;
        thread.context.uc_link = nullptr;
        makecontext(&thread.context, run_thread, 0);
    }
    for (;;) {
        const long before = m.progress;
        bool alive = false;
        for (m.running = 0; m.running < threads; ++m.running) {
            if (m.thread().done) continue;
            alive = true;
            swapcontext(&m.scheduler, &m.thread().context);
            if (m.error) std::rethrow_exception(std::exchange(m.error, nullptr));
        }
        if (!alive) break;
        std::vector<Task> landing;
        landing.swap(m.loads);
        for (const Task& load : landing) load();
        if (landing.empty() && m.progress == before) {
            throw std::runtime_error("emulation: deadlock, no thread of the block can go on");
        }
    }
    if (!m.loads.empty()) throw std::runtime_error("emulation: a load outlived its block");
}

// An 8-bit float: 4 bits of exponent with bias 7, 3 of mantissa, 0x7f is NaN.
inline float from_e4m3(std::uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float size = exponent == 15 && mantissa == 7 ? std::numeric_limits<float>::quiet_NaN()
                       : exponent == 0                 ? std::ldexp(mantissa, -9)
                                                       : std::ldexp(8 + mantissa, exponent - 10);
    return bits & 0x80 ? -size : size;
}
inline std::uint8_t to_e4m3(float x) {
    const std::uint8_t sign = std::signbit(x) ? 0x80 : 0;
    if (x != x) return sign | 0x7f;
    // A unit in the last place is 2^-9 or more, so the rounded value is a whole number of them.
    const float size = std::min(std::fabs(x), 448.0f);
    const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
    const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
    return sign | static_cast<std::uint8_t>((exponent + 6) * 8 + units);
}

// The byte that the hardware means by address `at` of something swizzled in rows of 128 bytes, or
// of 64.
inline std::uint32_t swizzled(std::uint32_t at, int row_bytes = 128) {
    return at ^ (at >> 7 & (row_bytes == 128 ? 7 : 3)) << 4;
}

inline std::uint32_t widened(std::int8_t value) {
    return static_cast<std::uint32_t>(std::int32_t{value});
}
inline float widened(Float8 value) {
    return from_e4m3(value.bits);
}
template <typename T>
float widened(T value) {
    return static_cast<float>(to_acc(value));
}

struct Descriptor {
    std::uint32_t start, leading, stride;

    explicit Descriptor(std::uint64_t bits)
        : start((bits & 0x3fff) << 4),
          leading((bits >> 16 & 0x3fff) << 4),
          stride((bits >> 32 & 0x3fff) << 4) {
        FEWSTEP_CHECK(bits >> 62 == 1, "emulation: expected the 128-byte swizzle");
        FEWSTEP_CHECK((bits >> 49 & 7) == 0, "emulation: expected base offset 0");
    }
    template <typename T>
    auto read(std::uint32_t at) const {
        Machine& m = machine();
        const std::uint32_t from = swizzled(at);
        T value;
        std::memcpy(&value, m.shared() + from, sizeof value);
        FEWSTEP_CHECK(std::memcmp(&value, m.seen.data() + from, sizeof value) == 0,
                      "emulation: a product reads a store that was not fenced, offset ", from);
        return widened(value);
    }
    // Element (row, column) of 32 bytes of columns; sums run over columns.
    template <typename T>
    auto k_major(int row, int column) const {
        return read<T>(start + row / 8 * stride + row % 8 * 128 +
                       column * static_cast<int>(sizeof(T)));
    }
    // Element (row, column) of 16 rows; sums run over rows.
    template <typename T>
    float mn_major(int row, int column) const {
        return read<T>(start + column / 64 * leading + row / 8 * stride + row % 8 * 128 +
                       column % 64 * 2);
    }
};

}  // namespace fewstep::emulation
