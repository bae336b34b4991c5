// Hopper's instructions as the kernels use them, over CUTLASS's wrappers of single instructions:
// bulk tensor loads that signal barriers, and matrix products on arrays of registers. Needs sm_90a.
//
// Kernels touch the chip through this header alone. tests/cuda/emulation has another one with the
// same names, for a compiler without CUDA: there the kernels run on the host, thread by thread.
#pragma once

#include <cuda.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>
#include <utility>

#include "cute/arch/copy_sm90_desc.hpp"
#include "cute/arch/copy_sm90_tma.hpp"
#include "cute/arch/mma_sm90_gmma.hpp"
#include "cute/arch/mma_sm90_gmma_ext.hpp"
#include "cutlass/arch/barrier.h"
#include "cutlass/arch/reg_reconfig.h"
#include "cutlass/bfloat16.h"
#include "cutlass/half.h"
#include "fewstep/cuda/hopper_layout.h"
#include "fewstep/cuda/lanes.cuh"
#include "fewstep/cuda/tensor_map.h"

namespace fewstep::cuda {

constexpr int kGroupThreads = 128;          // a warpgroup
constexpr int kMaxSharedBytes = 227 << 10;  // that a block can ask for on sm_90

// CUTLASS's wrappers are volatile and no more: the compiler may move ordinary accesses of shared
// memory across them. Not across this; no instruction.
__device__ __forceinline__ void fence_compiler() {
    asm volatile("" ::: "memory");
}

// A barrier in shared memory that counts arrivals and bytes, in phases of alternating parity.
class Barrier {
  public:
    __device__ __forceinline__ void init(int arrivals) { Wrapped::init(&state_, arrivals); }
    __device__ __forceinline__ void arrive() {
        fence_compiler();
        Wrapped::arrive(&state_);
    }
    __device__ __forceinline__ void arrive_and_expect_tx(int bytes) {
        fence_compiler();
        Wrapped::arrive_and_expect_tx(&state_, bytes);
    }
    __device__ __forceinline__ void wait(std::uint32_t parity) {
        Wrapped::wait(&state_, parity);
        fence_compiler();
    }
    __device__ __forceinline__ std::uint64_t* address() { return &state_; }

  private:
    using Wrapped = cutlass::arch::ClusterTransactionBarrier;
    std::uint64_t state_;
};

// Named barriers: of `threads` threads that sync or arrive, the former go on once all are there.
__device__ __forceinline__ void sync_named(int id, int threads) {
    fence_compiler();
    cutlass::arch::NamedBarrier::sync(threads, id);
    fence_compiler();
}
__device__ __forceinline__ void arrive_named(int id, int threads) {
    fence_compiler();
    cutlass::arch::NamedBarrier::arrive(threads, id);
}

// After barriers were initialised, before anyone uses them.
__device__ __forceinline__ void fence_barriers() {
    fence_compiler();
    cutlass::arch::fence_barrier_init();
}
// An ordinary store to shared memory that the tensor cores or the copy engine are to read, and what
// the storing thread does after such stores, before it tells anyone.
template <typename T>
__device__ __forceinline__ void store_shared(std::uint8_t* target, const T& value) {
    *reinterpret_cast<T*>(target) = value;
}
__device__ __forceinline__ void fence_shared_stores() {
    fence_compiler();
    cutlass::arch::fence_view_async_shared();
    fence_compiler();
}

// Registers per thread of the calling warpgroup, from here on.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
    cutlass::arch::warpgroup_reg_dealloc<kRegisters>();
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
    cutlass::arch::warpgroup_reg_alloc<kRegisters>();
}

__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
    return cute::cast_smem_ptr_to_uint(p);
}

// A position in a ring of slots, and the parity of the round it is in.
template <int kSlots>
struct RingPosition {
    int slot = 0;
    std::uint32_t parity = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == kSlots) {
            slot = 0;
            parity ^= 1;
        }
    }
};

// ---- bulk tensor loads -------------------------------------------------------------------------

// A tensor as the copy engine reads it: boxes of `box_rows` rows x 64 columns, swizzled, or of 32
// columns in rows of 64 bytes (half_row_offset); zeros outside.
struct TensorMap {
    CUtensorMap map;
    int head_step, batch_step;
};

