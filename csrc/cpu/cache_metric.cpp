// cache_metric on the CPU: memory-bound, one read of each input. Every chunk of kCacheMetricChunk
// elements is reduced in its accumulation type by one thread (cache_metric_body.h),
// then the chunks are added in order in float64.
#include "fewstep/ops/cache_metric.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "fewstep/cpu/isa.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

struct Sums {
    double change = 0;
    double scale = 0;
};

}  // namespace
}  // namespace fewstep::cpu

#define FEWSTEP_ISA_BODY "fewstep/cpu/cache_metric_body.h"
#include "fewstep/cpu/foreach_isa.h"

namespace fewstep::cpu {
namespace {

template <typename T>
using RunFunction = Sums (*)(const T*, const T*, const T*, T*, std::int64_t);

template <typename T>
RunFunction<T> choose_run() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return avx512::reduce_run<T>;
    if (isa() == Isa::kAvx2) return avx2::reduce_run<T>;
#endif
    return portable::reduce_run<T>;
}

template <typename T>
void reduce_chunks(const TensorView& x, const TensorView& y, const TensorView* previous,
                   const TensorView* residual, double* partials) {
    const RunFunction<T> run = choose_run<T>();
    const std::int64_t columns = x.size(2), elements = x.size(1) * columns;
    const std::int64_t chunks = (elements + kCacheMetricChunk - 1) / kCacheMetricChunk;
    const auto at = [](const TensorView* view, std::int64_t b, std::int64_t row, std::int64_t col) {
        return view == nullptr ? nullptr
                               : view->ptr<T>() + b * view->stride(0) + row * view->stride(1) + col;
    };
#pragma omp parallel for collapse(2) schedule(static)
    for (std::int64_t b = 0; b < x.size(0); ++b) {
        for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
            Sums sums;
            const std::int64_t end = std::min(elements, (chunk + 1) * kCacheMetricChunk);
            for (std::int64_t i = chunk * kCacheMetricChunk; i < end;) {
                const std::int64_t row = i / columns, col = i % columns;
                const std::int64_t n = std::min(columns - col, end - i);
                const Sums more = run(at(&x, b, row, col), at(&y, b, row, col),
                                      at(previous, b, row, col), at(residual, b, row, col), n);
                sums.change += more.change;
                sums.scale += more.scale;
                i += n;
            }
            partials[(b * chunks + chunk) * 2] = sums.change;
            partials[(b * chunks + chunk) * 2 + 1] = sums.scale;
        }
    }
}

template <typename Out>
void finish(const double* partials, std::int64_t rows, std::int64_t chunks, Out* metric) {
    for (std::int64_t row = 0; row < rows; ++row) {
        Sums sums;
        for (std::int64_t i = row * chunks; i < (row + 1) * chunks; ++i) {
            sums.change += partials[i * 2];
            sums.scale += partials[i * 2 + 1];
        }
        metric[row] = static_cast<Out>(sums.change == 0 ? 0 : sums.change / sums.scale);
    }
}

}  // namespace

void cache_metric(const TensorView& x, const TensorView& y, const TensorView* previous,
                  const TensorView* residual, const TensorView& partials,
                  const TensorView& metric) {
    check_cache_metric(x, y, previous, residual, partials, metric);
    double* sums = partials.ptr<double>();
    dispatch_float(x.dtype, "x",
                   [&](auto tag) { reduce_chunks<decltype(tag)>(x, y, previous, residual, sums); });
    const std::int64_t rows = metric.size(0);
    const std::int64_t chunks = rows == 0 ? 0 : partials.numel() / 2 / rows;
    if (metric.dtype == DType::kFloat64) {
        finish(sums, rows, chunks, metric.ptr<double>());
    } else {
        finish(sums, rows, chunks, metric.ptr<float>());
    }
}

}  // namespace fewstep::cpu
