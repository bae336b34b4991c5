// gemm_w8a8 on the CPU. First the rows: quantised if they are floating, and summed for the offset
// of the weights. Then the product, in the same parallel region: work is cut into (block of rows) x
// (panel of 64 columns); a task walks its rows in tiles while the packed panel (64 K bytes) stays
// in the second-level cache. Every output is computed by one tile in one order, so neither threads
// nor scheduling change a bit.
#include "fewstep/ops/gemm_w8a8.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/quantize_row.h"
#include "fewstep/cpu/w8a8_tiles.h"
#include "fewstep/dispatch.h"

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12's own AVX-512 headers start masked operations from an undefined register and then warn.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace fewstep::cpu {
namespace {

using w8a8::kPanel;

// What turns the sums of a tile into outputs: undo the offset of the weights, scale, add the bias.
struct Finish {
    const std::int32_t* acc;      // row r at acc + r * kPanel
    const std::int32_t* offsets;  // 128 sum_k a_mk, per row
    const float* a_scale;         // per row
    const float* w_scale;         // per column
    const float* bias;            // per column; may be null
    std::int64_t ldo;             // distance of output rows
    int rows, columns;
};

template <typename Out>
[[gnu::always_inline]] inline void finish(const Finish& f, Out* out) {
    for (int r = 0; r < f.rows; ++r) {
        const std::uint32_t offset = static_cast<std::uint32_t>(f.offsets[r]);
        for (int n = 0; n < f.columns; ++n) {
            const std::uint32_t sum = static_cast<std::uint32_t>(f.acc[r * kPanel + n]) - offset;
            const float scaled = static_cast<float>(static_cast<std::int32_t>(sum)) * f.a_scale[r];
            // fma is spelled out: without it a compiler may or may not contract, per instruction
            // set.
            out[r * f.ldo + n] =
                Convert<Out>::from(f.bias == nullptr ? scaled * f.w_scale[n]
                                                     : std::fma(scaled, f.w_scale[n], f.bias[n]));
        }
    }
}

// A tile from operands to outputs.
template <typename Out>
using TileFunction = void (*)(const w8a8::Tile&, const Finish&, Out*);

template <typename Out>
void tile_portable(const w8a8::Tile& t, const Finish& f, Out* out) {
    w8a8::accumulate_portable(t);
    finish(f, out);
}

std::int32_t sum_portable(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

#if defined(__x86_64__)
template <int kRows, typename Out>
FEWSTEP_TARGET_AVX2 void tile_avx2(const w8a8::Tile& t, const Finish& f, Out* out) {
    w8a8::accumulate_avx2<kRows>(t);
    finish(f, out);
}

FEWSTEP_TARGET_AVX2 std::int32_t sum_avx2(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

FEWSTEP_TARGET_AVX512 std::int32_t sum_avx512(const std::int8_t* a, std::int64_t n) {
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
FEWSTEP_TARGET_AVX512 void tile_avx512(const w8a8::Tile& t, const Finish& f, Out* out) {
    // Outputs are seldom in cache and stores retire in order: their lines are asked for now.
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
        const char* row = reinterpret_cast<const char*>(out + r * f.ldo);
        for (std::size_t i = 0; i < 16 * kVectors * sizeof(Out); i += 64) {
            _mm_prefetch(row + i, _MM_HINT_ET0);
        }
    }
    __m512i acc[kRows][kVectors];
    w8a8::accumulate_avx512<kRows, kVectors>(t, acc);
    if (f.columns < 16 * kVectors) {  // the last, ragged panel
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                _mm512_store_si512(t.acc + r * kPanel + 16 * v, acc[r][v]);
            }
        }
        return finish(f, out);
    }
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
        const __m512 w_scale = _mm512_loadu_ps(f.w_scale + 16 * v);
        // Without bias: adding -0 to a product changes no bit of it.
        const __m512 bias =
            f.bias == nullptr ? _mm512_set1_ps(-0.0f) : _mm512_loadu_ps(f.bias + 16 * v);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const __m512i sum = _mm512_sub_epi32(acc[r][v], _mm512_set1_epi32(f.offsets[r]));
            const __m512 scaled =
                _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(f.a_scale[r]));
            store(out + r * f.ldo + 16 * v, _mm512_fmadd_ps(scaled, w_scale, bias));
        }
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

