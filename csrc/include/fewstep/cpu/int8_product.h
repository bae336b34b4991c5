// Products of int8 rows and a weight that a task sees as a panel of bytes: gemm_w8a8 and gemm_w4a8.
//
//   y_mn = fma(float(sum_k a_mk w_nk) a_scale_m, w_scale_n, bias_n) + sum_r low_mr up_nr
//   out  = y, or what epilogue.h makes of it, rounded; or int8 rows of that, each with a scale
//
// First the rows: quantised if they are floating, and summed for the offset of the weights. Then
// the product, in the same parallel region: work is cut into (block of rows) x (panel of 64
// columns); a task walks its rows in tiles while the panel (64 K bytes) stays in the second-level
// cache. Sums are exact and what follows them has one order, so neither threads nor scheduling
// change a bit.
//
// What differs between the ops is where columns [n, n + columns) of the weight come from, a Source:
//   static constexpr bool kMakes               whether bytes() makes them, in scratch that it is
//                                              lent: width (end - begin) bytes
//   bytes(n, columns, begin, end, scratch)     k in [begin, end) of w + 128: [k / 4][width][4] with
//                                              the width a multiple of 16
//   scales(n, columns, scratch)                a scale per column; kPanel floats are lent
// If they have to be made and few rows are to meet them, they are made in slices of K that stay in
// the first-level cache and are multiplied at once.
//
// Without an epilogue a tile goes from its registers to the output. With one it goes, as float32,
// to scratch in the first-level cache, and from there row by row. A task of a gated activation
// (geglu, swiglu) multiplies each tile of rows with two runs of 64 columns, half the weight apart.
// Where the second doesn't start with a panel, it is put together from two panels, once a task.
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
#include "fewstep/cpu/int8_tiles.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/dispatch.h"
#include "fewstep/ops/gemm_w8a8.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fewstep::cpu::int8 {

static_assert(kPanel == LowRank::kPanel && kPanel == epilogue::kPanel);

// What turns the sums of a tile into outputs: undo the offset of the weights, scale, add the bias
// and the low-rank branch.
struct Finish {
    const std::int32_t* acc;      // row r at acc + r * kPanel
    const std::int32_t* offsets;  // 128 sum_k a_mk, per row
    const float* a_scale;         // per row
    const float* w_scale;         // per column
    const float* bias;            // per column; may be null
    const float* low;             // row r at low + r * rank
    const float* up;              // [rank][kPanel]
    std::int64_t rank;
    std::int64_t ldo;  // distance of output rows
    int rows, columns;
    bool last;  // false while slices of K are to come: the sums stay in acc
};

template <typename Out>
[[gnu::always_inline]] inline void finish(const Finish& f, Out* out) {
    for (int r = 0; r < f.rows; ++r) {
        const std::uint32_t offset = static_cast<std::uint32_t>(f.offsets[r]);
        float values[kPanel];
        // fma is spelled out: without it a compiler may or may not contract, per instruction set.
        for (int n = 0; n < f.columns; ++n) {
            const std::uint32_t sum = static_cast<std::uint32_t>(f.acc[r * kPanel + n]) - offset;
            const float scaled = static_cast<float>(static_cast<std::int32_t>(sum)) * f.a_scale[r];
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
    accumulate_portable(t);
    if (f.last) finish(f, out);
}

inline std::int32_t sum_portable(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const Tile& t, const Finish& f, Out* out) {
    accumulate_avx2<kRows>(t);
    if (f.last) finish(f, out);
}

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

FEWSTEP_TARGET_AVX512 inline void store(float* out, __m512 value) {
    _mm512_storeu_ps(out, value);
}
FEWSTEP_TARGET_AVX512 inline void store(float16* out, __m512 value) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtps_ph(value, kNearest));
}
FEWSTEP_TARGET_AVX512 inline void store(bfloat16* out, __m512 value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i rounded = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, half), nan, quiet);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// The sums go from the accumulators straight to the output: 24 more stores in between overfill
// the store queue and stall the next tile.
template <int kRows, int kVectors, typename Out>
FEWSTEP_TARGET_AVX512 void tile_avx512(const Tile& t, const Finish& f, Out* out) {
    // Outputs are seldom in cache and stores retire in order: their lines are asked for now.
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        const char* row = reinterpret_cast<const char*>(out + r * f.ldo);
        for (std::size_t i = 0; i < 16 * kVectors * sizeof(Out); i += 64) {
            _mm_prefetch(row + i, _MM_HINT_ET0);
        }
    }
    __m512i acc[kRows][kVectors];
    accumulate_avx512<kRows, kVectors>(t, acc);
    if (!f.last || f.columns < 16 * kVectors) {  // the latter in the last, ragged panel
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                _mm512_store_si512(t.acc + r * kPanel + 16 * v, acc[r][v]);
            }
        }
        if (f.last) finish(f, out);
        return;
    }
    // Column n of row r before the branch; without bias -0 is added, which changes no bit.
    const auto scaled = [&](int r, __m512i sum, __m512 w_scale,
                            __m512 bias) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
        const __m512i exact = _mm512_sub_epi32(sum, _mm512_set1_epi32(f.offsets[r]));
        const __m512 row = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), _mm512_set1_ps(f.a_scale[r]));
        return _mm512_fmadd_ps(row, w_scale, bias);
    };
    const auto load_bias = [&](int v) FEWSTEP_TARGET_AVX512 __attribute__((always_inline)) {
        return f.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_loadu_ps(f.bias + 16 * v);
    };
    if (f.rank == 0) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v), bias = load_bias(v);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
                store(out + r * f.ldo + 16 * v, scaled(r, acc[r][v], w_scale, bias));
            }
        }
        return;
    }
    // The branch adds to the registers that hold the tile; written out for GCC's sake, as the
    // dot products are.
    __m512 values[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v), bias = load_bias(v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) values[r][v] = scaled(r, acc[r][v], w_scale, bias);
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
                asm("vfmadd231ps %2, %1, %0" : "+v"(values[r][v]) : "v"(columns[v]), "v"(low));
            }
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(out + r * f.ldo + 16 * v, values[r][v]);
    }
}