inline TensorMap make_tensor_map(const TensorView& x, int box_rows,
                                 int box_columns = kBlockColumns) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t status = cudaGetDriverEntryPointByVersion(
            "cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
        if (status != cudaSuccess || found != cudaDriverEntryPointSuccess) {
            throw std::runtime_error("fewstep: the driver has no cuTensorMapEncodeTiled");
        }
        return reinterpret_cast<Encode>(function);
    }();
    const MapDescription d = describe(x);
    TensorMap result{{}, d.head_step, d.batch_step};
    cuuint64_t sizes[4], strides[3];
    std::copy(d.sizes, d.sizes + 4, sizes);
    std::copy(d.strides, d.strides + 3, strides);
    const cuuint32_t box[4] = {static_cast<cuuint32_t>(box_columns),
                               static_cast<cuuint32_t>(box_rows), 1, 1};
    const CUtensorMapSwizzle swizzle =
        box_columns == kBlockColumns ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    const cuuint32_t steps[4] = {1, 1, 1, 1};
    // The engine moves bits: bfloat16 stands for any 16-bit value.
    const CUresult status =
        encode(&result.map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, x.ptr<void>(), sizes, strides, box,
               steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS) {
        throw std::runtime_error(::fewstep::detail::concat(
            "fewstep: cuTensorMapEncodeTiled failed with ", static_cast<int>(status)));
    }
    return result;
}

// Loads the box's columns, from `column` on, x its rows to `target`; it signals `barrier`, which
// has been told the bytes to wait for.
__device__ __forceinline__ void load_block(const TensorMap& source, TileIndex at, int column,
                                           std::uint8_t* target, Barrier& barrier) {
    cute::SM90_TMA_LOAD_4D::copy(&source.map, barrier.address(),
                                 static_cast<std::uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL),
                                 target, column, at.row, at.head * source.head_step,
                                 at.batch * source.batch_step);
}

// Loads kBlocks blocks of 64 columns x box_rows rows to `target`; they signal `barrier`, which is
// told the bytes to wait for.
template <int kBlocks>
__device__ __forceinline__ void load_tile(const TensorMap& source, TileIndex at, int box_rows,
                                          std::uint8_t* target, Barrier& barrier) {
    barrier.arrive_and_expect_tx(kBlocks * box_rows * kRowBytes);
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
        load_block(source, at, block * kBlockColumns, target + block * box_rows * kRowBytes,
                   barrier);
    }
}

// ---- matrix products on arrays of registers ----------------------------------------------------

// Bits of an 8-bit float: 4 of exponent, 3 of mantissa, no infinity.
struct Float8 {
    std::uint8_t bits;
};

// The instructions for 64 x kN products with 32-bit sums: integers (in two's complement) of int8,
// else floats. "Scores": both operands K-major in shared memory. "Mixed": the left one in
// registers, the right one as for scores. "Values": the left one in registers, the right one
// MN-major in shared memory. "Transposed": both MN-major in shared memory.
template <typename T, int kN>
struct MatrixInstruction;
template <typename T>
using Sum = std::conditional_t<std::is_same_v<T, std::int8_t>, std::uint32_t, float>;

#define FEWSTEP_MATRIX_INSTRUCTION(T, TYPES, N)                                             \
    template <>                                                                             \
    struct MatrixInstruction<T, N> {                                                        \
        using Scores =                                                                      \
            cute::SM90::GMMA::MMA_64x##N##x16_F32##TYPES##_SS<cute::SM90::GMMA::Major::K,   \
                                                              cute::SM90::GMMA::Major::K>;  \
        using Mixed =                                                                       \
            cute::SM90::GMMA::MMA_64x##N##x16_F32##TYPES##_RS<cute::SM90::GMMA::Major::K,   \
                                                              cute::SM90::GMMA::Major::K>;  \
        using Values =                                                                      \
            cute::SM90::GMMA::MMA_64x##N##x16_F32##TYPES##_RS<cute::SM90::GMMA::Major::K,   \
                                                              cute::SM90::GMMA::Major::MN>; \
        using Transposed =                                                                  \
            cute::SM90::GMMA::MMA_64x##N##x16_F32##TYPES##_SS<cute::SM90::GMMA::Major::MN,  \
                                                              cute::SM90::GMMA::Major::MN>; \
    };
#define FEWSTEP_MATRIX_INSTRUCTION_8(T, TYPES, N, ARGUMENTS)                        \
    template <>                                                                     \
    struct MatrixInstruction<T, N> {                                                \
        using Scores = cute::SM90::GMMA::MMA_64x##N##x32_##TYPES##_SS_TN ARGUMENTS; \
        using Mixed = cute::SM90::GMMA::MMA_64x##N##x32_##TYPES##_RS_TN ARGUMENTS;  \
    };
#define FEWSTEP_MATRIX_INSTRUCTIONS(N)                      \
    FEWSTEP_MATRIX_INSTRUCTION(__nv_bfloat16, BF16BF16, N)  \
    FEWSTEP_MATRIX_INSTRUCTION(__half, F16F16, N)           \
    FEWSTEP_MATRIX_INSTRUCTION_8(std::int8_t, S32S8S8, N, ) \
    FEWSTEP_MATRIX_INSTRUCTION_8(Float8, F32E4M3E4M3, N, <>)
