// gemm_w4a16 on the CPU: the tiles of cpu/w4a16_tile.h. A task takes all its rows through 64
// columns, so the weight comes from memory once.
#include "fewstep/ops/gemm_w4a16.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/epilogue.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/cpu/w4a16_tile.h"

namespace fewstep::cpu {
namespace {

using namespace w4a16;

struct Operands {
    Weight weight;
    const TensorView* low;
    const Epilogue& end;
    std::int64_t M, N;
};

template <typename T>
void multiply(const Operands& p, const TensorView& x, T* out) {
    constexpr std::int64_t kWorthThreads = 1 << 16;
    constexpr std::int64_t kBlock = 64;  // rows of a task
    const Weight& weight = p.weight;
    const Isa chosen = isa();
    const int threads = p.M * p.N * weight.K > kWorthThreads ? omp_get_max_threads() : 1;
    const std::int64_t rank = pad(weight.rank);
    const std::int64_t width = p.end.width(), runs = p.end.is_glu() ? 2 : 1;
    const std::int64_t panels = (width + kPanel - 1) / kPanel, blocks = (p.M + kBlock - 1) / kBlock;
    const ThreadScratch<float> rows(1, p.M * weight.K), low(1, p.M * rank);
    const ThreadScratch<float> scales(threads, runs * kPanel * weight.groups);
    const ThreadScratch<float> up(threads, runs * kPanel * rank);
    const epilogue::RoundFunction<T> round = epilogue::choose_round<T>();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) {
            widen_row(x.ptr<T>() + m * x.stride(0), weight.K, rows.of_thread(0) + m * weight.K);
            if (weight.rank == 0) continue;
            float* const low_row = low.of_thread(0) + m * rank;
            widen(*p.low, "low", m * weight.rank, weight.rank, low_row);
            std::fill(low_row + weight.rank, low_row + rank, 0.0f);
        }
        float* const panel_scales = scales.of_thread(omp_get_thread_num());
        float* const panel_up = up.of_thread(omp_get_thread_num());
        alignas(64) float y[2][kRows * kPanel];
        Tile tile = tile_of(weight);
        std::int64_t current = -1;  // the panel that this thread has widened
#pragma omp for schedule(dynamic)
        for (std::int64_t index = 0; index < panels * blocks; ++index) {
            const std::int64_t first = index / blocks * kPanel, begin = index % blocks * kBlock;
            const std::int64_t columns = std::min(kPanel, width - first);
            const std::int64_t end = std::min(p.M, begin + kBlock);
            Columns half[2];
            for (std::int64_t i = 0; i < runs; ++i) {
                float* const own_scales = panel_scales + i * kPanel * weight.groups;
                float* const own_up = panel_up + i * kPanel * rank;
                half[i] = {own_scales, own_up, first + i * width, columns};
                if (first != current) {
                    widen_panel(weight, half[i].n, columns, own_scales, own_up);
                }
            }
            current = first;
            for (std::int64_t m = begin; m < end; m += tile.rows) {
                tile.rows = static_cast<int>(std::min<std::int64_t>(kRows, end - m));
                tile.x = rows.of_thread(0) + m * weight.K;
                tile.low = low.of_thread(0) + m * rank;
                const TileFunction multiply_tile = choose_tile(chosen, tile.rows);
                for (std::int64_t i = 0; i < runs; ++i) {
                    multiply_columns(weight, half[i], tile, multiply_tile, y[i]);
                }
                p.end.finish(m, first, tile.rows, static_cast<int>(columns), y[0], y[1], round,
                             out + m * width + first);
            }
        }
    }
}

}  // namespace

void gemm_w4a16(const TensorView& x, const TensorView& w, const TensorView& w_scale,
                const TensorView* bias, const TensorView* low, const TensorView* up,
                const std::string& activation, const TensorView* gate, const TensorView* residual,
                const TensorView& out) {
    const std::int64_t M = out.size(0), N = w.size(0), K = x.size(1);
    expect_rows(x, "x", x.dtype, {M, K});
    expect_weight(w, w_scale, N, K);
    if (bias != nullptr) expect_contiguous(*bias, "bias", bias->dtype, {N});
    const std::int64_t rank = expect_branch(low, up, M, N);
    const Epilogue end(activation, gate, residual, M, N);
    expect_contiguous(out, "out", x.dtype, {M, end.width()});
    if (M == 0 || N == 0) return;
    std::vector<float> wide_bias(bias == nullptr ? 0 : static_cast<std::size_t>(N));
    if (bias != nullptr) widen(*bias, "bias", 0, N, wide_bias.data());
    const float* const floats = bias == nullptr ? nullptr : wide_bias.data();
    const Operands p{{w, w_scale, up, floats, K, w_scale.size(1), rank}, low, end, M, N};
    switch (x.dtype) {
        case DType::kFloat32: return multiply(p, x, out.ptr<float>());
        case DType::kBFloat16: return multiply(p, x, out.ptr<bfloat16>());
        case DType::kFloat16: return multiply(p, x, out.ptr<float16>());
        default:
            FEWSTEP_CHECK(false, "x: expected float32, bfloat16 or float16, got ", name(x.dtype));
    }
}

}  // namespace fewstep::cpu
