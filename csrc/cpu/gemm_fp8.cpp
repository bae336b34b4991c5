// gemm_fp8 on the CPU, which has no arithmetic in 8 bits: e4m3 becomes bfloat16, exactly, and is
// multiplied with bfloat16's dot products where there are any, else in float32 (bf16_tiles.h).
//
// First the rows: quantised if they are floating, and widened. Then the product, in the same
// parallel region: work is cut into (block of rows) x (panel of 64 columns); a task widens its
// panel of the weight in slices of K that stay in the second-level cache and walks its rows in
// tiles through each. An output's sum has one order, so neither threads nor scheduling change a
// bit.
#include "fewstep/ops/gemm_fp8.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/bf16_tiles.h"
#include "fewstep/cpu/e4m3_panel.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/quantize_row_fp8.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/cpu/vector_store.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

using bf16::kPanel;
using bf16::Tile;

static_assert(kPanel == LowRank::kPanel);

struct Finish {
    const float* acc;      // row r at acc + r * kPanel
    const float* a_scale;  // per row
    const float* w_scale;  // per column
    const float* bias;     // per column; may be null
    const float* low;      // row r at low + r * rank
    const float* up;       // [rank][kPanel]
    std::int64_t rank;
    std::int64_t ldo;  // distance of output rows
    int rows, columns;
    bool last;  // false while slices of K are to come: the sums stay in acc
};

template <typename Out>
[[gnu::always_inline]] inline void finish(const Finish& f, Out* out) {
    for (int r = 0; r < f.rows; ++r) {
        float values[kPanel];
        // fma is spelled out: without it a compiler may or may not contract, per instruction set.
        for (int n = 0; n < f.columns; ++n) {
            const float scaled = f.acc[r * kPanel + n] * f.a_scale[r];
            values[n] = f.bias == nullptr ? scaled * f.w_scale[n]
                                          : std::fma(scaled, f.w_scale[n], f.bias[n]);
        }
        for (std::int64_t i = 0; i < f.rank; ++i) {
            const float low = f.low[r * f.rank + i];
            const float* up = f.up + i * kPanel;
            for (int n = 0; n < f.columns; ++n) values[n] = std::fma(low, up[n], values[n]);
        }
        for (int n = 0; n < f.columns; ++n) out[r * f.ldo + n] = Convert<Out>::from(values[n]);
    }
}

// A tile from operands to outputs.
template <typename Out>
using TileFunction = void (*)(const Tile&, const Finish&, Out*);

template <typename Out>
void tile_portable(const Tile& t, const Finish& f, Out* out) {
    bf16::accumulate_portable(t);
    if (f.last) finish(f, out);
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const Tile& t, const Finish& f, Out* out) {
    bf16::accumulate_avx2<kRows>(t);
    if (f.last) finish(f, out);
}

// From the accumulators straight to the output, as in int8_finish.h.
template <bool kDots, int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, const Finish& f, Out* out) {
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        const char* row = reinterpret_cast<const char*>(out + r * f.ldo);
        for (std::size_t i = 0; i < 16 * kVectors * sizeof(Out); i += 64) {
            _mm_prefetch(row + i, _MM_HINT_ET0);
        }
    }
    __m512 acc[kRows][kVectors];
    if constexpr (kDots) {
        bf16::multiply_avx512_bf16<kRows, kVectors>(t, acc);
    } else {
        bf16::multiply_avx512<kRows, kVectors>(t, acc);
    }
    if (!f.last || f.columns < 16 * kVectors) {  // the latter in the last, ragged panel
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                _mm512_storeu_ps(t.acc + r * kPanel + 16 * v, acc[r][v]);
            }
        }
        if (f.last) finish(f, out);
        return;
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        // Without bias -0 is added, which changes no bit.
        const __m512 bias =
            f.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_loadu_ps(f.bias + 16 * v);
        const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512 row = _mm512_mul_ps(acc[r][v], _mm512_set1_ps(f.a_scale[r]));
            acc[r][v] = _mm512_fmadd_ps(row, w_scale, bias);
        }
    }
    const float* up = f.up;
    for (std::int64_t i = 0; i < f.rank; ++i, up += kPanel) {
        __m512 columns[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) columns[v] = _mm512_loadu_ps(up + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512 low = _mm512_set1_ps(f.low[r * f.rank + i]);
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                asm("vfmadd231ps %2, %1, %0" : "+v"(acc[r][v]) : "v"(columns[v]), "v"(low));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + r * f.ldo + 16 * v, acc[r][v]);
    }
}

