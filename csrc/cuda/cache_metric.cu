// cache_metric on the GPU. Bytes: 2 reads (3 with `previous`) and, on request, 1 write per element;
// about 6 FLOP per element, so the copy rate is the limit.
//
// Stage 1: one block of 256 threads per chunk of 16,384 elements. A thread moves 16 bytes at a time
// where all rows are 16-byte aligned, else one element. Stage 2: one warp per sample adds the
// chunks in a fixed order. No atomics, so two runs agree bitwise.
#include "fewstep/cuda/launch.cuh"
#include "fewstep/ops/cache_metric.h"

namespace fewstep::cuda {
namespace {

constexpr int kThreads = 256;

template <typename T>
struct Operand {
    T* data;
    std::int64_t stride_b, stride_r;

    static Operand from(const TensorView* view) {
        if (view == nullptr) return {nullptr, 0, 0};
        return {view->ptr<T>(), view->stride(0), view->stride(1)};
    }
    __device__ T* at(std::int64_t b, std::int64_t row, std::int64_t col) const {
        return data + b * stride_b + row * stride_r + col;
    }
    template <int kVec>
    bool aligned() const {
        return reinterpret_cast<std::uintptr_t>(data) % (kVec * sizeof(T)) == 0 &&
               stride_b % kVec == 0 && stride_r % kVec == 0;
    }
};

template <typename T, int kVec>
struct alignas(sizeof(T) * kVec) Pack {
    T values[kVec];
};

__device__ inline float warp_sum(float value) {
    for (int offset = 16; offset > 0; offset /= 2) {
        value += __shfl_xor_sync(0xffffffff, value, offset);
    }
    return value;
}

template <typename T, int kVec>
__global__ void __launch_bounds__(kThreads)
    cache_metric_kernel(Operand<const T> x, Operand<const T> y, Operand<const T> previous,
                        Operand<T> residual, std::int64_t elements, std::int64_t columns,
                        double* partials) {
    using Vector = Pack<T, kVec>;
    // One axis of blocks: the others hold 65,535, fewer than a batch may.
    // 32 bits, because a 64-bit division is a call with a stack frame.
    const auto chunks =
        static_cast<unsigned>((elements + kCacheMetricChunk - 1) / kCacheMetricChunk);
    const std::int64_t b = blockIdx.x / chunks;
    const std::int64_t begin = blockIdx.x % chunks * kCacheMetricChunk;
    const std::int64_t end = min(elements, begin + kCacheMetricChunk);
    float change = 0, scale = 0;
    for (std::int64_t i = begin + threadIdx.x * kVec; i < end; i += kThreads * kVec) {
        const std::int64_t row = i / columns, col = i % columns;
        const Vector vx = *reinterpret_cast<const Vector*>(x.at(b, row, col));
        const Vector vy = *reinterpret_cast<const Vector*>(y.at(b, row, col));
        Vector vp{};
        if (previous.data != nullptr) {
            vp = *reinterpret_cast<const Vector*>(previous.at(b, row, col));
        }
        Vector vr;
#pragma unroll
        for (int k = 0; k < kVec; ++k) {
            const float base = load(vy.values[k]);
            const float r = load(vx.values[k]) - base;
            const float p = previous.data != nullptr ? load(vp.values[k]) : 0.0f;
            change += fabsf(r - p);
            scale += fabsf(previous.data != nullptr ? p : base);
            vr.values[k] = store<T>(r);
        }
        if (residual.data != nullptr) *reinterpret_cast<Vector*>(residual.at(b, row, col)) = vr;
    }

    __shared__ float shared[2][kThreads / 32];
    change = warp_sum(change);
    scale = warp_sum(scale);
    if (threadIdx.x % 32 == 0) {
        shared[0][threadIdx.x / 32] = change;
        shared[1][threadIdx.x / 32] = scale;
    }
    __syncthreads();
    if (threadIdx.x < 2) {
        double total = 0;
        for (int warp = 0; warp < kThreads / 32; ++warp) total += shared[threadIdx.x][warp];
        partials[blockIdx.x * std::int64_t{2} + threadIdx.x] = total;
    }
}

__global__ void cache_metric_finish_kernel(const double* partials, std::int64_t chunks,
                                           float* metric) {
    const std::int64_t row = blockIdx.x;
    double change = 0, scale = 0;
    for (std::int64_t i = threadIdx.x; i < chunks; i += 32) {
        change += partials[(row * chunks + i) * 2];
        scale += partials[(row * chunks + i) * 2 + 1];
    }
    for (int offset = 16; offset > 0; offset /= 2) {
        change += __shfl_xor_sync(0xffffffff, change, offset);
        scale += __shfl_xor_sync(0xffffffff, scale, offset);
    }
    if (threadIdx.x == 0) metric[row] = change == 0 ? 0.0f : static_cast<float>(change / scale);
}

template <typename T, int kVec>
void launch(const TensorView& x, const TensorView& y, const TensorView* previous,
            const TensorView* residual, double* partials, cudaStream_t stream) {
    const std::int64_t elements = x.size(1) * x.size(2);
    const std::int64_t chunks = (elements + kCacheMetricChunk - 1) / kCacheMetricChunk;
    const auto grid = static_cast<unsigned>(chunks * x.size(0));
    cache_metric_kernel<T, kVec><<<grid, kThreads, 0, stream>>>(
        Operand<const T>::from(&x), Operand<const T>::from(&y), Operand<const T>::from(previous),
        Operand<T>::from(residual), elements, x.size(2), partials);
    FEWSTEP_LAUNCH_CHECK("cache_metric");
}

}  // namespace

void cache_metric(const TensorView& x, const TensorView& y, const TensorView* previous,
                  const TensorView* residual, const TensorView& partials, const TensorView& metric,
                  std::uintptr_t stream_handle) {
    check_cache_metric(x, y, previous, residual, partials, metric);
    const cudaStream_t stream = as_stream(stream_handle);
    const std::int64_t rows = metric.size(0);
    if (rows == 0) return;
    if (x.numel() > 0) {
        dispatch_device_float(x.dtype, "x", [&](auto tag) {
            using T = decltype(tag);
            constexpr int kVec = 16 / sizeof(T);
            const auto fits = [](const TensorView* view) {
                return Operand<T>::from(view).template aligned<kVec>();
            };
            if (x.size(2) % kVec == 0 && fits(&x) && fits(&y) && fits(previous) && fits(residual)) {
                launch<T, kVec>(x, y, previous, residual, partials.ptr<double>(), stream);
            } else {
                launch<T, 1>(x, y, previous, residual, partials.ptr<double>(), stream);
            }
        });
    }
    cache_metric_finish_kernel<<<rows, 32, 0, stream>>>(
        partials.ptr<double>(), partials.numel() / 2 / rows, metric.ptr<float>());
    FEWSTEP_LAUNCH_CHECK("cache_metric_finish");
}

}  // namespace fewstep::cuda
