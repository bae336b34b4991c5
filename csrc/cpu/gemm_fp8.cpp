// gemm_fp8 on the CPU, which has no arithmetic in 8 bits: e4m3 becomes bfloat16, exactly, and is
// multiplied with bfloat16's dot products where there are any, else in float32 (bf16_tiles.h).
//
// First the rows: quantised if they are floating, and widened. Then the product, in the same
// parallel region: work is cut into (block of rows) x (panel of 64 columns); a task widens its
// panel of the weight in slices of K that stay in the second-level cache and walks its rows in
// tiles through each. An output's sum has one order, so neither threads nor scheduling change a
// bit. What follows the sums is as in int8_product.h: from registers to the output, or by way of
// scratch and epilogue.h; a gated activation takes each tile through two panels, half the weight
// apart.
#include "fewstep/ops/gemm_fp8.h"

#include <omp.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/bf16_finish.h"
#include "fewstep/cpu/e4m3_panel.h"
#include "fewstep/cpu/epilogue.h"
#include "fewstep/cpu/low_rank.h"
#include "fewstep/cpu/product_call.h"
#include "fewstep/cpu/prologue.h"
#include "fewstep/cpu/quantize_row_fp8.h"
#include "fewstep/cpu/thread_scratch.h"
#include "fewstep/dispatch.h"

