// gemv_w4a16_grouped on the CPU: one parallel region over the panels of 64 columns of all problems,
// with the tiles of cpu/w4a16_tile.h, so the bits are gemm_w4a16's. One layer of 9216 columns is
// 144 panels; where a model's layers go one by one, each begins and ends with threads that wait.
#include "fewstep/ops/gemv_w4a16_grouped.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "fewstep/cpu/epilogue.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/cpu/w4a16_tile.h"

namespace fewstep::cpu {
namespace {

using namespace w4a16;

// Columns [first, first + columns) of problem `index`; its outputs begin at out + `offset`.
struct Panel {
    std::size_t index;
    std::int64_t first, columns, offset;
};

std::vector<Panel> panels_of(const Views& w, std::int64_t M) {
    std::vector<Panel> panels;
    std::int64_t offset = 0;
    for (std::size_t g = 0; g < w.size(); ++g) {
        const std::int64_t N = w[g].size(0);
        for (std::int64_t n = 0; n < N; n += kPanel) {
            panels.push_back({g, n, std::min(kPanel, N - n), offset});
        }
        offset += M * N;
    }
    return panels;
}

template <typename T>
void multiply(const TensorView& x, const Views& w, const Views& w_scale, const Views& bias,
              std::int64_t total, T* out) {
    constexpr std::int64_t kWorthThreads = 1 << 16;
    const std::int64_t M = x.size(1), K = x.size(2), groups = w_scale[0].size(1);
    const std::int64_t inputs = x.size(0) * M;
    const std::vector<Panel> panels = panels_of(w, M);
    const Isa chosen = isa();
    const int threads = M * total * K > kWorthThreads ? omp_get_max_threads() : 1;
    const ThreadScratch<float> rows(1, inputs * K), scales(threads, kPanel * groups);
    const epilogue::RoundFunction<T> round = epilogue::choose_round<T>();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t i = 0; i < inputs; ++i) {
            const std::int64_t offset = i / M * x.stride(0) + i % M * x.stride(1);
            widen_row(x.ptr<T>() + offset, K, rows.of_thread(0) + i * K);
        }
        float* const panel_scales = scales.of_thread(omp_get_thread_num());
        alignas(64) float y[kRows * kPanel], panel_bias[kPanel];
#pragma omp for schedule(dynamic)
        for (std::size_t i = 0; i < panels.size(); ++i) {
            const auto [g, first, columns, offset] = panels[i];
            const bool biased = bias[g].numel() > 0;
            const Weight weight{w[g], w_scale[g], nullptr, nullptr, K, groups, 0};
            widen_panel(weight, first, columns, panel_scales, nullptr);
            if (biased) widen(bias[g], "bias", first, columns, panel_bias);
            Tile tile = tile_of(weight);
            const std::int64_t N = w[g].size(0), input = x.size(0) == 1 ? 0 : M * K;
            for (std::int64_t m = 0; m < M; m += tile.rows) {
                tile.rows = static_cast<int>(std::min<std::int64_t>(kRows, M - m));
                tile.x = rows.of_thread(0) + static_cast<std::int64_t>(g) * input + m * K;
                multiply_columns(weight, {panel_scales, nullptr, first, columns}, tile,
                                 choose_tile(chosen, tile.rows), y);
                for (int r = 0; r < tile.rows; ++r) {
                    float* const row = y + r * kPanel;
                    for (std::int64_t c = 0; biased && c < columns; ++c) row[c] += panel_bias[c];
                    round(row, static_cast<int>(columns), out + offset + (m + r) * N + first);
                }
            }
        }
    }
}

}  // namespace

void gemv_w4a16_grouped(const TensorView& x, const Views& w, const Views& w_scale,
                        const Views& bias, const TensorView& out) {
    const std::int64_t total = check_gemv_w4a16_grouped(x, w, w_scale, bias, out);
    if (out.numel() == 0) return;
    switch (x.dtype) {
        case DType::kFloat32: return multiply(x, w, w_scale, bias, total, out.ptr<float>());
        case DType::kBFloat16: return multiply(x, w, w_scale, bias, total, out.ptr<bfloat16>());
        case DType::kFloat16: return multiply(x, w, w_scale, bias, total, out.ptr<float16>());
        default:
            FEWSTEP_CHECK(false, "x: expected float32, bfloat16 or float16, got ", name(x.dtype));
    }
}

}  // namespace fewstep::cpu