template <bool kDots, int kRows, typename Out>
TileFunction<Out> choose_vectors(int vectors) {
    constexpr TileFunction<Out> table[] = {
        tile_avx512<kDots, kRows, 1, Out>, tile_avx512<kDots, kRows, 2, Out>,
        tile_avx512<kDots, kRows, 3, Out>, tile_avx512<kDots, kRows, 4, Out>};
    return table[vectors - 1];
}
#endif

// What a call runs on.
struct Machine {
    Isa isa = cpu::isa();
    bool dots = has_bf16_dots();
    e4m3::PanelFunction expand = e4m3::choose_panel(isa);

    int tile_rows() const { return dots ? 6 : 4; }
};

template <typename Out>
TileFunction<Out> choose_tile(const Machine& machine, int rows, int vectors) {
#if defined(__x86_64__)
    if (machine.dots) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<true, 1, Out>, choose_vectors<true, 2, Out>,
            choose_vectors<true, 3, Out>, choose_vectors<true, 4, Out>,
            choose_vectors<true, 5, Out>, choose_vectors<true, 6, Out>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx512) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<false, 1, Out>, choose_vectors<false, 2, Out>,
            choose_vectors<false, 3, Out>, choose_vectors<false, 4, Out>};
        return table[rows - 1](vectors);
    }
    if (machine.isa == Isa::kAvx2) {
        constexpr TileFunction<Out> table[] = {tile_avx2<1, Out>, tile_avx2<2, Out>,
                                               tile_avx2<3, Out>, tile_avx2<4, Out>};
        return table[rows - 1];
    }
#endif
    (void)machine, (void)rows, (void)vectors;
    return tile_portable<Out>;
}

struct Operands {
    const std::uint8_t* w;
    std::int64_t ldw;
    const float* w_scale;
    const float* bias;
    const std::uint32_t* a;  // [M][pairs]
    const float* a_scale;
    const LowRank* branch;
    std::int64_t M, N, K, pairs;
};

// What a task works on: rows [begin, end) of columns [n, n + columns).
struct Task {
    std::int64_t n, begin, end;
    int columns;
    const float* up;  // the branch's panel
};

// k in [first, last) of a task's product. acc has room for all its rows, or for one tile if that is
// all of K.
template <typename Out>
void multiply_slice(const Operands& p, const Task& task, const std::uint32_t* panel,
                    std::int64_t first, std::int64_t last, const Machine& machine, float* acc,
                    Out* out) {
    const bool whole = first == 0 && last == p.K;
    Tile tile;
    tile.lda = p.pairs;
    tile.pairs = (last - first + 1) / 2;
    tile.b = panel;
    tile.vectors = (task.columns + 15) / 16;
    tile.resume = first > 0;
    Finish f;
    f.w_scale = p.w_scale + task.n;
    f.bias = p.bias == nullptr ? nullptr : p.bias + task.n;
    f.up = task.up;
    f.rank = p.branch->rank();
    f.ldo = p.N;
    f.columns = task.columns;
    f.last = last == p.K;
    for (std::int64_t m = task.begin; m < task.end; m += machine.tile_rows()) {
        tile.a = p.a + m * p.pairs + first / 2;
        tile.rows = static_cast<int>(std::min<std::int64_t>(machine.tile_rows(), task.end - m));
        tile.acc = whole ? acc : acc + (m - task.begin) * kPanel;
        f.acc = tile.acc;
        f.a_scale = p.a_scale + m;
        f.low = p.branch->row(m);
        f.rows = tile.rows;
        choose_tile<Out>(machine, tile.rows, tile.vectors)(tile, f, out + m * p.N + task.n);
    }
}