template <int kRows, typename Out>
TileFunction<Out> choose_vectors(int vectors) {
    constexpr TileFunction<Out> table[] = {tile_avx512<kRows, 1, Out>, tile_avx512<kRows, 2, Out>,
                                           tile_avx512<kRows, 3, Out>, tile_avx512<kRows, 4, Out>};
    return table[vectors - 1];
}
#endif

template <typename Out>
TileFunction<Out> choose_tile(Isa isa, int rows, int vectors) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) {
        constexpr TileFunction<Out> (*table[])(int) = {
            choose_vectors<1, Out>, choose_vectors<2, Out>, choose_vectors<3, Out>,
            choose_vectors<4, Out>, choose_vectors<5, Out>, choose_vectors<6, Out>};
        return table[rows - 1](vectors);
    }
    if (isa == Isa::kAvx2) {
        constexpr TileFunction<Out> table[] = {tile_avx2<1, Out>, tile_avx2<2, Out>,
                                               tile_avx2<3, Out>, tile_avx2<4, Out>};
        return table[rows - 1];
    }
#endif
    (void)isa, (void)rows, (void)vectors;
    return tile_portable<Out>;
}

inline int tile_rows(Isa isa) {
    return isa == Isa::kAvx512 ? 6 : 4;
}

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
};

// What a task works on: rows [begin, end) of columns [n, n + columns).
struct Task {
    std::int64_t n, begin, end;
    int columns;
    const float* scale;  // per column
    const float* up;     // the branch's panel
};

// k in [first, last) of a task's product, rows of out at distance ldo. acc has room for one tile,
// or with slices of K for all rows.
template <typename Out>
void multiply_slice(const Operands& p, const Task& task, const std::uint8_t* bytes,
                    std::int64_t first, std::int64_t last, Isa isa, std::int32_t* acc, Out* out,
                    std::int64_t ldo) {
    const int step = tile_rows(isa);
    const bool whole = first == 0 && last == p.K;
    Tile tile;
    tile.lda = p.lda;
    tile.groups = (last - first) / 4;
    tile.tail = static_cast<int>((last - first) % 4);
    tile.b = bytes;
    tile.vectors = (task.columns + 15) / 16;
    tile.resume = first > 0;
    Finish f;
    f.w_scale = task.scale;
    f.bias = p.bias == nullptr ? nullptr : p.bias + task.n;
    f.up = task.up;
    f.rank = p.branch->rank();
    f.ldo = ldo;
    f.columns = task.columns;
    f.last = last == p.K;
    for (std::int64_t m = task.begin; m < task.end; m += step) {
        tile.a = p.a + m * p.lda + first;
        tile.rows = static_cast<int>(std::min<std::int64_t>(step, task.end - m));
        tile.acc = whole ? acc : acc + (m - task.begin) * kPanel;
        f.acc = tile.acc;
        f.offsets = p.offsets + m;
        f.a_scale = p.a_scale + m;
        f.low = p.branch->row(m);
        f.rows = tile.rows;
        choose_tile<Out>(isa, tile.rows, tile.vectors)(tile, f, out + (m - task.begin) * ldo);
    }
}

