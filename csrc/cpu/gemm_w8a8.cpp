// gemm_w8a8 on the CPU. Work is cut into (block of rows) x (panel of 64 columns); a task walks its
// rows in tiles while the packed panel (64 K bytes) stays in the second-level cache. Every output
// is computed by one tile in one order, so neither threads nor scheduling change a bit.
#include "fewstep/ops/gemm_w8a8.h"

#include <algorithm>
#include <cmath>

#include "fewstep/cpu/isa.h"
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

// One row of a tile: undo the offset of the weights, scale, add the bias, narrow.
struct Row {
    const std::int32_t* acc;
    std::int32_t row_sum;
    float a_scale;
    const float* w_scale;
    const float* bias;  // may be null
    int columns;
};

inline std::int32_t offset(const Row& row) {
    return static_cast<std::int32_t>(static_cast<std::uint32_t>(row.row_sum) * 128u);
}

// Columns [first, row.columns), one at a time or as the compiler vectorises it.
template <typename Out>
[[gnu::always_inline]] inline void finish(const Row& row, int first, Out* out) {
    const std::uint32_t shift = static_cast<std::uint32_t>(offset(row));
    for (int n = first; n < row.columns; ++n) {
        const auto exact =
            static_cast<std::int32_t>(static_cast<std::uint32_t>(row.acc[n]) - shift);
        const float scaled = static_cast<float>(exact) * row.a_scale;
        // fma is spelled out: without it a compiler may or may not contract, per instruction set.
        out[n] =
            Convert<Out>::from(row.bias == nullptr ? scaled * row.w_scale[n]
                                                   : std::fma(scaled, row.w_scale[n], row.bias[n]));
    }
}

template <typename Out>
void finish_portable(const Row& row, Out* out) {
    finish(row, 0, out);
}

std::int32_t sum_portable(const std::int8_t* a, std::int64_t n) {
    std::int32_t sum = 0;
    for (std::int64_t i = 0; i < n; ++i) sum += a[i];
    return sum;
}

#if defined(__x86_64__)
template <typename Out>
FEWSTEP_TARGET_AVX2 void finish_avx2(const Row& row, Out* out) {
    finish(row, 0, out);
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

template <typename Out>
FEWSTEP_TARGET_AVX512 void finish_avx512(const Row& row, Out* out) {
    const __m512i shift = _mm512_set1_epi32(offset(row));
    const __m512 a_scale = _mm512_set1_ps(row.a_scale);
    int n = 0;
    for (; n + 16 <= row.columns; n += 16) {
        const __m512i exact = _mm512_sub_epi32(_mm512_loadu_si512(row.acc + n), shift);
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(exact), a_scale);
        const __m512 w_scale = _mm512_loadu_ps(row.w_scale + n);
        store(out + n, row.bias == nullptr
                           ? _mm512_mul_ps(scaled, w_scale)
                           : _mm512_fmadd_ps(scaled, w_scale, _mm512_loadu_ps(row.bias + n)));
    }
    finish(row, n, out);
}
#endif

template <typename Out>
using FinishFunction = void (*)(const Row&, Out*);
using SumFunction = std::int32_t (*)(const std::int8_t*, std::int64_t);

template <typename Out>
FinishFunction<Out> choose_finish(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return finish_avx512<Out>;
    if (isa == Isa::kAvx2) return finish_avx2<Out>;
#endif
    (void)isa;
    return finish_portable<Out>;
}

SumFunction choose_sum(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::kAvx512) return sum_avx512;
    if (isa == Isa::kAvx2) return sum_avx2;
#endif
    (void)isa;
    return sum_portable;
}

struct Operands {
    const std::int8_t* a;
    std::int64_t lda;
    const float* a_scale;
    const std::uint8_t* packed;
    const float* w_scale;
    const float* bias;
    const std::int32_t* row_sums;
    std::int64_t M, N, K;
};

