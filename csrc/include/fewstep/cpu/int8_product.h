// Products of int8 rows and a weight that a task sees as a panel of bytes: gemm_w8a8 and gemm_w4a8.
//
//   y_mn = fma(float(sum_k a_mk w_nk) a_scale_m, w_scale_n, bias_n) + sum_r low_mr up_nr
//   out  = y, or what epilogue.h makes of it, rounded; or int8 rows of that, each with a scale
//
// First the rows: quantised if they are floating, and summed for the offset of the weights. Then
// the product, in the same parallel region. A task is a block of rows by 64 columns: it arranges
// their weights to a panel, 64 K bytes that stay in the second-level cache, and walks its rows in
// tiles, asking for the next panel's weights meanwhile. Few rows are multiplied with the weight's
// own, in dots, since arranging would take longer. Sums are exact and what follows them has one
// order, so neither the way, nor threads, nor scheduling change a bit.
//
// Without an epilogue a tile goes from its registers to the output. With one it goes, as float32,
// to scratch in the first-level cache, and from there row by row; a gated activation (geglu,
// swiglu) multiplies each tile with two panels, half the weight apart. Rows that are to be int8 are
// quantised when all of out is there.
//
// What differs between the ops is the weight, a Source:
//   scratch()                             bytes that it is lent, a multiple of cache lines
//   panel(n, columns, scratch)            columns [n, n + columns) as int8_tiles.h reads them
//   kSigned                               whether rows() are w, or else w + 128
//   length()                              bytes of a row as rows() returns it
//   kReorders                             whether rows() have another order of k than a
//   reorder(a, to)                        a row of a in that order
//   rows(n, columns, scratch, pointers)   the rows themselves, at most kDots; a pointer to one
//                                         that is missing repeats the last
//   scales(n, columns, floats)            a scale per column; kPanel floats are lent
//   row(n), row_bytes()                   where row n lies, and its length
#pragma once

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/epilogue.h"
#include "fewstep/cpu/int8_dots.h"
#include "fewstep/cpu/int8_finish.h"
#include "fewstep/cpu/int8_tiles.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/large_pages.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/product_call.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/dispatch.h"
#include "fewstep/ops/gemm_w8a8.h"

namespace fewstep::cpu::int8 {

static_assert(kPanel == LowRank::kPanel && kPanel == epilogue::kPanel);

inline std::int32_t sum_portable(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX2 inline std::int32_t sum_avx2(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

FEWSTEP_TARGET_AVX512 inline std::int32_t sum_avx512(const std::int8_t* a, std::int64_t n) {
    const __m512i ones = _mm512_set1_epi8(1);
    __m512i sums = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < n; i += 64) {
        const __mmask64 mask = n - i >= 64 ? ~0ull : (1ull << (n - i)) - 1;
        sums = _mm512_dpbusd_epi32(sums, ones, _mm512_maskz_loadu_epi8(mask, a + i));
    }
    return _mm512_reduce_add_epi32(sums);
}
#endif

using SumFunction = std::int32_t (*)(const std::int8_t*, std::int64_t);

inline SumFunction choose_sum(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return sum_avx512;
    if (isa == Isa::kAvx2) return sum_avx2;
#endif
    (void)isa;
    return sum_portable;
}

// 128 sum_k a_mk modulo 2^32: what w + 128 in the place of w adds to a sum.
inline std::int32_t offset_of(SumFunction sum, const std::int8_t* row, std::int64_t n) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(sum(row, n)) * 128u);
}

struct Operands {
    const std::int8_t* a;
    std::int64_t lda;
    const float* a_scale;
    const float* bias;
    const std::int32_t* offsets;
    const LowRank* branch;
    const Epilogue* end;
    std::int64_t M, N, K;
    bool rounds_bf16;
};

// Columns [n, n + columns) of the weight that a thread has at hand, and its memory.
struct Columns {
    std::int64_t n = 0;
    int columns = 0;
    const float* scale = nullptr;  // per column
    const std::uint8_t* panel = nullptr;
    std::uint8_t* scratch = nullptr;
    float* up = nullptr;  // the branch's panel
    alignas(64) float scales[kPanel];
};

template <typename Source>
void prepare_columns(const Operands& p, const Source& source, std::int64_t n, int columns, bool few,
                     Columns& at) {
    at.n = n;
    at.columns = columns;
    at.scale = source.scales(n, columns, at.scales);
    p.branch->panel(n, columns, at.up);
    if (!few) at.panel = source.panel(n, columns, at.scratch);
}