constexpr std::int64_t kSliceRows = 8, kSlice = 128;  // 8 KiB of bytes; measured

// A run of columns that a thread has at hand, and its memory.
struct Run {
    Task task{};
    const std::uint8_t* bytes = nullptr;
    std::uint8_t* scratch = nullptr;     // of bytes, if they are made
    std::uint8_t* neighbours = nullptr;  // of the panels that they are put together from
    float* up = nullptr;
    alignas(64) float scales[kPanel];
};

inline int padded(std::int64_t columns) {
    return static_cast<int>((std::min<std::int64_t>(kPanel, columns) + 15) / 16 * 16);
}

// The bytes of a run that starts within a panel: the end of that one and the start of the next.
template <typename Source>
void join_panels(const Source& source, const Operands& p, const Run& run, std::int64_t begin,
                 std::int64_t end) {
    const std::int64_t first = run.task.n / kPanel * kPanel, second = first + kPanel;
    const int skipped = static_cast<int>(run.task.n - first);
    const int left = std::min(run.task.columns, static_cast<int>(kPanel) - skipped);
    const int right = run.task.columns - left;
    const int widths[] = {padded(p.N - first), padded(p.N - second), padded(run.task.columns)};
    const auto bytes = [&](std::int64_t n, std::uint8_t* scratch) {
        const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, p.N - n));
        return source.bytes(n, columns, begin, end, scratch);
    };
    const std::uint8_t* const from = bytes(first, run.neighbours);
    const std::uint8_t* const next =
        right > 0 ? bytes(second, run.neighbours + (end - begin) * kPanel) : nullptr;
    for (std::int64_t g = 0; g < (end - begin + 3) / 4; ++g) {
        std::uint8_t* const to = run.scratch + 4 * g * widths[2];
        std::memcpy(to, from + 4 * (g * widths[0] + skipped), static_cast<std::size_t>(4 * left));
        if (right > 0) {
            std::memcpy(to + 4 * left, next + 4 * g * widths[1],
                        static_cast<std::size_t>(4 * right));
        }
    }
}

// The bytes of k in [begin, end).
template <typename Source>
const std::uint8_t* bytes_of(const Source& source, const Operands& p, const Run& run,
                             std::int64_t begin, std::int64_t end) {
    if (run.task.n % kPanel == 0) {
        return source.bytes(run.task.n, run.task.columns, begin, end, run.scratch);
    }
    join_panels(source, p, run, begin, end);
    return run.scratch;
}

// Columns from n on: a panel, or within one as many as `columns`. Bytes too, unless by slices.
template <typename Source>
void prepare_run(const Source& source, const Operands& p, std::int64_t n, int columns, bool slices,
                 Run& run) {
    if (n % kPanel == 0) columns = static_cast<int>(std::min<std::int64_t>(kPanel, p.N - n));
    run.task.n = n;
    run.task.columns = columns;
    run.task.scale = source.scales(n, columns, run.scales);
    p.branch->panel(n, columns, run.up);
    run.task.up = run.up;
    if (!slices) run.bytes = bytes_of(source, p, run, 0, p.K);
}

// A tile of rows, or all of few rows by slices of K.
template <typename Out, typename Source>
void multiply_run(const Source& source, const Operands& p, const Run& run, bool slices, Isa isa,
                  std::int32_t* acc, Out* out, std::int64_t ldo) {
    if (!slices) {
        multiply_slice(p, run.task, run.bytes, 0, p.K, isa, acc, out, ldo);
        return;
    }
    for (std::int64_t first = 0; first < p.K; first += kSlice) {
        const std::int64_t last = std::min(p.K, first + kSlice);
        const std::uint8_t* const bytes = bytes_of(source, p, run, first, last);
        multiply_slice(p, run.task, bytes, first, last, isa, acc, out, ldo);
    }
}

