// Products of rows in 8 bits on Hopper, the host's side: arguments checked, tiles chosen, launched.
#pragma once

#include <cstdlib>
#include <string>

#include "fewstep/check.h"
#include "fewstep/cuda/gemm8_sm90.cuh"
#include "fewstep/product_arguments.h"

namespace fewstep::cuda::gemm8 {

inline void expect_float(const TensorView& x, const char* argument) {
    FEWSTEP_CHECK(
        x.dtype == DType::kFloat32 || x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16,
        argument, ": expected float32, bfloat16 or float16, got ", name(x.dtype));
}

// Rows [M, K] as the copy engine takes them: 16-bit values, whose number is `columns`.
inline TensorMap map_rows(const TensorView& x, const char* argument, std::int64_t columns,
                          int box_rows, int box_columns = kBlockColumns) {
    const std::int64_t values_of_chunk = 8 * x.size(1) / columns;
    TensorView view{x.data, DType::kBFloat16, 4, {}, {}};
    view.sizes = {1, 1, x.size(0), columns};
    view.strides = {0, 0, x.stride(0) * columns / x.size(1), 1};
    FEWSTEP_CHECK(x.data % 16 == 0 && (x.size(0) <= 1 || x.stride(0) % values_of_chunk == 0),
                  argument, ": expected rows that start at multiples of 16 bytes, got stride ",
                  x.stride(0));
    FEWSTEP_CHECK(is_loadable(view), argument, ": expected rows that are not repeated");
    return make_tensor_map(view, box_rows, box_columns);
}

// A matrix of the end, and whether four of its columns are one access.
inline Rows rows_of(const TensorView* x, const char* argument, bool& in_fours) {
    if (x == nullptr) return {nullptr, DType::kFloat32, 0};
    expect_float(*x, argument);
    const std::int64_t stride = x->size(0) > 1 ? x->stride(0) : x->size(1);
    const std::uintptr_t unit = x->dtype == DType::kFloat32 ? 16 : 8;
    in_fours = in_fours && x->data % unit == 0 && stride % 4 == 0;
    return {x->ptr<void>(), x->dtype, stride};
}

struct NamedActivation {
    const char* name;
    Activation activation;
    bool is_glu;
};
inline NamedActivation find_activation(const std::string& name) {
    constexpr NamedActivation kAll[] = {
        {"", Activation::kNone, false},     {"gelu", Activation::kGelu, false},
        {"silu", Activation::kSilu, false}, {"gelu_tanh", Activation::kGeluTanh, false},
        {"geglu", Activation::kGelu, true}, {"swiglu", Activation::kSilu, true},
    };
    for (const NamedActivation& candidate : kAll) {
        if (name == candidate.name) return candidate;
    }
    FEWSTEP_CHECK(false, "activation: expected gelu, gelu_tanh, silu, geglu, swiglu or none, got ",
                  name);
    return kAll[0];
}

inline End make_end(const ProductArguments& given, int M, int N) {
    const NamedActivation activation = find_activation(given.activation);
    FEWSTEP_CHECK(!activation.is_glu || N % 2 == 0, "w: expected an even N for ", given.activation,
                  ", got ", N);
    const int width = activation.is_glu ? N / 2 : N;
    End end{};
    end.activation = activation.activation;
    end.is_glu = activation.is_glu;
    end.M = M;
    end.width = width;
    end.in_fours = width % 4 == 0;
    end.rows_of_gate = 1;
    expect_contiguous(given.out, "out", given.out.dtype, {M, width});
    end.out = rows_of(&given.out, "out", end.in_fours);
    if (given.residual != nullptr) {
        expect_rows(*given.residual, "residual", given.residual->dtype, {M, width});
    }
    end.residual = rows_of(given.residual, "residual", end.in_fours);
    if (given.gate != nullptr) {
        const std::int64_t rows = given.gate->size(0);
        expect_rows(*given.gate, "gate", given.gate->dtype, {rows, width});
        FEWSTEP_CHECK(rows > 0 && M % rows == 0, "gate: expected rows that divide ", M, ", got ",
                      rows);
        end.rows_of_gate = M / static_cast<int>(rows);
    }
    end.gate = rows_of(given.gate, "gate", end.in_fours);
    return end;
}

// Returns the blocks that share the tiles.
template <class C>
unsigned place_tiles(Params& p, int multiprocessors) {
    p.row_tiles = tiles_of(p.end.M, C::kRows);
    p.column_tiles = tiles_of(p.end.width, p.end.is_glu ? C::kN / 2 : C::kN);
    const std::int64_t tiles = std::int64_t{p.row_tiles} * p.column_tiles;
    FEWSTEP_CHECK(tiles < (std::int64_t{1} << 30), "a, w: expected fewer than 2^30 tiles, got ",
                  tiles);
    return static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
}

template <class C>
void launch(const ProductArguments& given, Params& p, int multiprocessors, cudaStream_t stream) {
    constexpr int kHalf = C::kN / 2;
    p.a = map_rows(given.a, "a", given.a.size(1) / 2, C::kRows);
    p.w = map_rows(given.w, "w", given.w.size(1) / 2, kHalf);
    if (given.low != nullptr) {
        p.low = map_rows(*given.low, "low", p.rank, C::kRows);
        p.up = map_rows(*given.up, "up", p.rank, kHalf);
    }
    const unsigned blocks = place_tiles<C>(p, multiprocessors);
    launch_kernel(gemm8_sm90_kernel<C>, "gemm8_sm90", dim3(blocks), kThreads, C::kSharedBytes,
                  stream, p);
}

// The tiling that FEWSTEP_GEMM8_TILING asks for, for measurements; -1 without it or where it
// is empty.
inline int asked_tiling() {
    const char* const text = std::getenv("FEWSTEP_GEMM8_TILING");
    if (text == nullptr || text[0] == 0) return -1;
    const int tiling = text[0] - '0';
    FEWSTEP_CHECK(tiling >= 0 && tiling < kTilings && text[1] == 0,
                  "FEWSTEP_GEMM8_TILING: expected 0 to ", kTilings - 1, ", got ", text);
    return tiling;
}

// Checks all but the weight's scales and fills what does not depend on tiles; false where there is
// nothing to do. Rows of w have `w_columns` elements of memory.
inline bool prepare(const ProductArguments& given, DType a_type, DType w_type,
                    std::int64_t w_columns, Params& p) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    const std::int64_t M = given.out.size(0), N = given.w.size(0), K = given.a.size(1);
    FEWSTEP_CHECK(given.a_scale != nullptr, "a_scale: expected one per row, got none");
    FEWSTEP_CHECK(given.smooth == nullptr && given.rotate == 0,
                  "smooth, rotate: expected rows that are quantised already, got one");
    FEWSTEP_CHECK(given.scale == nullptr, "scale: expected floating outputs, got int8 ones");
    expect_rows(given.a, "a", a_type, {M, K});
    expect_rows(given.w, "w", w_type, {N, w_columns});
    expect_contiguous(*given.a_scale, "a_scale", DType::kFloat32, {M});
    if (M == 0 || N == 0) return false;
    FEWSTEP_CHECK(K > 0 && K % 16 == 0, "a: expected a multiple of 16 columns, got ", K);
    FEWSTEP_CHECK(M < kMost && N < kMost, "a, w: expected fewer than 2^30 rows, got ", M, ", ", N);
    p.N = static_cast<int>(N);
    p.slabs = tiles_of(static_cast<int>(K), kSlab);
    p.a_scale = given.a_scale->ptr<float>();
    if (given.bias != nullptr) {
        expect_float(*given.bias, "bias");
        expect_contiguous(*given.bias, "bias", given.bias->dtype, {N});
        p.bias = given.bias->ptr<void>();
        p.bias_type = given.bias->dtype;
    }
    FEWSTEP_CHECK((given.low == nullptr) == (given.up == nullptr),
                  "low, up: expected both or none");
    if (given.low != nullptr) {
        const DType type = given.low->dtype;
        FEWSTEP_CHECK(type == DType::kBFloat16 || type == DType::kFloat16,
                      "low: expected bfloat16 or float16, got ", name(type));
        const std::int64_t R = given.low->size(1);
        expect_rows(*given.low, "low", type, {M, R});
        expect_rows(*given.up, "up", type, {N, R});
        FEWSTEP_CHECK(R > 0, "low: expected a rank above 0");
        p.low_is_half = type == DType::kFloat16;
        p.rank = static_cast<int>(R);
        p.branch_slabs = tiles_of(p.rank, kBlockColumns);
    }
    p.end = make_end(given, static_cast<int>(M), p.N);
    return true;
}

// `tiling`: one of gemm8_plan.h's, or -1 for the one that it finds best.
template <typename In>
void run(const ProductArguments& given, cudaStream_t stream, int tiling = asked_tiling()) {
    constexpr bool kIsFloat = !std::is_same_v<In, std::int8_t>;
    constexpr DType kType = kIsFloat ? DType::kUInt8 : DType::kInt8;
    expect_contiguous(given.w_scale, "w_scale", DType::kFloat32, {given.w.size(0)});
    Params p{};
    if (!prepare(given, kType, kType, given.a.size(1), p)) return;
    p.w_scale = given.w_scale.ptr<float>();
    const int multiprocessors = count_multiprocessors();
    if (tiling < 0) {
        tiling = choose_tiling(kIsFloat, p.end.M, p.N, p.slabs, multiprocessors);
    }
    switch (tiling) {
        case 0: return launch<Config<In, 0>>(given, p, multiprocessors, stream);
        case 1: return launch<Config<In, 1>>(given, p, multiprocessors, stream);
        default: return launch<Config<In, 2>>(given, p, multiprocessors, stream);
    }
}

}  // namespace fewstep::cuda::gemm8