// What `rows` rows from m on take from their operands.
inline Finish finish_of(const Operands& p, const Columns& at, std::int64_t m, int rows,
                        const std::int32_t* acc, std::int64_t ldo) {
    Finish f;
    f.acc = acc;
    f.offsets = p.offsets + m;
    f.a_scale = p.a_scale + m;
    f.w_scale = at.scale;
    f.bias = p.bias == nullptr ? nullptr : p.bias + at.n;
    f.low = p.branch->row(m);
    f.up = at.up;
    f.rank = p.branch->rank();
    f.ldo = ldo;
    f.rows = rows;
    f.columns = at.columns;
    f.rounds_bf16 = p.rounds_bf16;
    return f;
}

// Rows [m, m + rows), a tile, by a panel.
template <typename Out>
void multiply_tile(const Operands& p, const Columns& at, std::int64_t m, int rows, Isa isa,
                   Out* out, std::int64_t ldo) {
    alignas(64) std::int32_t acc[kMaxRows * kPanel];
    Tile tile;
    tile.a = p.a + m * p.lda;
    tile.lda = p.lda;
    tile.b = at.panel;
    tile.groups = p.K / 4;
    tile.tail = static_cast<int>(p.K % 4);
    tile.rows = rows;
    tile.vectors = (at.columns + 15) / 16;
    tile.acc = acc;
    choose_tile<Out>(isa, rows, tile.vectors)(tile, finish_of(p, at, m, rows, acc, ldo), out);
}

constexpr std::int64_t kFewRows = 64;

// All rows, at most kFewRows, by the weight's own, four of them after the other. `a` are the rows
// in the order of those.
template <typename Out, typename Source>
void multiply_rows(const Operands& p, const Source& source, const std::int8_t* a, std::int64_t lda,
                   const Columns& at, Isa isa, Out* out, std::int64_t ldo) {
    alignas(64) std::int32_t acc[kFewRows * kPanel];
    const std::int64_t tiles = (p.M + kDots - 1) / kDots;
    Dots d;
    d.lda = lda;
    d.K = source.length();
    d.ld = kPanel;
    // In turn the tiles ask for the weight's bytes eight rows ahead, in their order.
    d.lines = static_cast<int>(std::max<std::int64_t>(1, kDots * source.row_bytes() / p.K / tiles));
    for (int c = 0; c < at.columns; c += kDots) {
        source.rows(at.n + c, std::min(kDots, at.columns - c), at.scratch, d.b);
        for (std::int64_t m = 0; m < p.M; m += kDots) {
            d.a = a + m * lda;
            d.rows = static_cast<int>(std::min<std::int64_t>(kDots, p.M - m));
            d.acc = acc + m * kPanel + c;
            d.coming = source.row(at.n + c + 2 * kDots) + m / kDots * d.lines * p.K;
            choose_dots<Source::kSigned>(isa, d.rows)(d);
        }
    }
    tile::choose_finish<std::int32_t, Out>(isa)(
        finish_of(p, at, 0, static_cast<int>(p.M), acc, ldo), out);
}

// Asks the second-level cache for bytes.
inline void fetch(const std::uint8_t* first, std::int64_t bytes) {
    for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(first + i, 0, 2);
}

// Rows [begin, end) of a panel.
struct Task {
    std::int64_t panel, begin, end;
};

// All rows of all panels, cut so that threads end together: what is left is halved and shared out,
// down to pieces that still repay arranging their panel.
inline std::vector<Task> cut(std::int64_t panels, std::int64_t M, int threads) {
    constexpr std::int64_t kBlock = 192;  // rows, a multiple of a tile's
    std::vector<Task> tasks;
    for (std::int64_t panel = 0; panel < panels; ++panel) {
        for (std::int64_t begin = 0; begin < M;) {
            const std::int64_t left = (panels - panel) * M - begin;
            const std::int64_t share = left / (2 * threads) / kBlock * kBlock;
            std::int64_t end = threads == 1 ? M : begin + std::max(kBlock, share);
            if (M - end < kBlock / 2) end = M;
            tasks.push_back({panel, begin, end});
            begin = end;
        }
    }
    return tasks;
}

