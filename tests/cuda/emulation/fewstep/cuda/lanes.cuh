// The names of csrc/include/fewstep/cuda/lanes.cuh for a C++ compiler without CUDA, and with
// launch.cuh beside this all that kernels for any GPU need to run on the host (machine.h).
#pragma once

#include "fewstep/cuda/launch.cuh"
#include "fewstep/cuda/machine.h"

inline void __syncthreads() {
    namespace e = fewstep::emulation;
    e::sync(e::kWholeBlock, static_cast<int>(e::machine().threads.size()), true);
}
inline void __syncwarp() {
    namespace e = fewstep::emulation;
    e::sync(e::kWarp + e::machine().running / 32, 32, true);
}

namespace fewstep::cuda {

constexpr int kMaxSharedBytes = 227 << 10;

inline std::uint8_t* dynamic_shared() {
    return emulation::machine().shared() + 16;
}

template <typename T>
float2 unpack(std::uint32_t pair) {
    T halves[2];
    std::memcpy(halves, &pair, sizeof pair);
    return {static_cast<float>(to_acc(halves[0])), static_cast<float>(to_acc(halves[1]))};
}
template <typename T>
std::uint32_t pack(float low, float high) {
    const T halves[2] = {Convert<T>::from(low), Convert<T>::from(high)};
    std::uint32_t pair;
    std::memcpy(&pair, halves, sizeof pair);
    return pair;
}

inline float float_of(std::uint32_t bits) {
    return bits_to_float(bits);
}
inline float shuffle_xor(float x, int distance) {
    emulation::Machine& m = emulation::machine();
    std::memcpy(&m.thread().exchanged, &x, sizeof x);
    __syncwarp();
    float other;
    std::memcpy(&other, &m.threads[m.running ^ distance].exchanged, sizeof other);
    __syncwarp();
    return other;
}
inline float fast_exp2(float x) {
    return std::exp2(x);
}
inline float fast_divide(float x, float y) {
    return x / y;
}
inline float max_or_nan(float x, float y) {
    return x != x || y != y ? std::numeric_limits<float>::quiet_NaN() : std::max(x, y);
}
inline float product(float x, float y) {
    return x * y;
}
inline float sum(float x, float y) {
    return x + y;
}
inline float difference(float x, float y) {
    return x - y;
}
inline float quotient(float x, float y) {
    return x / y;
}
inline float fused(float x, float y, float z) {
    return std::fma(x, y, z);
}

inline std::uint32_t low_bytes(const float* x) {
    std::uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) bytes |= (float_to_bits(x[i]) & 0xff) << 8 * i;
    return bytes;
}
inline std::uint32_t e4m3_bytes(const float* x) {
    std::uint32_t bytes = 0;
    for (int i = 0; i < 4; ++i) {
        bytes |= static_cast<std::uint32_t>(emulation::to_e4m3(x[i])) << 8 * i;
    }
    return bytes;
}

// Lands late, as on the chip: what is read before `wait_copies` and a barrier is old.
inline void copy_to_shared(void* target, const void* source) {
    FEWSTEP_CHECK(reinterpret_cast<std::uintptr_t>(target) % 16 == 0 &&
                      reinterpret_cast<std::uintptr_t>(source) % 16 == 0,
                  "emulation: expected addresses that are multiples of 16");
    emulation::machine().thread().issued.push_back([=] { std::memcpy(target, source, 16); });
}
inline void wait_copies() {
    std::vector<emulation::Task>& issued = emulation::machine().thread().issued;
    for (const emulation::Task& copy : issued) copy();
    issued.clear();
}

template <typename T>
void multiply_tile(float (&acc)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2]) {
    emulation::Machine& m = emulation::machine();
    std::vector<std::uint32_t> offered(a, a + 4);
    offered.insert(offered.end(), b, b + 2);
    m.thread().operands.assign(1, offered);
    __syncwarp();
    const int first = m.running / 32 * 32, lane = m.running % 32;
    // Value `k` of 16 of a row or column: of thread 4 line + k % 8 / 2, its pair k / 8.
    const auto value = [&](int line, int index, int k) {
        const auto& of = m.threads[first + line * 4 + k % 8 / 2].operands[0];
        const float2 pair = unpack<T>(of[index]);
        return k % 2 == 0 ? pair.x : pair.y;
    };
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            acc[i] += value(row, k / 8 * 2 + i / 2, k) * value(column, 4 + k / 8, k);
        }
    }
    __syncwarp();
}

// Few, so that blocks that stay take several tiles each.
inline int count_multiprocessors() {
    return 2;
}

template <typename Params>
void launch_kernel(void (*kernel)(Params), const char*, dim3 grid, int threads, int shared_bytes,
                   cudaStream_t, const Params& params) {
    FEWSTEP_CHECK(shared_bytes <= kMaxSharedBytes, "emulation: too much shared memory");
    emulation::Machine& m = emulation::machine();
    m.grid = grid;
    m.body = [&] { kernel(params); };
    for (unsigned z = 0; z < grid.z; ++z) {
        for (unsigned y = 0; y < grid.y; ++y) {
            for (unsigned x = 0; x < grid.x; ++x) {
                m.block = dim3(x, y, z);
                emulation::run_block(threads);
            }
        }
    }
}

}  // namespace fewstep::cuda