// Calls prepare(m, bytes) for every row, with scratch for K bytes, then multiplies.
template <typename Out, typename Prepare>
void multiply(const Operands& p, const Prepare& prepare, Out* out) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    constexpr std::int64_t kBlock = 192, kMany = 960;  // rows of a task: whole tiles of any height
    constexpr std::int64_t kFew = 8;
    constexpr std::int64_t kSlice = 3072, kSliceOfFew = 128;  // 384 and 16 KiB of a panel
    const Machine machine;
    const int threads = p.M * p.N * p.K > kWorthThreads ? omp_get_max_threads() : 1;
    const std::int64_t panels = (p.N + kPanel - 1) / kPanel;
    // A panel meets as many rows as there are, where there are enough panels to go round.
    const std::int64_t rows = std::min(p.M, panels >= 8 * threads ? kMany : kBlock);
    const std::int64_t blocks = (p.M + rows - 1) / rows;
    const std::int64_t slice =
        std::max<std::int64_t>(std::min(p.K, p.M <= kFew ? kSliceOfFew : kSlice), 1);
    const std::int64_t sums = (slice < p.K ? rows : bf16::kMaxRows) * kPanel;
    const ThreadScratch<std::uint8_t> byte_scratch(threads, p.K);
    const ThreadScratch<std::uint32_t> panel_scratch(threads, (slice + 1) / 2 * kPanel);
    const ThreadScratch<float> acc_scratch(threads, sums);
    const ThreadScratch<float> up_scratch(threads, p.branch->rank() * kPanel);
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) {
            prepare(m, byte_scratch.of_thread(thread));
            p.branch->prepare_row(m);
        }
        std::uint32_t* const words = panel_scratch.of_thread(thread);
        float* const up = up_scratch.of_thread(thread);
        std::int64_t current = -1;  // the panel of `up` that this thread has at hand
        Task task{};
        task.up = up;
#pragma omp for schedule(dynamic)
        for (std::int64_t index = 0; index < panels * blocks; ++index) {
            task.begin = index % blocks * rows;
            task.end = std::min(p.M, task.begin + rows);
            task.n = index / blocks * kPanel;
            task.columns = static_cast<int>(std::min<std::int64_t>(kPanel, p.N - task.n));
            const bool fresh = task.n != current;
            if (fresh) p.branch->panel(task.n, task.columns, up);
            std::int64_t first = 0;
            do {  // once for K = 0
                const std::int64_t last = std::min(p.K, first + slice);
                if (fresh || slice < p.K) {
                    const std::uint8_t* const w = p.w + task.n * p.ldw + first;
                    machine.expand({w, p.ldw, task.columns, last - first}, words);
                }
                multiply_slice(p, task, words, first, last, machine, acc_scratch.of_thread(thread),
                               out);
                first = last;
            } while (first < p.K);
            current = task.n;
        }
    }
}

template <typename Prepare>
void multiply_into(const Operands& p, const Prepare& prepare, const TensorView& out) {
    switch (out.dtype) {
        case DType::kFloat32: return multiply(p, prepare, out.ptr<float>());
        case DType::kBFloat16: return multiply(p, prepare, out.ptr<bfloat16>());
        case DType::kFloat16: return multiply(p, prepare, out.ptr<float16>());
        default:
            FEWSTEP_CHECK(false, "out: expected float32, bfloat16 or float16, got ",
                          name(out.dtype));
    }
}

#if defined(__x86_64__)
template <typename T>
FEWSTEP_TARGET_AVX512 float quantize_avx512(const T* x, std::uint8_t* q, std::int64_t n) {
    return quantize::quantize_block_fp8(x, q, n);
}
template <typename T>
FEWSTEP_TARGET_AVX2 float quantize_avx2(const T* x, std::uint8_t* q, std::int64_t n) {
    return quantize::quantize_block_fp8(x, q, n);
}
#endif
template <typename T>
float quantize_portable(const T* x, std::uint8_t* q, std::int64_t n) {
    return quantize::quantize_block_fp8(x, q, n);
}

template <typename T>
auto choose_quantize(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return quantize_avx512<T>;
    if (isa == Isa::kAvx2) return quantize_avx2<T>;
#endif
    (void)isa;
    return quantize_portable<T>;
}