// Calls prepare(m) for every row, then multiplies, then quantises rows of out if asked to.
template <typename Out, typename Source, typename Prepare>
void multiply(const Operands& p, const Source& source, const Prepare& prepare, Out* out,
              const product::Quantized<Out>& quantized) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    const Isa chosen = isa();
    const int threads = p.M * p.N * p.K > kWorthThreads ? omp_get_max_threads() : 1;
    const std::int64_t width = p.end->width(), panels = (width + kPanel - 1) / kPanel;
    const bool few = p.M <= kFewRows && p.K > 0, plain = p.end->is_plain();
    const std::vector<Task> tasks = cut(panels, p.M, few ? 1 : threads);
    const int step = few ? static_cast<int>(p.M) : tile_rows(chosen);
    const int halves = p.end->is_glu() ? 2 : 1;
    const std::int64_t depth = source.scratch();
    const ThreadScratch<std::uint8_t> byte_scratch(threads, halves * depth);
    const ThreadScratch<float> up_scratch(threads, halves * p.branch->rank() * kPanel);
    const ThreadScratch<float> y_scratch(threads, plain ? 0 : halves * step * kPanel);
    const bool reorders = few && Source::kReorders;
    const std::int64_t lda = reorders ? source.length() : p.lda;
    const ThreadScratch<std::int8_t> reordered(1, reorders ? p.M * lda : 0);
    const std::int8_t* const a = reorders ? reordered.of_thread(0) : p.a;
    const epilogue::RoundFunction<Out> round = epilogue::choose_round<Out>();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) {
            prepare(m);
            if constexpr (Source::kReorders) {
                if (few) source.reorder(p.a + m * p.lda, reordered.of_thread(0) + m * lda);
            }
            p.branch->prepare_row(m);
        }
        const int thread = omp_get_thread_num();
        Columns at[2];
        float* y[2];
        for (int i = 0; i < halves; ++i) {
            at[i].scratch = byte_scratch.of_thread(thread) + i * depth;
            at[i].up = up_scratch.of_thread(thread) + i * p.branch->rank() * kPanel;
            y[i] = y_scratch.of_thread(thread) + i * step * kPanel;
        }
        const auto multiply_step = [&](int half, std::int64_t m, int count, auto* to,
                                       std::int64_t ldo) {
            if (few) {
                multiply_rows(p, source, a, lda, at[half], chosen, to, ldo);
            } else {
                multiply_tile(p, at[half], m, count, chosen, to, ldo);
            }
        };
        std::int64_t current = -1;  // the panel that this thread has at hand
#pragma omp for schedule(dynamic)
        for (std::size_t index = 0; index < tasks.size(); ++index) {
            const auto [panel, begin, end] = tasks[index];
            const std::int64_t n = panel * kPanel;
            const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, width - n));
            if (panel != current) {
                for (int i = 0; i < halves; ++i) {
                    prepare_columns(p, source, n + i * width, columns, few, at[i]);
                }
                current = panel;
            }
            // Arranging the next panel would wait for memory: its rows are asked for in between.
            // With several threads it is a guess, which panel that will be.
            const std::int64_t next = std::min(n + threads * kPanel, width);
            const std::int64_t coming = few ? 0 : std::min<std::int64_t>(kPanel, width - next);
            std::int64_t fetched = 0;
            for (std::int64_t m = begin; m < end; m += step) {
                const int count = static_cast<int>(std::min<std::int64_t>(step, end - m));
                if (plain) {
                    multiply_step(0, m, count, out + m * width + n, width);
                } else {
                    for (int r = 0; r < count; ++r) {
                        p.end->prefetch(m + r, n, columns, out + (m + r) * width + n);
                    }
                    for (int i = 0; i < halves; ++i) multiply_step(i, m, count, y[i], kPanel);
                    p.end->finish(m, n, count, columns, y[0], y[halves - 1], round,
                                  out + m * width + n);
                }
                const std::int64_t until = coming * (m + count - begin) / (end - begin);
                for (int i = 0; i < halves; ++i) {
                    for (std::int64_t row = fetched; row < until; ++row) {
                        fetch(source.row(next + row + i * width), source.row_bytes());
                    }
                }
                fetched = until;
            }
        }
        product::quantize_rows(out, quantized, p.M, width);
    }
}

// What the product needs of each row beside its integers; of floating rows, those too.
struct RowState {
    std::unique_ptr<std::int8_t[]> quantized;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<std::int32_t[]> offsets;
};

