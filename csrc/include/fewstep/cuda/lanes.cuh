// What kernels of any GPU from sm_80 on use of the chip: exchanges in a warp, roundings that stay
// apart, conversions, copies to shared memory, one product of 16-bit tiles, and the launch.
//
// tests/cuda/emulation has another one with the same names, for a compiler without CUDA.
#pragma once

#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "fewstep/cuda/launch.cuh"

namespace fewstep::cuda {

__device__ __forceinline__ std::uint8_t* dynamic_shared() {
    extern __shared__ __align__(16) std::uint8_t bytes[];
    return bytes;
}

// Two 16-bit values in a register.
template <typename T>
__device__ __forceinline__ std::uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ std::uint32_t pack<__nv_bfloat16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
}
template <>
__device__ __forceinline__ std::uint32_t pack<__half>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const std::uint32_t&>(pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack(std::uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(std::uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
template <>
__device__ __forceinline__ float2 unpack<__half>(std::uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
}

__device__ __forceinline__ float float_of(std::uint32_t bits) {
    return __uint_as_float(bits);
}

// Another thread's x, of this warp; all take part.
__device__ __forceinline__ float shuffle_xor(float x, int distance) {
    return __shfl_xor_sync(0xffffffff, x, distance);
}

// The larger one, NaN if either is.
__device__ __forceinline__ float max_or_nan(float x, float y) {
    float larger;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(x), "f"(y));
    return larger;
}

// One rounding each: no compiler makes a fused operation of a product and a sum.
__device__ __forceinline__ float product(float x, float y) {
    return __fmul_rn(x, y);
}
__device__ __forceinline__ float sum(float x, float y) {
    return __fadd_rn(x, y);
}
__device__ __forceinline__ float difference(float x, float y) {
    return __fsub_rn(x, y);
}
__device__ __forceinline__ float quotient(float x, float y) {
    return __fdiv_rn(x, y);
}
__device__ __forceinline__ float fused(float x, float y, float z) {
    return __fmaf_rn(x, y, z);
}

__device__ __forceinline__ float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float fast_divide(float x, float y) {
    return __fdividef(x, y);
}

// The lowest bytes of four values.
__device__ __forceinline__ std::uint32_t low_bytes(const float* x) {
    const std::uint32_t low = __byte_perm(__float_as_uint(x[0]), __float_as_uint(x[1]), 0x0040);
    const std::uint32_t high = __byte_perm(__float_as_uint(x[2]), __float_as_uint(x[3]), 0x0040);
    return __byte_perm(low, high, 0x5410);
}

// Four values as e4m3, to nearest even, at most 448.
__device__ __forceinline__ std::uint32_t e4m3_bytes(const float* x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    const auto pair = [](float low, float high) -> std::uint32_t {
        return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
    };
    return pair(x[0], x[1]) | pair(x[2], x[3]) << 16;
#else
    std::uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // as fewstep/cpu/quantize_row_fp8.h
        const std::uint32_t sign = __float_as_uint(x[i]) >> 24 & 0x80;
        const float magnitude = fminf(fabsf(x[i]), 448.0f);
        const std::uint32_t bits = __float_as_uint(magnitude);
        const std::uint32_t normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
        const std::uint32_t small = __float_as_uint(magnitude + 0x1p14f) - 0x46800000;
        bytes |= ((bits < 0x3c800000 ? small : normal) | sign) << 8 * i;
    }
    return bytes;
#endif
}

// 16 bytes from global to shared memory, both at multiples of 16; they are there after
// `wait_copies` and a barrier.
__device__ __forceinline__ void copy_to_shared(void* target, const void* source) {
    const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(source)
                 : "memory");
}
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// acc [16 x 8] += a [16 x 16] b [16 x 8] over a warp. Thread 4 g + t has of a the pairs at columns
// 2 t and 2 t + 8 of rows g and g + 8 (rows first), of b those of column g, and of acc columns 2 t
// and 2 t + 1 of rows g and g + 8.
template <typename T>
__device__ __forceinline__ void multiply_tile(float (&acc)[4], const std::uint32_t (&a)[4],
                                              const std::uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

// Of the current device.
inline int count_multiprocessors() {
    int device = 0, count = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess) {
        status = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    }
    if (status != cudaSuccess) {
        throw std::runtime_error(::fewstep::detail::concat("fewstep: asking for multiprocessors: ",
                                                           cudaGetErrorString(status)));
    }
    return count;
}

template <typename Params>
void launch_kernel(void (*kernel)(Params), const char* name, dim3 grid, int threads,
                   int shared_bytes, cudaStream_t stream, const Params& params) {
    const cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) {
        throw std::runtime_error(::fewstep::detail::concat("fewstep: ", shared_bytes,
                                                           " bytes of shared memory for ", name,
                                                           ": ", cudaGetErrorString(status)));
    }
    kernel<<<grid, threads, shared_bytes, stream>>>(params);
    FEWSTEP_LAUNCH_CHECK(name);
}

}  // namespace fewstep::cuda