// Rows [begin, end) of the panel that starts at column n.
template <typename Out>
void multiply_panel(const Operands& p, std::int64_t n, std::int64_t begin, std::int64_t end,
                    Isa isa, FinishFunction<Out> finish_row, Out* out) {
    alignas(64) std::int32_t acc[w8a8::kMaxRows * kPanel];
    const int columns = static_cast<int>(std::min<std::int64_t>(kPanel, p.N - n));
    const int step = w8a8::tile_rows(isa);
    w8a8::Tile tile;
    tile.lda = p.lda;
    tile.groups = p.K / 4;
    tile.tail = static_cast<int>(p.K % 4);
    tile.b = p.packed + n * ((p.K + 3) / 4) * 4;
    tile.vectors = (columns + 15) / 16;
    tile.acc = acc;
    for (std::int64_t m = begin; m < end; m += step) {
        tile.a = p.a + m * p.lda;
        tile.rows = static_cast<int>(std::min<std::int64_t>(step, end - m));
        w8a8::choose_tile(isa, tile.rows, tile.vectors)(tile);
        for (int r = 0; r < tile.rows; ++r) {
            const Row row{acc + r * kPanel,
                          p.row_sums[m + r],
                          p.a_scale[m + r],
                          p.w_scale + n,
                          p.bias ? p.bias + n : nullptr,
                          columns};
            finish_row(row, out + (m + r) * p.N + n);
        }
    }
}

template <typename Out>
void multiply(const Operands& p, Out* out) {
    constexpr std::int64_t kWorthThreads = 1 << 18;
    constexpr std::int64_t kBlock = 192;  // rows of a task: a multiple of every tile height
    constexpr std::int64_t kSecondLevel = 512 << 10;
    const Isa chosen = isa();
    const FinishFunction<Out> finish_row = choose_finish<Out>(chosen);
    const std::int64_t panels = (p.N + kPanel - 1) / kPanel, blocks = (p.M + kBlock - 1) / kBlock;
    // A weight that fits the second-level cache meets one block of rows after the other; of a
    // larger one, each panel meets all rows before the next.
    const bool fits = p.N * p.K <= kSecondLevel;
#pragma omp parallel for schedule(dynamic) if (p.M * p.N * p.K > kWorthThreads)
    for (std::int64_t task = 0; task < panels * blocks; ++task) {
        const std::int64_t panel = fits ? task % panels : task / blocks;
        const std::int64_t block = fits ? task / panels : task % blocks;
        multiply_panel(p, panel * kPanel, block * kBlock, std::min(p.M, (block + 1) * kBlock),
                       chosen, finish_row, out);
    }
}

}  // namespace

void gemm_w8a8(const TensorView& a, const TensorView& a_scale, const TensorView& packed,
               const TensorView& w_scale, const TensorView* bias, const TensorView& row_sums,
               const TensorView& out) {
    Operands p;
    p.a = a.ptr<std::int8_t>();
    p.lda = a.stride(0);
    p.a_scale = a_scale.ptr<float>();
    p.packed = packed.ptr<std::uint8_t>();
    p.w_scale = w_scale.ptr<float>();
    p.bias = bias == nullptr ? nullptr : bias->ptr<float>();
    p.row_sums = row_sums.ptr<std::int32_t>();
    p.M = out.size(0);
    p.N = out.size(1);
    p.K = a.size(1);
    FEWSTEP_CHECK(p.K < kGemmW8A8MaxK, "a: expected K < ", kGemmW8A8MaxK, ", got ", p.K);
    FEWSTEP_CHECK(packed.numel() == (p.N + 15) / 16 * 16 * ((p.K + 3) / 4 * 4),
                  "packed: expected the packed form of a [", p.N, ", ", p.K, "] weight, got ",
                  packed.numel(), " bytes");
    if (p.M == 0 || p.N == 0) return;
    const SumFunction sum = choose_sum(isa());
#pragma omp parallel for schedule(static) if (p.M * p.K > 1 << 16)
    for (std::int64_t m = 0; m < p.M; ++m) {
        row_sums.ptr<std::int32_t>()[m] = sum(p.a + m * p.lda, p.K);
    }
    switch (out.dtype) {
        case DType::kFloat32: return multiply(p, out.ptr<float>());
        case DType::kBFloat16: return multiply(p, out.ptr<bfloat16>());
        case DType::kFloat16: return multiply(p, out.ptr<float16>());
        default:
            FEWSTEP_CHECK(false, "out: expected float32, bfloat16 or float16, got ",
                          name(out.dtype));
    }
}

}  // namespace fewstep::cpu