FEWSTEP_MATRIX_INSTRUCTIONS(32)
FEWSTEP_MATRIX_INSTRUCTIONS(48)
FEWSTEP_MATRIX_INSTRUCTIONS(64)
FEWSTEP_MATRIX_INSTRUCTIONS(80)
FEWSTEP_MATRIX_INSTRUCTIONS(96)
FEWSTEP_MATRIX_INSTRUCTIONS(112)
FEWSTEP_MATRIX_INSTRUCTIONS(128)
FEWSTEP_MATRIX_INSTRUCTIONS(192)
FEWSTEP_MATRIX_INSTRUCTIONS(256)
#undef FEWSTEP_MATRIX_INSTRUCTIONS
#undef FEWSTEP_MATRIX_INSTRUCTION_8
#undef FEWSTEP_MATRIX_INSTRUCTION

// Products are asynchronous: `begin` once registers that they read or add to are written, `commit`
// to close a batch, `wait<n>` until all but the last n batches are done.
__device__ __forceinline__ void begin_products() {
    cute::warpgroup_arrive();
}
__device__ __forceinline__ void commit_products() {
    cute::warpgroup_commit_batch();
}
template <int kLeft>
__device__ __forceinline__ void wait_products() {
    cute::warpgroup_wait<kLeft>();
}

// Keeps the compiler from moving uses of the registers across; no instruction.
template <typename T, int kCount>
__device__ __forceinline__ void fence_registers(T (&values)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) cute::warpgroup_fence_operand(values[i]);
}

namespace registers {
template <typename Instruction, typename Sum, int kCount, std::size_t... kI>
__device__ __forceinline__ void issue_scores(std::uint64_t a, std::uint64_t b, Sum (&acc)[kCount],
                                             cute::SM90::GMMA::ScaleOut keep,
                                             std::index_sequence<kI...>) {
    Instruction::fma(a, b, acc[kI]..., keep);
}
template <typename Instruction, typename Sum, int kCount, std::size_t... kI>
__device__ __forceinline__ void issue_values(const std::uint32_t* a, std::uint64_t b,
                                             Sum (&acc)[kCount], std::index_sequence<kI...>) {
    Instruction::fma(a[0], a[1], a[2], a[3], b, acc[kI]..., cute::SM90::GMMA::ScaleOut::One);
}
}  // namespace registers

// acc (+)= A B^T over kSteps times 32 bytes of columns: A is 64 rows of a tile of a_rows rows, B a
// tile of kN rows, both by the descriptor of their first row. Asynchronous; kAdd: onto what acc
// holds.
template <typename T, int kN, int kSteps, bool kAdd>
__device__ __forceinline__ void multiply_scores(std::uint64_t a, int a_rows, std::uint64_t b,
                                                Sum<T> (&acc)[kN / 2]) {
    using Instruction = typename MatrixInstruction<T, kN>::Scores;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        const auto keep =
            kAdd || k > 0 ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
        registers::issue_scores<Instruction>(a + (columns_step(k, a_rows) >> 4),
                                             b + (columns_step(k, kN) >> 4), acc, keep,
                                             std::make_index_sequence<kN / 2>{});
    }
}

// acc += A B^T over kSteps times 32 bytes of columns: A is 64 rows in registers, four for each step
// (mixed_column), B a tile of kN rows by the descriptor of its first. Asynchronous.
template <typename T, int kN, int kSteps>
__device__ __forceinline__ void multiply_mixed(const std::uint32_t (&a)[4 * kSteps],
                                               std::uint64_t b, Sum<T> (&acc)[kN / 2]) {
    using Instruction = typename MatrixInstruction<T, kN>::Mixed;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
        registers::issue_values<Instruction>(a + 4 * k, b + (columns_step(k, kN) >> 4), acc,
                                             std::make_index_sequence<kN / 2>{});
    }
}

// acc += A B: A is 64 x kRows in registers, packed from an accumulator, B a tile of kRows rows and
// (at least) kN columns by its descriptor. Asynchronous.
template <typename T, int kN, int kRows>
__device__ __forceinline__ void multiply_values(const std::uint32_t (&a)[kRows / 4],
                                                std::uint64_t b, float (&acc)[kN / 2]) {
    using Instruction = typename MatrixInstruction<T, kN>::Values;
#pragma unroll
    for (int k = 0; k < kRows / kStepK; ++k) {
        registers::issue_values<Instruction>(a + 4 * k, b + (rows_step(k) >> 4), acc,
                                             std::make_index_sequence<kN / 2>{});
    }
}

