// forecast_apply on the GPU. Bytes: one read of each snapshot and of base, one write of y; 2 FLOP a
// value and the decoding of codes, so the copy rate is the limit.
//
// A thread takes 8 neighbours where all rows are aligned and groups are of multiples of 8, else one
// (two of int4). It asks for four snapshots at a time before it uses the first. Weights and the
// step are read where they lie: a captured graph serves whatever they become.
#include "fewstep/cuda/slot.cuh"
#include "fewstep/ops/forecast_apply.h"

namespace fewstep::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kAhead = 4;  // snapshots asked for at a time

struct Arguments {
    const void* ring;
    const float* scale;
    const float* weights;
    const std::int64_t* step;
    std::int64_t table, stride_w;
    FloatRows base;
    void* y;
    DType dtype;
    std::int64_t batch;
    unsigned elements, columns, groups, group;
    int slots;
};

template <typename S, int kVec>
__global__ void __launch_bounds__(kThreads) forecast_apply_kernel(const Arguments p) {
    using Codes = Pack<S, kVec>;
    // 32 bits, because a 64-bit division is a call with a stack frame.
    const unsigned chunks = (p.elements + kThreads * kVec - 1) / (kThreads * kVec);
    const unsigned b = blockIdx.x / chunks;
    const unsigned i = (blockIdx.x % chunks * kThreads + threadIdx.x) * kVec;
    if (i >= p.elements) return;
    const unsigned row = i / p.columns, col = i % p.columns;
    const unsigned rows = p.elements / p.columns;

    const std::int64_t at_step = p.step == nullptr ? 0 : *p.step;
    const bool known = p.step == nullptr || (at_step >= 0 && at_step < p.table);
    const float* const weights = p.weights + (p.step == nullptr ? b * p.stride_w
                                              : known           ? at_step * p.slots
                                                                : 0);

    const std::int64_t slot = p.batch * p.elements;
    const S* const ring = static_cast<const S*>(p.ring);
    float sum[kVec] = {};
    for (int first = 0; first < p.slots; first += kAhead) {
        Codes codes[kAhead];
        float factor[kAhead];
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
            const int k = first + j;
            float w = k < p.slots ? weights[k] : 0.0f;
            if (k < p.slots && !known) w = __int_as_float(0x7fffffff);
            codes[j] = {};
            if (w != 0.0f) {
                const std::int64_t at = k * slot + b * std::int64_t{p.elements} + i;
                codes[j] = *reinterpret_cast<const Codes*>(ring + at / kPerUnit<S>);
                if (p.scale != nullptr) {
                    const std::int64_t line = (k * p.batch + b) * rows + row;
                    w *= p.scale[line * p.groups + col / p.group];
                }
            }
            factor[j] = w;
        }
#pragma unroll
        for (int j = 0; j < kAhead; ++j) {
#pragma unroll
            for (int v = 0; v < kVec; ++v) sum[v] += factor[j] * codes[j].get(v);
        }
    }
    if (p.base.data != nullptr) {
        float base[kVec];
        read(p.base, p.base.at(b, row, col), base);
#pragma unroll
        for (int v = 0; v < kVec; ++v) sum[v] += base[v];
    }
    write(p.y, p.dtype, b * std::int64_t{p.elements} + i, sum);
}

template <typename S, int kVec>
void launch(const Arguments& p, cudaStream_t stream) {
    const std::int64_t chunks = (p.elements + kThreads * kVec - 1) / (kThreads * kVec);
    const auto grid = static_cast<unsigned>(chunks * p.batch);
    forecast_apply_kernel<S, kVec><<<grid, kThreads, 0, stream>>>(p);
    FEWSTEP_LAUNCH_CHECK("forecast_apply");
}

}  // namespace

void forecast_apply(const TensorView& snapshots, const TensorView& weights, const TensorView* base,
                    const TensorView* scale, const TensorView* step, std::int64_t group,
                    const TensorView& y, std::uintptr_t stream) {
    check_forecast_apply(snapshots, weights, base, scale, step, group, y);
    expect_device_float(y, "y");
    if (base != nullptr) expect_device_float(*base, "base");
    if (y.numel() == 0) return;
    const SampleShape shape(y.size(1), y.size(2), group, scale != nullptr, is_dense(base));
    FEWSTEP_CHECK(shape.elements() < std::int64_t{1} << 31,
                  "snapshots: expected samples of fewer than 2^31 values, got ", shape.elements());
    const Arguments p{
        snapshots.ptr<void>(),
        scale == nullptr ? nullptr : scale->ptr<float>(),
        weights.ptr<float>(),
        step == nullptr ? nullptr : step->ptr<std::int64_t>(),
        weights.size(0),
        weights.ndim == 2 ? weights.size(1) : 0,
        FloatRows::from(base),
        y.ptr<void>(),
        y.dtype,
        y.size(0),
        static_cast<unsigned>(shape.elements()),
        static_cast<unsigned>(shape.columns),
        static_cast<unsigned>(shape.groups),
        static_cast<unsigned>(group),
        static_cast<int>(snapshots.size(0)),
    };
    constexpr int kVec = 8;
    const bool vectors = shape.columns % kVec == 0 && (scale == nullptr || group % kVec == 0) &&
                         snapshots.data % 16 == 0 && y.data % 16 == 0 && p.base.aligned<kVec>();
    dispatch_slot(snapshots, y.size(2), [&](auto tag) {
        using S = decltype(tag);
        if (vectors) {
            launch<S, kVec>(p, as_stream(stream));
        } else {
            launch<S, kPerUnit<S>>(p, as_stream(stream));
        }
    });
}

}  // namespace fewstep::cuda