// Rows [begin, end) of outputs [n, n + columns), through the epilogue. One run of columns is at
// hand, or two.
template <typename Out, typename Source>
void multiply_and_finish(const Source& source, const Operands& p, Run* runs, std::int64_t begin,
                         std::int64_t end, int columns, bool slices, Isa isa, std::int32_t* acc,
                         epilogue::BlendFunction<Out> blend, Out* out) {
    alignas(64) float y[2][kSliceRows * kPanel];
    const std::int64_t n = runs[0].task.n, step = slices ? kSliceRows : tile_rows(isa);
    for (std::int64_t m = begin; m < end; m += step) {
        const std::int64_t stop = std::min(end, m + step);
        for (std::int64_t row = m; row < stop; ++row) {
            p.end->prefetch(row, n, columns, out + row * p.end->width() + n);
        }
        for (int half = 0; half < (p.end->is_glu() ? 2 : 1); ++half) {
            runs[half].task.begin = m;
            runs[half].task.end = stop;
            multiply_run(source, p, runs[half], slices, isa, acc, y[half], kPanel);
        }
        for (std::int64_t row = m; row < stop; ++row) {
            const std::int64_t at = (row - m) * kPanel;
            p.end->finish(row, n, columns, y[0] + at, y[1] + at, blend,
                          out + row * p.end->width() + n);
        }
    }
}

// What becomes of whole rows of out: int8 and a scale, or nothing.
template <typename Out>
struct Quantized {
    std::int8_t* q = nullptr;
    float* scale = nullptr;
};

// Calls prepare(m) for every row, then multiplies, then quantises rows of out if asked to.
template <typename Out, typename Source, typename Prepare>
void multiply(const Operands& p, const Source& source, const Prepare& prepare, Out* out,
              const Quantized<Out>& quantized) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    constexpr std::int64_t kBlock = 192;  // rows of a task: a multiple of every tile height
    constexpr std::int64_t kSecondLevel = 512 << 10;
    const Isa chosen = isa();
    const int threads = p.M * p.N * p.K > kWorthThreads ? omp_get_max_threads() : 1;
    const std::int64_t width = p.end->width(), panels = (width + kPanel - 1) / kPanel;
    // A panel that has to be made meets all rows at once where there are enough to go round.
    const std::int64_t rows = Source::kMakes && panels >= 8 * threads ? p.M : kBlock;
    const std::int64_t blocks = (p.M + rows - 1) / rows;
    const bool slices = Source::kMakes && p.M <= kSliceRows && p.K > kSlice;
    // A weight that fits the second-level cache meets one block of rows after the other; of a
    // larger one, and of one that is made, each panel meets all rows before the next.
    const bool fits = !Source::kMakes && p.N * p.K <= kSecondLevel;
    const int runs = p.end->is_glu() ? 2 : 1;
    const bool joins = p.end->is_glu() && width % kPanel != 0;
    const std::int64_t depth = ((slices ? kSlice : p.K) + 3) / 4 * 4 * kPanel;
    const ThreadScratch<std::uint8_t> byte_scratch(threads,
                                                   Source::kMakes || joins ? runs * depth : 0);
    const ThreadScratch<std::uint8_t> joined_scratch(threads,
                                                     Source::kMakes && joins ? 2 * depth : 0);
    const ThreadScratch<float> up_scratch(threads, runs * p.branch->rank() * kPanel);
    const epilogue::BlendFunction<Out> blend = epilogue::choose_blend<Out>();
    const quantize::RowFunction<Out> quantize_row = quantize::choose_row<Out>();
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) {
            prepare(m);
            p.branch->prepare_row(m);
        }
        alignas(64) std::int32_t acc[kSliceRows * kPanel];
        Run run[2];
        for (int i = 0; i < runs; ++i) {
            const int thread = omp_get_thread_num();
            run[i].scratch = byte_scratch.of_thread(thread) + i * depth;
            run[i].neighbours = joined_scratch.of_thread(thread);
            run[i].up = up_scratch.of_thread(thread) + i * p.branch->rank() * kPanel;
        }
        std::int64_t current = -1;  // the panel that this thread has at hand
#pragma omp for schedule(dynamic)
        for (std::int64_t index = 0; index < panels * blocks; ++index) {
            const std::int64_t panel = fits ? index % panels : index / blocks, n = panel * kPanel;
            const std::int64_t begin = (fits ? index / panels : index % blocks) * rows;
            const std::int64_t end = std::min(p.M, begin + rows);
            const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, width - n));
            if (panel != current) {
                for (int i = 0; i < runs; ++i) {
                    prepare_run(source, p, n + i * width, columns, slices, run[i]);
                }
                current = panel;
            }
            if (!p.end->is_plain()) {
                multiply_and_finish(source, p, run, begin, end, columns, slices, chosen, acc, blend,
                                    out);
                continue;
            }
            run[0].task.begin = begin;
            run[0].task.end = end;
            multiply_run(source, p, run[0], slices, chosen, acc, out + begin * width + n, width);
        }
        if (quantized.q != nullptr) {
#pragma omp for schedule(static)
            for (std::int64_t m = 0; m < p.M; ++m) {
                quantized.scale[m] = quantize_row(out + m * width, quantized.q + m * width, width);
            }
        }
    }
}