int tile_rows(Isa isa) {
    return isa == Isa::kAvx512 ? 6 : 4;
}

using SumFunction = std::int32_t (*)(const std::int8_t*, std::int64_t);

SumFunction choose_sum(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return sum_avx512;
    if (isa == Isa::kAvx2) return sum_avx2;
#endif
    (void)isa;
    return sum_portable;
}

// 128 sum_k a_mk modulo 2^32: what w + 128 in the place of w adds to a sum.
std::int32_t offset_of(SumFunction sum, const std::int8_t* row, std::int64_t n) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(sum(row, n)) * 128u);
}

struct Operands {
    const std::int8_t* a;
    std::int64_t lda;
    const float* a_scale;
    const std::uint8_t* packed;
    const float* w_scale;
    const float* bias;
    const std::int32_t* offsets;
    std::int64_t M, N, K;
};

// Rows [begin, end) of the panel that starts at column n.
template <typename Out>
void multiply_panel(const Operands& p, std::int64_t n, std::int64_t begin, std::int64_t end,
                    Isa isa, Out* out) {
    alignas(64) std::int32_t acc[w8a8::kMaxRows * kPanel];
    const int step = tile_rows(isa);
    const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, p.N - n));
    w8a8::Tile tile;
    tile.lda = p.lda;
    tile.groups = p.K / 4;
    tile.tail = static_cast<int>(p.K % 4);
    tile.b = p.packed + n * ((p.K + 3) / 4 * 4);
    tile.vectors = (columns + 15) / 16;
    tile.acc = acc;
    for (std::int64_t m = begin; m < end; m += step) {
        tile.a = p.a + m * p.lda;
        tile.rows = static_cast<int>(std::min<std::int64_t>(step, end - m));
        const Finish f{
            acc, p.offsets + m, p.a_scale + m, p.w_scale + n, p.bias ? p.bias + n : nullptr,
            p.N, tile.rows,     columns};
        choose_tile<Out>(isa, tile.rows, tile.vectors)(tile, f, out + m * p.N + n);
    }
}

// Calls prepare(m) for every row, then multiplies.
template <typename Out, typename Prepare>
void multiply(const Operands& p, const Prepare& prepare, Out* out) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    constexpr std::int64_t kBlock = 192;  // rows of a task: a multiple of every tile height
    constexpr std::int64_t kSecondLevel = 512 << 10;
    const Isa chosen = isa();
    const std::int64_t panels = (p.N + kPanel - 1) / kPanel, blocks = (p.M + kBlock - 1) / kBlock;
    // A weight that fits the second-level cache meets one block of rows after the other; of a
    // larger one, each panel meets all rows before the next.
    const bool fits = p.N * p.K <= kSecondLevel;
#pragma omp parallel if (p.M * p.N * p.K > kWorthThreads)
    {
#pragma omp for schedule(static)
        for (std::int64_t m = 0; m < p.M; ++m) prepare(m);
#pragma omp for schedule(dynamic)
        for (std::int64_t index = 0; index < panels * blocks; ++index) {
            const std::int64_t panel = fits ? index % panels : index / blocks;
            const std::int64_t block = fits ? index / panels : index % blocks;
            const std::int64_t begin = block * kBlock, end = std::min(p.M, begin + kBlock);
            multiply_panel(p, panel * kPanel, begin, end, chosen, out);
        }
    }
}

// What the product needs of each row beside its integers; of floating rows, those too.
struct RowState {
    std::unique_ptr<std::int8_t[]> quantized;
    std::unique_ptr<float[]> scales;
    std::unique_ptr<std::int32_t[]> offsets;
};

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