// acc (+)= A^T B: A is a tile of kRows rows and 64 columns, B one of as many rows and (at least) kN
// columns, both by their descriptors. Asynchronous.
template <typename T, int kN, int kRows, bool kAdd>
__device__ __forceinline__ void multiply_transposed(std::uint64_t a, std::uint64_t b,
                                                    float (&acc)[kN / 2]) {
    using Instruction = typename MatrixInstruction<T, kN>::Transposed;
#pragma unroll
    for (int k = 0; k < kRows / kStepK; ++k) {
        const auto keep =
            kAdd || k > 0 ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
        registers::issue_scores<Instruction>(a + (rows_step(k) >> 4), b + (rows_step(k) >> 4), acc,
                                             keep, std::make_index_sequence<kN / 2>{});
    }
}

namespace registers {
template <int kBytes>
__device__ __forceinline__ void add_four(float* target, float x, float y, float z, float w) {
    asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0 + %5], {%1, %2, %3, %4};"
                 :
                 : "l"(target), "f"(x), "f"(y), "f"(z), "f"(w), "n"(kBytes)
                 : "memory");
}
template <int kStride, int kCount, std::size_t... kI>
__device__ __forceinline__ void add_fours(float* target, const float (&values)[kCount],
                                          std::index_sequence<kI...>) {
    (add_four<kI * kStride * 4>(target, values[4 * kI], values[4 * kI + 1], values[4 * kI + 2],
                                values[4 * kI + 3]),
     ...);
}
}  // namespace registers

// Adds to floats in device memory, to each by itself, in no order of threads: four to `target`, a
// multiple of 16 bytes, the next four kStride floats behind it, and so on. Nothing waits for it.
template <int kStride, int kCount>
__device__ __forceinline__ void add_to_global(float* target, const float (&values)[kCount]) {
    registers::add_fours<kStride>(target, values, std::make_index_sequence<kCount / 4>{});
}

// Has the second-level cache fetch what lies there; nothing waits for it.
__device__ __forceinline__ void prefetch_global(const void* at) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}

// ---- 8-bit values
// --------------------------------------------------------------------------------

// Four values in a register, rounded to nearest; they are in range.
template <typename T>
__device__ __forceinline__ std::uint32_t pack_bytes(const float* x);
template <>
__device__ __forceinline__ std::uint32_t pack_bytes<std::int8_t>(const float* x) {
    std::uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bytes |= (__float2int_rn(x[i]) & 0xff) << 8 * i;
    return bytes;
}
template <>
__device__ __forceinline__ std::uint32_t pack_bytes<Float8>(const float* x) {
    const auto pair = [](float low, float high) -> std::uint32_t {
        return __nv_cvt_float2_to_fp8x2({low, high}, __NV_SATFINITE, __NV_E4M3);
    };
    return pair(x[0], x[1]) | pair(x[2], x[3]) << 16;
}

// Bytes of low (0-3) and high (4-7), the i-th as the i-th hexadecimal digit of `selector` says.
__device__ __forceinline__ std::uint32_t permute_bytes(std::uint32_t low, std::uint32_t high,
                                                       std::uint32_t selector) {
    return __byte_perm(low, high, selector);
}

// A sum of products of 8-bit values, of less than 2^22 in absolute value if it is an integer: then
// two ordinary operations convert it, where the instruction for it has a fraction of their rate.
__device__ __forceinline__ float widen(float sum) {
    return sum;
}
__device__ __forceinline__ float widen(std::uint32_t sum) {
    constexpr std::uint32_t kBits = 0x4b400000;  // of 1.5 * 2^23, the float whose unit is 1
    return __uint_as_float(sum + kBits) - 12582912.0f;
}

// ---- reductions over the four threads that share a row of an accumulator ------------------------

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffff, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffff, x, 1);
    return x + __shfl_xor_sync(0xffffffff, x, 2);
}

// Of values that are not negative: their bits have their order.
__device__ __forceinline__ void atomic_max(float* target, float x) {
    atomicMax(reinterpret_cast<int*>(target), __float_as_int(x));
}
// Of bits as unsigned numbers.
__device__ __forceinline__ void atomic_max_bits(std::uint32_t* target, std::uint32_t bits) {
    atomicMax(target, bits);
}
__device__ __forceinline__ void atomic_add(std::uint32_t* target, std::uint32_t count) {
    atomicAdd(target, count);
}

__device__ __forceinline__ float fast_log(float x) {
    return __logf(x);
}

// Zeros, on the stream.
inline void clear(void* target, std::size_t bytes, cudaStream_t stream) {
    const cudaError_t status = cudaMemsetAsync(target, 0, bytes, stream);
    if (status != cudaSuccess) {
        throw std::runtime_error(::fewstep::detail::concat("fewstep: clearing ", bytes,
                                                           " bytes: ", cudaGetErrorString(status)));
    }
}

}  // namespace fewstep::cuda