// What the product needs of each row beside its integers; of floating rows, those too.
struct RowState {
    std::unique_ptr<std::int8_t[]> quantized;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<std::int32_t[]> offsets;
};

// Where the product goes: out, or with a scale per row int8 of what out would be in `rounded`.
struct Destination {
    const TensorView& out;
    const TensorView* scale;
    DType rounded;
};

template <typename Source, typename Prepare>
void multiply_into(const Operands& p, const Source& source, const Prepare& prepare,
                   const Destination& to) {
    const auto run = [&](auto tag) {
        using Out = decltype(tag);
        if (to.scale == nullptr) {
            return multiply(p, source, prepare, to.out.ptr<Out>(), Quantized<Out>{});
        }
        const std::unique_ptr<Out[]> rows(new Out[static_cast<std::size_t>(p.M * p.end->width())]);
        multiply(p, source, prepare, rows.get(),
                 Quantized<Out>{to.out.ptr<std::int8_t>(), to.scale->ptr<float>()});
    };
    switch (to.rounded) {
        case DType::kFloat32: return run(float{});
        case DType::kBFloat16: return run(bfloat16{});
        case DType::kFloat16: return run(float16{});
        default:
            FEWSTEP_CHECK(false, "out: expected float32, bfloat16 or float16, got ",
                          name(to.rounded));
    }
}

// Where a row of `a` is integers already.
template <typename Source>
void multiply_integers(Operands& p, const Source& source, const TensorView& a,
                       const TensorView& a_scale, RowState& state, const Destination& to) {
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
                     const Destination& to) {
    // Not initialised: every element is written before it is read.
    state.quantized.reset(new std::int8_t[static_cast<std::size_t>(p.M * p.K)]);
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

// What is left of an op's arguments beside its weight.
struct Arguments {
    const TensorView& a;
    const TensorView* a_scale;
    const TensorView* bias;
    const TensorView* low;
    const TensorView* up;
    const TensorView* smooth;
    std::int64_t rotate;
    const std::string& activation;
    const TensorView* gate;
    const TensorView* residual;
    const TensorView* scale;
    const TensorView& out;
};

// The whole op, from checked views of the weight (in `source`, with N columns) and unchecked ones
// of the rest.
template <typename Source>
void product(const Source& source, std::int64_t N, const Arguments& given) {
    const TensorView &a = given.a, &out = given.out;
    Operands p;
    p.M = out.size(0);
    p.N = N;
    p.K = a.size(1);
    FEWSTEP_CHECK(p.K < kGemmW8A8MaxK, "a: expected K < ", kGemmW8A8MaxK, ", got ", p.K);
    FEWSTEP_CHECK((a.dtype == DType::kInt8) == (given.a_scale != nullptr),
                  "a_scale: expected one with int8 a and none with floating a, got ",
                  given.a_scale == nullptr ? "none" : "one", " with ", name(a.dtype));
    FEWSTEP_CHECK(given.a_scale == nullptr || (given.smooth == nullptr && given.rotate == 0),
                  "smooth, rotate: expected none with int8 a, got one");
    expect_rows(a, "a", a.dtype, {p.M, p.K});
    if (given.a_scale != nullptr) {
        expect_contiguous(*given.a_scale, "a_scale", DType::kFloat32, {p.M});
    }
    if (given.bias != nullptr) expect_contiguous(*given.bias, "bias", given.bias->dtype, {p.N});
    const Epilogue end(given.activation, given.gate, given.residual, p.M, p.N);
    p.end = &end;
    Destination to{out, given.scale, out.dtype};
    if (given.scale != nullptr) {
        expect_contiguous(*given.scale, "scale", DType::kFloat32, {p.M});
        to.rounded = a.dtype == DType::kInt8 ? DType::kBFloat16 : a.dtype;
    }
    expect_contiguous(out, "out", given.scale == nullptr ? out.dtype : DType::kInt8,
                      {p.M, end.width()});
    const LowRank branch(given.low, given.up, p.M, p.N);
    p.branch = &branch;
    if (p.M == 0 || p.N == 0) return;
    std::vector<float> wide_bias(given.bias == nullptr ? 0 : static_cast<std::size_t>(p.N));
    if (given.bias != nullptr) widen(*given.bias, "bias", 0, p.N, wide_bias.data());
    p.bias = given.bias == nullptr ? nullptr : wide_bias.data();
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