namespace fewstep::cpu {
namespace {

using bf16::kPanel;
using bf16::Machine;
using bf16::Tile;

constexpr std::int64_t kBlock = 2 * bf16::kBlockPairs;  // k, and rows of w, that share a scale

static_assert(kPanel == LowRank::kPanel && kPanel == epilogue::kPanel);

struct Operands {
    const std::uint8_t* w;
    std::int64_t ldw;
    const float* w_scale;
    const float* bias;
    const std::uint32_t* a;  // [M][pairs]
    const float* a_scale;
    std::int64_t blocks;  // of 128 k with scales, in a row
    bool blocked;         // whether there are those, or one for each row of a
    bool squares;         // whether w_scale is [ceil(N / 128), blocks]
    const LowRank* branch;
    const Epilogue* end;
    std::int64_t M, N, K, pairs;
};

// Columns [n, n + columns) of the weight, and a thread's memory for them.
struct Columns {
    std::int64_t n = 0;
    int columns = 0;
    std::uint32_t* words = nullptr;  // a slice of their panel
    float* up = nullptr;             // the branch's panel
    float* acc = nullptr;     // sums of all rows of a task, or of a tile if a slice is all of K
    float* scales = nullptr;  // of blocks: [blocks][kPanel], or [kPanel]
    float* y = nullptr;       // a tile's, for what follows
};

// Rows [begin, end) of a task and its slice of K, [first, last).
struct Part {
    std::int64_t begin, end, first, last;
};

// Scales where others have been taken already.
inline const float* ones() {
    static const std::vector<float> values(kPanel, 1.0f);
    return values.data();
}

// Columns' scales of blocks, [blocks][kPanel].
void spread_scales(const Operands& p, const Columns& at) {
    for (std::int64_t b = 0; b < p.blocks && p.squares; ++b) {
        for (int c = 0; c < at.columns; ++c) {
            at.scales[b * kPanel + c] = p.w_scale[(at.n + c) / kBlock * p.blocks + b];
        }
    }
}

// Rows [m, m + rows), a tile, by a slice of a panel.
template <typename Out>
void multiply_tile(const Operands& p, const Columns& at, const Part& part, std::int64_t m, int rows,
                   const Machine& machine, Out* out, std::int64_t ldo) {
    const bool last = part.last == p.K, whole = part.first == 0 && last;
    Tile tile;
    tile.a = p.a + m * p.pairs + part.first / 2;
    tile.lda = p.pairs;
    tile.b = at.words;
    tile.pairs = (part.last - part.first + 1) / 2;
    tile.rows = rows;
    tile.vectors = (at.columns + 15) / 16;
    tile.acc = whole ? at.acc : at.acc + (m - part.begin) * kPanel;
    tile.resume = part.first > 0;
    bf16::Finish f;
    f.acc = tile.acc;
    f.offsets = nullptr;
    f.a_scale = p.blocked ? ones() : p.a_scale + m;
    f.w_scale = p.squares ? ones() : p.w_scale + at.n;
    f.bias = p.bias == nullptr ? nullptr : p.bias + at.n;
    f.low = p.branch->row(m);
    f.up = at.up;
    f.rank = p.branch->rank();
    f.ldo = ldo;
    f.rows = rows;
    f.columns = at.columns;
    if (!p.blocked) {
        bf16::choose_tile<Out>(machine, rows, tile.vectors)(tile, f, last, out);
        return;
    }
    const std::int64_t block = part.first / kBlock;
    tile.a_scale = p.a_scale + m * p.blocks + block;
    tile.ld_a_scale = p.blocks;
    tile.ld_w_scale = p.squares ? kPanel : 0;
    tile.w_scale = p.squares ? at.scales + block * kPanel : ones();
    bf16::choose_blocks(machine.isa)(tile, at.columns,
                                     bf16::choose_accumulate(machine, rows, tile.vectors));
    if (last) tile::choose_finish<float, Out>(machine.isa)(f, out);
}

// A slice of a task's product; out is its first column's.
template <typename Out>
void multiply_slice(const Operands& p, const Columns (&at)[2], const Part& part,
                    const Machine& machine, epilogue::RoundFunction<Out> round, Out* out) {
    const Epilogue& end = *p.end;
    const int halves = end.is_glu() ? 2 : 1, columns = at[0].columns;
    const std::int64_t width = end.width(), n = at[0].n;
    for (std::int64_t m = part.begin; m < part.end; m += machine.tile_rows()) {
        const int rows =
            static_cast<int>(std::min<std::int64_t>(machine.tile_rows(), part.end - m));
        if (end.is_plain()) {
            multiply_tile(p, at[0], part, m, rows, machine, out + m * width, width);
            continue;
        }
        for (int r = 0; part.last == p.K && r < rows; ++r) {
            end.prefetch(m + r, n, columns, out + (m + r) * width);
        }
        for (int i = 0; i < halves; ++i) {
            multiply_tile(p, at[i], part, m, rows, machine, at[i].y, std::int64_t{kPanel});
        }
        if (part.last == p.K) {
            end.finish(m, n, rows, columns, at[0].y, at[halves - 1].y, round, out + m * width);
        }
    }
}

// Calls prepare(m, bytes) for every row, with scratch for K bytes, then multiplies, then quantises
// rows of out if asked to.
template <typename Out, typename Prepare>
void multiply(const Operands& p, const Prepare& prepare, Out* out,
              const product::Quantized<Out>& quantized) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    constexpr std::int64_t kRows = 192, kMany = 960;  // rows of a task: whole tiles of any height
    constexpr std::int64_t kFew = 8;
    constexpr std::int64_t kSlice = 3072, kSliceOfFew = 128;  // 384 and 16 KiB of a panel
    const Machine machine;
    const int threads = p.M * p.N * p.K > kWorthThreads ? omp_get_max_threads() : 1;
    const int halves = p.end->is_glu() ? 2 : 1;
    const std::int64_t width = p.end->width(), panels = (width + kPanel - 1) / kPanel;
    // A panel meets as many rows as there are, where there are enough panels to go round.
    const std::int64_t rows = std::min(p.M, panels >= 8 * threads ? kMany / halves : kRows);
    const std::int64_t blocks = (p.M + rows - 1) / rows;
    const std::int64_t slice =
        std::max<std::int64_t>(std::min(p.K, p.M <= kFew ? kSliceOfFew : kSlice / halves), 1);
    const std::int64_t words = (slice + 1) / 2 * kPanel, ups = p.branch->rank() * kPanel;
    const std::int64_t sums = (slice < p.K ? rows : bf16::kMaxRows) * kPanel;
    const std::int64_t ys = p.end->is_plain() ? 0 : bf16::kMaxRows * kPanel;
    const ThreadScratch<std::uint8_t> byte_scratch(threads, p.K);
    const ThreadScratch<std::uint32_t> word_scratch(threads, halves * words);
    const ThreadScratch<float> up_scratch(threads, halves * ups);
    const ThreadScratch<float> acc_scratch(threads, halves * sums);
    const std::int64_t scales = p.squares ? p.blocks * kPanel : 0;
    const ThreadScratch<float> scale_scratch(threads, halves * scales);
    const ThreadScratch<float> y_scratch(threads, halves * ys);
    const epilogue::RoundFunction<Out> round = epilogue::choose_round<Out>();
#pragma omp parallel num_threads(threads)
    {
        const int thread = omp_get_thread_num();
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) {
            prepare(m, byte_scratch.of_thread(thread));
            p.branch->prepare_row(m);
        }
        Columns at[2];
        for (int i = 0; i < halves; ++i) {
            at[i].words = word_scratch.of_thread(thread) + i * words;
            at[i].up = up_scratch.of_thread(thread) + i * ups;
            at[i].acc = acc_scratch.of_thread(thread) + i * sums;
            at[i].scales = scale_scratch.of_thread(thread) + i * scales;
            at[i].y = y_scratch.of_thread(thread) + i * ys;
        }
        std::int64_t current = -1;  // the panel of `up` that this thread has at hand
#pragma omp for schedule(dynamic)
        for (std::int64_t index = 0; index < panels * blocks; ++index) {
            const std::int64_t n = index / blocks * kPanel, begin = index % blocks * rows;
            const bool fresh = n != current;
            for (int i = 0; i < halves && fresh; ++i) {
                at[i].n = n + i * width;
                at[i].columns = static_cast<int>(std::min<std::int64_t>(kPanel, width - n));
                p.branch->panel(at[i].n, at[i].columns, at[i].up);
                spread_scales(p, at[i]);
            }
            current = n;
            Part part{begin, std::min(p.M, begin + rows), 0, 0};
            do {  // once for K = 0
                part.last = std::min(p.K, part.first + slice);
                for (int i = 0; i < halves && (fresh || slice < p.K); ++i) {
                    const std::uint8_t* const w = p.w + at[i].n * p.ldw + part.first;
                    machine.expand({w, p.ldw, at[i].columns, part.last - part.first}, at[i].words);
                }
                multiply_slice(p, at, part, machine, round, out + n);
                part.first = part.last;
            } while (part.first < p.K);
        }
        product::quantize_rows(out, quantized, p.M, width);
    }
}