template <typename T>
void multiply_floats(Operands& p, const TensorView& a, const TensorView* smooth,
                     std::int64_t rotate, std::uint32_t* words, const TensorView& out) {
    const std::unique_ptr<float[]> scales(new float[static_cast<std::size_t>(p.M)]);
    p.a_scale = scales.get();
    const prologue::Prologue<T> prepare(smooth, rotate, p.K);
    const ThreadScratch<float> prepared(omp_get_max_threads(), prepare.active() ? p.K : 0);
    const auto plain = choose_quantize<T>(isa());
    const auto quantize = choose_quantize<float>(isa());
    const auto widen = e4m3::choose_row(isa());
    multiply_into(
        p,
        [&](std::int64_t m, std::uint8_t* q) {
            const T* const row = a.ptr<T>() + m * a.stride(0);
            if (prepare.active()) {
                float* const values = prepared.of_thread(omp_get_thread_num());
                prepare.apply(row, values);
                scales[m] = quantize(values, q, p.K);
            } else {
                scales[m] = plain(row, q, p.K);
            }
            widen(q, p.K, words + m * p.pairs);
        },
        out);
}

}  // namespace

void gemm_fp8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
              const TensorView& w_scale, const TensorView* bias, const TensorView* low,
              const TensorView* up, const TensorView* smooth, std::int64_t rotate,
              const TensorView& out) {
    Operands p{};
    p.M = out.size(0);
    p.N = out.size(1);
    p.K = a.size(1);
    p.pairs = (p.K + 1) / 2;
    FEWSTEP_CHECK((a.dtype == DType::kUInt8) == (a_scale != nullptr),
                  "a_scale: expected one with uint8 a and none with floating a, got ",
                  a_scale == nullptr ? "none" : "one", " with ", name(a.dtype));
    FEWSTEP_CHECK(a_scale == nullptr || (smooth == nullptr && rotate == 0),
                  "smooth, rotate: expected none with uint8 a, got one");
    expect_rows(a, "a", a.dtype, {p.M, p.K});
    if (a_scale != nullptr) expect_contiguous(*a_scale, "a_scale", DType::kFloat32, {p.M});
    expect_rows(w, "w", DType::kUInt8, {p.N, p.K});
    expect_contiguous(w_scale, "w_scale", DType::kFloat32, {p.N});
    if (bias != nullptr) expect_contiguous(*bias, "bias", bias->dtype, {p.N});
    expect_contiguous(out, "out", out.dtype, {p.M, p.N});
    const LowRank branch(low, up, p.M, p.N);
    p.branch = &branch;
    if (p.M == 0 || p.N == 0) return;
    p.w = w.ptr<std::uint8_t>();
    p.ldw = w.stride(0);
    p.w_scale = w_scale.ptr<float>();
    std::vector<float> wide_bias(bias == nullptr ? 0 : static_cast<std::size_t>(p.N));
    if (bias != nullptr) widen(*bias, "bias", 0, p.N, wide_bias.data());
    p.bias = bias == nullptr ? nullptr : wide_bias.data();
    // Not initialised: every element is written before it is read.
    const std::unique_ptr<std::uint32_t[]> words(
        new std::uint32_t[static_cast<std::size_t>(p.M * p.pairs)]);
    p.a = words.get();
    switch (a.dtype) {
        case DType::kUInt8: {
            p.a_scale = a_scale->ptr<float>();
            const auto widen = e4m3::choose_row(isa());
            const auto prepare = [&](std::int64_t m, std::uint8_t*) {
                widen(a.ptr<std::uint8_t>() + m * a.stride(0), p.K, words.get() + m * p.pairs);
            };
            return multiply_into(p, prepare, out);
        }
        case DType::kFloat32: return multiply_floats<float>(p, a, smooth, rotate, words.get(), out);
        case DType::kBFloat16:
            return multiply_floats<bfloat16>(p, a, smooth, rotate, words.get(), out);
        case DType::kFloat16:
            return multiply_floats<float16>(p, a, smooth, rotate, words.get(), out);
        default:
            FEWSTEP_CHECK(false, "a: expected uint8, float32, bfloat16 or float16, got ",
                          name(a.dtype));
    }
}

}  // namespace fewstep::cpu