// Where a row of `a` is integers already.
void multiply_integers(Operands& p, const TensorView& a, const TensorView& a_scale, RowState& state,
                       const TensorView& out) {
    p.a = a.ptr<std::int8_t>();
    p.lda = a.stride(0);
    p.a_scale = a_scale.ptr<float>();
    const SumFunction sum = choose_sum(isa());
    multiply_into(
        p, [&](std::int64_t m) { state.offsets[m] = offset_of(sum, p.a + m * p.lda, p.K); }, out);
}

template <typename T>
void multiply_floats(Operands& p, const TensorView& a, RowState& state, const TensorView& out) {
    // Not initialised: every element is written before it is read.
    state.quantized.reset(new std::int8_t[static_cast<std::size_t>(p.M * p.K)]);
    state.scales.reset(new float[static_cast<std::size_t>(p.M)]);
    p.a = state.quantized.get();
    p.lda = p.K;
    p.a_scale = state.scales.get();
    const SumFunction sum = choose_sum(isa());
    const quantize::RowFunction<T> quantize = quantize::choose_row<T>();
    const T* rows = a.ptr<T>();
    const std::int64_t stride = a.stride(0);
    multiply_into(
        p,
        [&](std::int64_t m) {
            std::int8_t* q = state.quantized.get() + m * p.K;
            state.scales[m] = quantize(rows + m * stride, q, p.K);
            state.offsets[m] = offset_of(sum, q, p.K);
        },
        out);
}

std::vector<float> widen(const TensorView* bias) {
    std::vector<float> wide(bias == nullptr ? 0 : static_cast<std::size_t>(bias->size(0)));
    if (bias == nullptr) return wide;
    dispatch_float(bias->dtype, "bias", [&](auto tag) {
        const auto* values = bias->ptr<decltype(tag)>();
        for (std::size_t n = 0; n < wide.size(); ++n)
            wide[n] = static_cast<float>(to_acc(values[n]));
    });
    return wide;
}

}  // namespace

void gemm_w8a8(const TensorView& a, const TensorView* a_scale, const TensorView& packed,
               const TensorView& w_scale, const TensorView* bias, const TensorView& out) {
    Operands p;
    p.packed = packed.ptr<std::uint8_t>();
    p.w_scale = w_scale.ptr<float>();
    p.M = out.size(0);
    p.N = out.size(1);
    p.K = a.size(1);
    FEWSTEP_CHECK(p.K < kGemmW8A8MaxK, "a: expected K < ", kGemmW8A8MaxK, ", got ", p.K);
    FEWSTEP_CHECK((a.dtype == DType::kInt8) == (a_scale != nullptr),
                  "a_scale: expected one with int8 a and none with floating a, got ",
                  a_scale == nullptr ? "none" : "one", " with ", name(a.dtype));
    expect_rows(a, "a", a.dtype, {p.M, p.K});
    if (a_scale != nullptr) expect_contiguous(*a_scale, "a_scale", DType::kFloat32, {p.M});
    expect_contiguous(packed, "packed", DType::kUInt8, {(p.N + 15) / 16 * 16, (p.K + 3) / 4 * 4});
    expect_contiguous(w_scale, "w_scale", DType::kFloat32, {p.N});
    if (bias != nullptr) expect_contiguous(*bias, "bias", bias->dtype, {p.N});
    expect_contiguous(out, "out", out.dtype, {p.M, p.N});
    if (p.M == 0 || p.N == 0) return;
    const std::vector<float> wide_bias = widen(bias);
    p.bias = bias == nullptr ? nullptr : wide_bias.data();
    RowState state;
    state.offsets.reset(new std::int32_t[static_cast<std::size_t>(p.M)]);
    p.offsets = state.offsets.get();
    switch (a.dtype) {
        case DType::kInt8: return multiply_integers(p, a, *a_scale, state, out);
        case DType::kFloat32: return multiply_floats<float>(p, a, state, out);
        case DType::kBFloat16: return multiply_floats<bfloat16>(p, a, state, out);
        case DType::kFloat16: return multiply_floats<float16>(p, a, state, out);
        default:
            FEWSTEP_CHECK(false, "a: expected int8, float32, bfloat16 or float16, got ",
                          name(a.dtype));
    }
}

}  // namespace fewstep::cpu