template <typename Source, typename Prepare>
void multiply_into(const Operands& p, const Source& source, const Prepare& prepare,
                   const product::Destination& to) {
    product::run_into(to, p.M, p.end->width(), [&](auto* out, const auto& quantized) {
        multiply(p, source, prepare, out, quantized);
    });
}

// Where a row of `a` is integers already.
template <typename Source>
void multiply_integers(Operands& p, const Source& source, const TensorView& a,
                       const TensorView& a_scale, RowState& state, const product::Destination& to) {
    p.a = a.ptr<std::int8_t>();
    p.lda = a.stride(0);
    p.a_scale = a_scale.ptr<float>();
    const SumFunction sum = choose_sum(isa());
    multiply_into(
        p, source, [&](std::int64_t m) { state.offsets[m] = offset_of(sum, p.a + m * p.lda, p.K); },
        to);
}

template <typename T, typename Source>
void multiply_floats(Operands& p, const Source& source, const TensorView& a,
                     const TensorView* smooth, std::int64_t rotate, RowState& state,
                     const product::Destination& to) {
    // Not initialised: every element is written before it is read.
    state.quantized.reset(new std::int8_t[static_cast<std::size_t>(p.M * p.K)]);
    advise_large_pages(state.quantized.get(), p.M * p.K);
    state.scales.reset(new float[static_cast<std::size_t>(p.M)]);
    p.a = state.quantized.get();
    p.lda = p.K;
    p.a_scale = state.scales.get();
    const SumFunction sum = choose_sum(isa());
    const prologue::Prologue<T> prepare(smooth, rotate, p.K);
    const quantize::RowFunction<T> plain = quantize::choose_row<T>();
    const quantize::RowFunction<float> prepared = quantize::choose_row<float>();
    const ThreadScratch<float> scratch(omp_get_max_threads(), prepare.active() ? p.K : 0);
    const T* rows = a.ptr<T>();
    const std::int64_t stride = a.stride(0);
    multiply_into(
        p, source,
        [&](std::int64_t m) {
            std::int8_t* const q = state.quantized.get() + m * p.K;
            if (prepare.active()) {
                float* const row = scratch.of_thread(omp_get_thread_num());
                prepare.apply(rows + m * stride, row);
                state.scales[m] = prepared(row, q, p.K);
            } else {
                state.scales[m] = plain(rows + m * stride, q, p.K);
            }
            state.offsets[m] = offset_of(sum, q, p.K);
        },
        to);
}

// The whole op, from checked views of the weight (in `source`, with N columns) and unchecked ones
// of the rest.
template <typename Source>
void multiply(const Source& source, std::int64_t N, const ProductArguments& given) {
    const TensorView& a = given.a;
    Operands p;
    p.M = given.out.size(0);
    p.N = N;
    p.K = a.size(1);
    p.rounds_bf16 = has_bf16_dots();
    FEWSTEP_CHECK(p.K < kGemmW8A8MaxK, "a: expected K < ", kGemmW8A8MaxK, ", got ", p.K);
    const Epilogue end(given.activation, given.gate, given.residual, p.M, p.N);
    p.end = &end;
    const product::Destination to =
        product::expect_arguments(given, DType::kInt8, p.N, end.width());
    if (given.a_scale != nullptr) {
        expect_contiguous(*given.a_scale, "a_scale", DType::kFloat32, {p.M});
    }
    const LowRank branch(given.low, given.up, p.M, p.N);
    p.branch = &branch;
    if (p.M == 0 || p.N == 0) return;
    const std::vector<float> bias = product::widen_bias(given.bias, p.N);
    p.bias = given.bias == nullptr ? nullptr : bias.data();
    RowState state;
    state.offsets.reset(new std::int32_t[static_cast<std::size_t>(p.M)]);
    p.offsets = state.offsets.get();
    switch (a.dtype) {
        case DType::kInt8: return multiply_integers(p, source, a, *given.a_scale, state, to);
        case DType::kFloat32:
            return multiply_floats<float>(p, source, a, given.smooth, given.rotate, state, to);
        case DType::kBFloat16:
            return multiply_floats<bfloat16>(p, source, a, given.smooth, given.rotate, state, to);
        case DType::kFloat16:
            return multiply_floats<float16>(p, source, a, given.smooth, given.rotate, state, to);
        default:
            FEWSTEP_CHECK(false, "a: expected int8, float32, bfloat16 or float16, got ",
                          name(a.dtype));
    }
}

}  // namespace fewstep::cpu::int8
