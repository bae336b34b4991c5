// token_scatter on the GPU. Bytes: the map, a read of value and one write of the rows that take it,
// and a read of base where it is added or y is another tensor; the copy rate is the limit. A thread
// moves 16 bytes where all rows are aligned, else one value; in place those of rows that stay end
// with the map. Each token is written by the threads of its own, so nothing is atomic.
#include "fewstep/cuda/token_rows.cuh"
#include "fewstep/ops/token_scatter.h"

namespace fewstep::cuda {
namespace {

template <typename T>
struct Scatter {
    TokenRows<T> value, base, gate, y;
    TokenIndex position;
    std::int64_t batch, rows;
    unsigned tokens, columns;
    bool residual;
};

template <typename T, int kVec>
__global__ void __launch_bounds__(kTokenThreads) token_scatter_kernel(const Scatter<T> p) {
    using Values = Neighbours<T, kVec>;
    // 32 bits, because a 64-bit division is a call with a stack frame.
    const unsigned elements = p.tokens * p.columns;
    const unsigned chunks = (elements + kTokenThreads * kVec - 1) / (kTokenThreads * kVec);
    const std::int64_t b = blockIdx.x / chunks;
    const unsigned i = (blockIdx.x % chunks * kTokenThreads + threadIdx.x) * kVec;
    if (i >= elements) return;
    const unsigned n = i / p.columns, column = i % p.columns;
    const std::int64_t row = p.position.at(b * p.tokens + n);
    T* const to = p.y.at(b, n) + column;
    const T* const kept = p.base.data == nullptr ? to : p.base.at(b, n) + column;
    if (row < 0) {
        if (kept != to) Values::at(kept).put(to);
        return;
    }
    if (row >= p.rows) {
        Values::of(NAN).put(to);
        return;
    }
    Values y = Values::at(p.value.at(b, row) + column);
    if (p.gate.data != nullptr || p.residual) {
        Values gate = Values::of(1.0f), base = Values::of(0.0f);
        if (p.gate.data != nullptr) gate = Values::at(p.gate.at(b, 0) + column);
        if (p.residual) base = Values::at(kept);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
            const float gated = load(gate.values[j]) * load(y.values[j]);
            y.values[j] = store<T>(p.residual ? load(base.values[j]) + gated : gated);
        }
    }
    y.put(to);
}

template <typename T, int kVec>
void launch(const Scatter<T>& p, cudaStream_t stream) {
    const std::int64_t unit = std::int64_t{kTokenThreads} * kVec;
    const std::int64_t chunks = (std::int64_t{p.tokens} * p.columns + unit - 1) / unit;
    FEWSTEP_CHECK(chunks * p.batch < std::int64_t{1} << 31, "base: expected fewer tokens than ",
                  chunks * p.batch, " blocks take");
    launch_kernel(token_scatter_kernel<T, kVec>, "token_scatter",
                  dim3(static_cast<unsigned>(chunks * p.batch)), kTokenThreads, 0, stream, p);
}

}  // namespace

void token_scatter(const TensorView& value, const TensorView& position, const TensorView* base,
                   const TensorView* gate, const TensorView& y, bool residual,
                   std::uintptr_t stream) {
    check_token_scatter(value, position, base, gate, y);
    if (y.numel() == 0) return;
    const std::int64_t elements = y.size(1) * y.size(2);
    FEWSTEP_CHECK(elements < std::int64_t{1} << 31,
                  "base: expected samples of fewer than 2^31 values, got ", elements);
    dispatch_device_float(value.dtype, "value", [&](auto tag) {
        using T = decltype(tag);
        constexpr int kVec = 16 / sizeof(T);
        const Scatter<T> p{TokenRows<T>::of(&value),
                           TokenRows<T>::of(base),
                           TokenRows<T>::of(gate),
                           TokenRows<T>::of(&y),
                           TokenIndex::of(position),
                           y.size(0),
                           value.size(1),
                           static_cast<unsigned>(y.size(1)),
                           static_cast<unsigned>(y.size(2)),
                           residual};
        const bool vectors = y.size(2) % kVec == 0 && p.value.is_aligned() && p.base.is_aligned() &&
                             p.gate.is_aligned() && p.y.is_aligned();
        if (vectors) {
            launch<T, kVec>(p, as_stream(stream));
        } else {
            launch<T, 1>(p, as_stream(stream));
        }
    });
}

}  // namespace fewstep::cuda
