// The names of csrc/include/fewstep/cuda/nibbles.cuh for a C++ compiler without CUDA.
#pragma once

#include "fewstep/cuda/lanes.cuh"

namespace fewstep::cuda {

namespace emulated {
inline uint4 read(const std::uint8_t* p, const char* what) {
    FEWSTEP_CHECK(reinterpret_cast<std::uintptr_t>(p) % 16 == 0,
                  "emulation: expected a multiple of 16 to read ", what, " from");
    uint4 value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
}  // namespace emulated

inline uint4 load_once(const std::uint8_t* p) {
    return emulated::read(p, "weights");
}
inline std::uint32_t load_pair_of_bytes(const std::uint8_t* p) {
    std::uint16_t value;
    std::memcpy(&value, p, sizeof value);
    return value;
}
inline uint4 load_sixteen(const std::uint8_t* p) {
    return emulated::read(p, "shared memory");
}
inline void store_sixteen(std::uint8_t* p, uint4 value) {
    emulated::read(p, "shared memory");
    std::memcpy(p, &value, sizeof value);
}

inline std::uint32_t shuffle_from(std::uint32_t x, int lane) {
    emulation::Machine& m = emulation::machine();
    m.thread().exchanged = x;
    __syncwarp();
    const std::uint32_t other = m.threads[m.running / 32 * 32 + lane].exchanged;
    __syncwarp();
    return other;
}

template <typename T>
std::uint32_t widen_nibbles(std::uint32_t bits) {
    // By way of the same bits as on the chip.
    const std::uint32_t magic = std::is_same_v<T, __nv_bfloat16> ? 0x43084308u : 0x64086408u;
    const float shift = std::is_same_v<T, __nv_bfloat16> ? 136.0f : 1032.0f;
    const float2 pair = unpack<T>((bits & 0x000f000fu) ^ magic);
    return pack<T>(pair.x - shift, pair.y - shift);
}

inline int max_shared_bytes() {
    return kMaxSharedBytes;
}

}  // namespace fewstep::cuda