template <typename Prepare>
void multiply_into(const Operands& p, const Prepare& prepare, const product::Destination& to) {
    product::run_into(to, p.M, p.end->width(), [&](auto* out, const auto& quantized) {
        multiply(p, prepare, out, quantized);
    });
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
void multiply_floats(Operands& p, const ProductArguments& given, std::uint32_t* words,
                     const product::Destination& to) {
    const TensorView& a = given.a;
    const std::int64_t count = std::max<std::int64_t>(p.blocks, 1);
    const std::int64_t size = p.blocked ? kBlock : p.K;
    const std::unique_ptr<float[]> scales(new float[static_cast<std::size_t>(p.M * count)]);
    p.a_scale = scales.get();
    const prologue::Prologue<T> prepare(given.smooth, given.rotate, p.K);
    const ThreadScratch<float> prepared(omp_get_max_threads(), prepare.active() ? p.K : 0);
    const auto plain = choose_quantize<T>(isa());
    const auto quantize = choose_quantize<float>(isa());
    const auto widen = e4m3::choose_row(isa());
    multiply_into(
        p,
        [&](std::int64_t m, std::uint8_t* q) {
            const T* const row = a.ptr<T>() + m * a.stride(0);
            const auto blocks = [&](const auto* values, auto function) {
                for (std::int64_t b = 0; b < count; ++b) {
                    const std::int64_t first = b * size, n = std::min(size, p.K - first);
                    scales[m * count + b] = function(values + first, q + first, n);
                }
            };
            if (prepare.active()) {
                float* const values = prepared.of_thread(omp_get_thread_num());
                prepare.apply(row, values);
                blocks(static_cast<const float*>(values), quantize);
            } else {
                blocks(row, plain);
            }
            widen(q, p.K, words + m * p.pairs);
        },
        to);
}

}  // namespace

void gemm_fp8(const TensorView& a, const TensorView* a_scale, const TensorView& w,
              const TensorView& w_scale, const TensorView* bias, const TensorView* low,
              const TensorView* up, const TensorView* smooth, std::int64_t rotate,
              const std::string& activation, const TensorView* gate, const TensorView* residual,
              const TensorView* scale, const TensorView& out) {
    const ProductArguments given{a,      a_scale, w,          w_scale, bias,     low,   up,
                                 smooth, rotate,  activation, gate,    residual, scale, out};
    Operands p{};
    p.M = out.size(0);
    p.N = w.size(0);
    p.K = a.size(1);
    p.pairs = (p.K + 1) / 2;
    const Epilogue end(activation, gate, residual, p.M, p.N);
    p.end = &end;
    const product::Destination to =
        product::expect_arguments(given, DType::kUInt8, p.N, end.width());
    p.squares = w_scale.ndim == 2;
    p.blocked = p.squares || (a_scale != nullptr && a_scale->ndim == 2);
    p.blocks = p.blocked ? (p.K + kBlock - 1) / kBlock : 0;
    if (a_scale != nullptr && p.blocked) {
        expect_contiguous(*a_scale, "a_scale", DType::kFloat32, {p.M, p.blocks});
    } else if (a_scale != nullptr) {
        expect_contiguous(*a_scale, "a_scale", DType::kFloat32, {p.M});
    }
    expect_rows(w, "w", DType::kUInt8, {p.N, p.K});
    if (p.squares) {
        const std::int64_t rows = (p.N + kBlock - 1) / kBlock;
        expect_contiguous(w_scale, "w_scale", DType::kFloat32, {rows, p.blocks});
    } else {
        expect_contiguous(w_scale, "w_scale", DType::kFloat32, {p.N});
    }
    const LowRank branch(low, up, p.M, p.N);
    p.branch = &branch;
    if (p.M == 0 || p.N == 0) return;
    p.w = w.ptr<std::uint8_t>();
    p.ldw = w.stride(0);
    p.w_scale = w_scale.ptr<float>();
    const std::vector<float> wide_bias = product::widen_bias(bias, p.N);
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
            return multiply_into(p, prepare, to);
        }
        case DType::kFloat32: return multiply_floats<float>(p, given, words.get(), to);
        case DType::kBFloat16: return multiply_floats<bfloat16>(p, given, words.get(), to);
        case DType::kFloat16: return multiply_floats<float16>(p, given, words.get(), to);
        default:
            FEWSTEP_CHECK(false, "a: expected uint8, float32, bfloat16 or float16, got ",
                          name(a.dtype));
    }
}

}  // namespace fewstep::cpu
