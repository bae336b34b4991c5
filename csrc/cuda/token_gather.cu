// token_gather on the GPU. Bytes: one read of the chosen rows, one write of y; the copy rate is the
// limit. Copies: a thread moves 16 bytes where all rows are aligned, else one value. Norms: a warp
// takes a row, in three passes, of which the first comes from memory and the others from cache.
#include "fewstep/cuda/token_rows.cuh"
#include "fewstep/ops/token_gather.h"

namespace fewstep::cuda {
namespace {

constexpr int kLanes = 32, kWarps = kTokenThreads / kLanes;

template <typename T>
struct Gather {
    TokenRows<T> x, scale, shift;
    TokenIndex index;
    T* y;
    std::int64_t batch, tokens;
    unsigned rows, columns;
    float eps;

    // Row m of sample b, null if there is none.
    __device__ const T* chosen(std::int64_t b, unsigned m) const {
        const std::int64_t n = index.at(b * rows + m);
        return n < 0 || n >= tokens ? nullptr : x.at(b, n);
    }
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kTokenThreads) token_gather_kernel(const Gather<T> p) {
    using Values = Neighbours<T, kVec>;
    // 32 bits, because a 64-bit division is a call with a stack frame.
    const unsigned elements = p.rows * p.columns;
    const unsigned chunks = (elements + kTokenThreads * kVec - 1) / (kTokenThreads * kVec);
    const std::int64_t b = blockIdx.x / chunks;
    const unsigned i = (blockIdx.x % chunks * kTokenThreads + threadIdx.x) * kVec;
    if (i >= elements) return;
    const T* const from = p.chosen(b, i / p.columns);
    const Values values = from == nullptr ? Values::of(NAN) : Values::at(from + i % p.columns);
    values.put(p.y + b * elements + i);
}

__device__ inline float warp_sum(float x) {
    for (int distance = kLanes / 2; distance > 0; distance /= 2) x += shuffle_xor(x, distance);
    return x;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kTokenThreads) token_gather_norm_kernel(const Gather<T> p) {
    using Values = Neighbours<T, kVec>;
    const unsigned groups = (p.rows + kWarps - 1) / kWarps;
    const std::int64_t b = blockIdx.x / groups;
    const unsigned m = blockIdx.x % groups * kWarps + threadIdx.x / kLanes;
    if (m >= p.rows) return;
    const T* const from = p.chosen(b, m);
    T* const to = p.y + (b * p.rows + m) * p.columns;
    const unsigned first = threadIdx.x % kLanes * kVec, step = kLanes * kVec;
    if (from == nullptr) {
        for (unsigned i = first; i < p.columns; i += step) Values::of(NAN).put(to + i);
        return;
    }
    float total = 0;
    for (unsigned i = first; i < p.columns; i += step) {
        const Values x = Values::at(from + i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) total += load(x.values[j]);
    }
    const float columns = static_cast<float>(p.columns);
    const float mean = quotient(warp_sum(total), columns);
    float square = 0;
    for (unsigned i = first; i < p.columns; i += step) {
        const Values x = Values::at(from + i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float u = load(x.values[j]) - mean;
            square += u * u;
        }
    }
    const float rstd = quotient(1.0f, sqrtf(quotient(warp_sum(square), columns) + p.eps));
    for (unsigned i = first; i < p.columns; i += step) {
        const Values x = Values::at(from + i);
        Values scale = Values::of(0.0f), shift = Values::of(0.0f), y;
        if (p.scale.data != nullptr) scale = Values::at(p.scale.at(b, 0) + i);
        if (p.shift.data != nullptr) shift = Values::at(p.shift.at(b, 0) + i);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float n = (load(x.values[j]) - mean) * rstd;
            y.values[j] = store<T>(n * (1.0f + load(scale.values[j])) + load(shift.values[j]));
        }
        y.put(to + i);
    }
}

template <typename T, int kVec>
void launch(const Gather<T>& p, bool normed, cudaStream_t stream) {
    const std::int64_t unit = normed ? kWarps : std::int64_t{kTokenThreads} * kVec;
    const std::int64_t all = normed ? p.rows : std::int64_t{p.rows} * p.columns;
    const std::int64_t blocks = (all + unit - 1) / unit * p.batch;
    FEWSTEP_CHECK(blocks < std::int64_t{1} << 31, "index: expected fewer rows than ", blocks,
                  " blocks take");
    launch_kernel(normed ? token_gather_norm_kernel<T, kVec> : token_gather_kernel<T, kVec>,
                  "token_gather", dim3(static_cast<unsigned>(blocks)), kTokenThreads, 0, stream, p);
}

}  // namespace

void token_gather(const TensorView& x, const TensorView& index, const TensorView* scale,
                  const TensorView* shift, const TensorView& y, bool normed, double eps,
                  std::uintptr_t stream) {
    check_token_gather(x, index, scale, shift, y, normed);
    if (y.numel() == 0) return;
    const std::int64_t elements = y.size(1) * y.size(2);
    FEWSTEP_CHECK(elements < std::int64_t{1} << 31,
                  "index: expected samples of fewer than 2^31 values, got ", elements);
    dispatch_device_float(x.dtype, "x", [&](auto tag) {
        using T = decltype(tag);
        constexpr int kVec = 16 / sizeof(T);
        const Gather<T> p{TokenRows<T>::of(&x),
                          TokenRows<T>::of(scale),
                          TokenRows<T>::of(shift),
                          TokenIndex::of(index),
                          y.ptr<T>(),
                          x.size(0),
                          x.size(1),
                          static_cast<unsigned>(y.size(1)),
                          static_cast<unsigned>(y.size(2)),
                          static_cast<float>(eps)};
        const bool vectors = y.size(2) % kVec == 0 && y.data % 16 == 0 && p.x.is_aligned() &&
                             p.scale.is_aligned() && p.shift.is_aligned();
        if (vectors) {
            launch<T, kVec>(p, normed, as_stream(stream));
        } else {
            launch<T, 1>(p, normed, as_stream(stream));
        }
    });
}

}  // namespace fewstep::cuda
