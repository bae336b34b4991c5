// 4-bit weights on the GPU: loads that are used once, and nibbles as 16-bit floats. sm_80 and
// later.
//
// tests/cuda/emulation has another one with the same names, for a compiler without CUDA.
#pragma once

#include "fewstep/cuda/lanes.cuh"

namespace fewstep::cuda {

// 16 bytes at a multiple of 16 that nobody reads again.
__device__ __forceinline__ uint4 load_once(const std::uint8_t* p) {
    uint4 value;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(p));
    return value;
}
__device__ __forceinline__ std::uint32_t load_pair_of_bytes(const std::uint8_t* p) {
    return __ldg(reinterpret_cast<const unsigned short*>(p));
}
__device__ __forceinline__ uint4 load_sixteen(const std::uint8_t* p) {
    return *reinterpret_cast<const uint4*>(p);
}
__device__ __forceinline__ void store_sixteen(std::uint8_t* p, uint4 value) {
    *reinterpret_cast<uint4*>(p) = value;
}

// x of another lane of this warp; all take part.
__device__ __forceinline__ std::uint32_t shuffle_from(std::uint32_t x, int lane) {
    return __shfl_sync(0xffffffff, x, lane);
}

// The signed nibbles at bits 0 and 16, as two T: the bits of 128 + (q + 8) (for float16 of 1024 +
// (q + 8)), which one LOP3 makes, minus 136 (1032), which is exact.
template <typename T>
__device__ __forceinline__ std::uint32_t widen_nibbles(std::uint32_t bits) {
    constexpr bool kIsBFloat16 = std::is_same_v<T, __nv_bfloat16>;
    std::uint32_t pair;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;"  // (a & b) ^ c, of which the compiler would make two
        : "=r"(pair)
        : "r"(bits), "r"(0x000f000fu), "r"(kIsBFloat16 ? 0x43084308u : 0x64086408u));
    if constexpr (kIsBFloat16) {
        asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(pair) : "r"(0x3f803f80u), "r"(0xc308c308u));
    } else {
        asm("add.rn.f16x2 %0, %0, %1;" : "+r"(pair) : "r"(0xe408e408u));
    }
    return pair;
}

// A block's shared memory on the current device, at most.
inline int max_shared_bytes() {
    int device = 0, bytes = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (status != cudaSuccess) {
        throw std::runtime_error(::fewstep::detail::concat("fewstep: asking for shared memory: ",
                                                           cudaGetErrorString(status)));
    }
    return bytes;
}

}  // namespace fewstep::cuda
