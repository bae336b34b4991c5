// snapshot_store on the GPU. Bytes: one read of x and of base, one write of a slot, and with the
// products one read of the other slots; the copy rate is the limit.
//
// A warp takes a line, a group whose maximum it needs before it rounds: 4 neighbours a thread where
// rows are aligned, so that a group of 128 is read once and stays in registers; of longer ones
// the rest is read again, from the first cache. A block takes a chunk of lines. Products are summed
// in float32 by thread and warp and in float64 across warps and blocks, in order: no atomics.
#include "fewstep/cuda/slot.cuh"
#include "fewstep/ops/snapshot_store.h"

namespace fewstep::cuda {
namespace {

constexpr int kThreads = 256, kLanes = 32, kWarps = kThreads / kLanes;
constexpr unsigned kAll = 0xffffffff;

struct Arguments {
    FloatRows x, base;
    void* ring;
    float* scale;
    std::int64_t slot;
    const std::int64_t* slot_at;
    double* partials;
    std::int64_t batch;
    unsigned rows, columns, length, per_row, lines, per_chunk, chunks;
    int slots;
    float top;

    __device__ std::int64_t index() const { return slot_at == nullptr ? slot : *slot_at; }
};

// The bits of x in e4m3, to nearest even, at most 448.
__device__ inline std::uint8_t round_to_e4m3(float x) {
    const unsigned sign = __float_as_uint(x) >> 24 & 0x80;
    const unsigned bits = min(__float_as_uint(x) & 0x7fffffff, 0x43e00000u);
    const unsigned normal = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - ((127 - 7) << 3);
    // Below 2^-6 the step is 2^-9, as it is for float32 from 2^14 on.
    const unsigned small = __float_as_uint(__uint_as_float(bits) + 16384.0f) - 0x46800000;
    return static_cast<std::uint8_t>((bits < 0x3c800000 ? small : normal) | sign);
}

template <typename S>
constexpr bool kCoded = kPerUnit<S> == 2 || sizeof(S) == 1;

template <typename S, int kVec>
__device__ inline Pack<S, kVec> encode(const float (&r)[kVec], float inverse) {
    Pack<S, kVec> pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
        const float step = __fmul_rn(r[i], inverse);
        if constexpr (std::is_same_v<S, std::int8_t>) {
            pack.values[i] = static_cast<std::int8_t>(__float2int_rn(step));
        } else if constexpr (std::is_same_v<S, e4m3>) {
            pack.values[i] = round_to_e4m3(step);
        } else if constexpr (std::is_same_v<S, int4x2>) {
            const int nibble = (__float2int_rn(step) & 15) << i % 2 * 4;
            pack.values[i / 2] =
                static_cast<std::uint8_t>(i % 2 == 0 ? nibble : pack.values[i / 2] | nibble);
        } else {
            pack.values[i] = store<S>(r[i]);
        }
    }
    return pack;
}

template <int kVec>
__device__ inline void difference(const Arguments& p, unsigned b, unsigned row, unsigned col,
                                  float (&r)[kVec]) {
    read(p.x, p.x.at(b, row, col), r);
    if (p.base.data == nullptr) return;
    float base[kVec];
    read(p.base, p.base.at(b, row, col), base);
#pragma unroll
    for (int i = 0; i < kVec; ++i) r[i] -= base[i];
}

// kDots is 0 without products, or at least the number of slots.
template <typename S, int kVec, int kDots>
__global__ void __launch_bounds__(kThreads, kDots == 0 ? 6 : 2)
    snapshot_store_kernel(const Arguments p) {
    using Codes = Pack<S, kVec>;
    const std::int64_t slot = p.index();
    if (slot < 0 || slot >= p.slots) return;
    const unsigned b = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
    const unsigned lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
    const unsigned end = min(p.lines, (chunk + 1) * p.per_chunk);
    S* const ring = static_cast<S*>(p.ring);
    float dots[kDots > 0 ? kDots : 1] = {};

    for (unsigned line = chunk * p.per_chunk + warp; line < end; line += kWarps) {
        const unsigned row = line / p.per_row, part = line % p.per_row;
        const unsigned first = part * p.length, n = min(p.length, p.columns - first);
        const auto row_of = [&](std::int64_t k) { return (k * p.batch + b) * p.rows + row; };
        const unsigned begin = lane * kVec;
        float held[kVec] = {};
        float inverse = 0.0f, scale = 1.0f;
        if (begin < n) difference(p, b, row, first + begin, held);
        if constexpr (kCoded<S>) {
            // As in quantize_row.h the bits order like the magnitudes, NaN on top.
            unsigned bits = 0;
#pragma unroll
            for (int i = 0; i < kVec; ++i) bits = max(bits, __float_as_uint(held[i]) & 0x7fffffff);
            for (unsigned j = begin + kLanes * kVec; j < n; j += kLanes * kVec) {
                float r[kVec];
                difference(p, b, row, first + j, r);
#pragma unroll
                for (int i = 0; i < kVec; ++i) bits = max(bits, __float_as_uint(r[i]) & 0x7fffffff);
            }
            const float amax = __uint_as_float(__reduce_max_sync(kAll, bits));
            const bool used = amax < INFINITY && amax >= p.top * 0x1p-126f;
            inverse = used ? __fdiv_rn(p.top, amax) : 0.0f;
            scale = used              ? __fdiv_rn(amax, p.top)
                    : amax < INFINITY ? 0.0f
                                      : __int_as_float(0x7fc00000);
            if (lane == 0) p.scale[row_of(slot) * p.per_row + part] = scale;
        }
        for (unsigned j = begin; j < n; j += kLanes * kVec) {
            float r[kVec];
            if (j == begin) {
#pragma unroll
                for (int i = 0; i < kVec; ++i) r[i] = held[i];
            } else {
                difference(p, b, row, first + j, r);
            }
            if (kCoded<S> && inverse == 0.0f) {
#pragma unroll
                for (int i = 0; i < kVec; ++i) r[i] = 0.0f;
            }
            const Codes codes = encode<S, kVec>(r, inverse);
            const auto at = [&](std::int64_t k) {
                return reinterpret_cast<Codes*>(ring +
                                                (row_of(k) * p.columns + first + j) / kPerUnit<S>);
            };
            *at(slot) = codes;
            float value[kVec];
#pragma unroll
            for (int i = 0; i < kVec; ++i) value[i] = codes.get(i) * scale;
#pragma unroll
            for (int k = 0; k < kDots; ++k) {
                if (k >= p.slots) break;
                // What is being written is not read.
                const Codes others = k == slot ? codes : *at(k);
                float factor = scale;
                if (kCoded<S> && k != slot) factor = p.scale[row_of(k) * p.per_row + part];
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < kVec; ++i) sum += value[i] * others.get(i);
                dots[k] += sum * factor;
            }
        }
    }
    if constexpr (kDots > 0) {
        __shared__ float shared[kWarps][kDots];
#pragma unroll
        for (int k = 0; k < kDots; ++k) {
            for (int offset = kLanes / 2; offset > 0; offset /= 2) {
                dots[k] += __shfl_xor_sync(kAll, dots[k], offset);
            }
            if (lane == 0) shared[warp][k] = dots[k];
        }
        __syncthreads();
        if (threadIdx.x < p.slots) {
            double total = 0;
            for (int w = 0; w < kWarps; ++w) total += shared[w][threadIdx.x];
            p.partials[blockIdx.x * std::int64_t{p.slots} + threadIdx.x] = total;
        }
    }
}

// A warp for each sample and slot.
__global__ void snapshot_store_finish_kernel(const Arguments p, float* gram) {
    const std::int64_t slot = p.index(), b = blockIdx.x / p.slots, k = blockIdx.x % p.slots;
    double sum = 0;
    if (slot < 0 || slot >= p.slots) {
        sum = NAN;
    } else {
        for (unsigned i = threadIdx.x; i < p.chunks; i += kLanes) {
            sum += p.partials[(b * p.chunks + i) * p.slots + k];
        }
    }
    for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(kAll, sum, offset);
    }
    if (threadIdx.x == 0) gram[blockIdx.x] = static_cast<float>(sum);
}

template <typename S, int kVec>
void launch(const Arguments& p, cudaStream_t stream) {
    const auto grid = static_cast<unsigned>(p.batch * p.chunks);
    if (p.partials == nullptr) {
        snapshot_store_kernel<S, kVec, 0><<<grid, kThreads, 0, stream>>>(p);
    } else if (p.slots <= 4) {
        snapshot_store_kernel<S, kVec, 4><<<grid, kThreads, 0, stream>>>(p);
    } else {
        snapshot_store_kernel<S, kVec, kMaxSlots><<<grid, kThreads, 0, stream>>>(p);
    }
    FEWSTEP_LAUNCH_CHECK("snapshot_store");
}

}  // namespace

void snapshot_store(const TensorView& x, const TensorView* base, const TensorView& snapshots,
                    const TensorView* scale, std::int64_t slot, const TensorView* slot_at,
                    std::int64_t group, const TensorView* partials, const TensorView* gram,
                    std::uintptr_t stream_handle) {
    check_snapshot_store(x, base, snapshots, scale, slot, slot_at, group, partials, gram);
    expect_device_float(x, "x");
    if (base != nullptr) expect_device_float(*base, "base");
    const cudaStream_t stream = as_stream(stream_handle);
    const std::int64_t rows = x.size(1), columns = x.size(2);
    FEWSTEP_CHECK(rows * columns < std::int64_t{1} << 31,
                  "x: expected samples of fewer than 2^31 values, got ", rows * columns);
    const StoreLines shape(rows, columns, group, scale != nullptr);
    Arguments p{};
    p.x = FloatRows::from(&x);
    p.base = FloatRows::from(base);
    p.ring = snapshots.ptr<void>();
    p.scale = scale == nullptr ? nullptr : scale->ptr<float>();
    p.slot = slot;
    p.slot_at = slot_at == nullptr ? nullptr : slot_at->ptr<std::int64_t>();
    p.partials = partials == nullptr ? nullptr : partials->ptr<double>();
    p.batch = x.size(0);
    p.rows = static_cast<unsigned>(rows);
    p.columns = static_cast<unsigned>(columns);
    p.length = static_cast<unsigned>(shape.length);
    p.per_row = static_cast<unsigned>(shape.per_row);
    p.lines = static_cast<unsigned>(shape.lines);
    p.per_chunk = static_cast<unsigned>(shape.per_chunk);
    p.chunks = static_cast<unsigned>(shape.chunks);
    p.slots = static_cast<int>(snapshots.size(0));
    p.top = top_of(slot_kind(snapshots, columns));
    constexpr int kVec = 4;
    const bool vectors = columns % kVec == 0 && shape.length % kVec == 0 &&
                         snapshots.data % 16 == 0 && p.x.aligned<kVec>() && p.base.aligned<kVec>();
    if (x.numel() > 0) {
        dispatch_slot(snapshots, columns, [&](auto tag) {
            using S = decltype(tag);
            if (vectors) {
                launch<S, kVec>(p, stream);
            } else {
                launch<S, kPerUnit<S>>(p, stream);
            }
        });
    }
    if (gram == nullptr || gram->numel() == 0) return;
    snapshot_store_finish_kernel<<<static_cast<unsigned>(gram->numel()), kLanes, 0, stream>>>(
        p, gram->ptr<float>());
    FEWSTEP_LAUNCH_CHECK("snapshot_store_finish");
}

}  // namespace fewstep::cuda
