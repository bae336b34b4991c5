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

// What outputs of 8 bits have beside a product's arguments, whose `scale` theirs is.
struct Limits {
    const TensorView& limit;
    const TensorView& amax;
    const TensorView& exceeded;
};

inline Requantized make_requantized(const ProductArguments& given, const Limits& limits,
                                    std::int64_t M) {
    FEWSTEP_CHECK(given.scale != nullptr, "scale: expected one with limits, got none");
    expect_contiguous(limits.limit, "limit", DType::kFloat32, {M});
    expect_contiguous(*given.scale, "scale", DType::kFloat32, {M});
    expect_contiguous(limits.amax, "amax", DType::kFloat32, {M});
    expect_contiguous(limits.exceeded, "exceeded", DType::kInt32, {1});
    return {limits.limit.ptr<float>(), given.scale->ptr<std::uint32_t>(),
            limits.amax.ptr<std::uint32_t>(), limits.exceeded.ptr<std::uint32_t>()};
}

// Zeroes all but the limits: at once where one follows the other in memory, as the ops have them.
inline void clear_found(const ProductArguments& given, const Limits& limits, cudaStream_t stream) {
    const std::uintptr_t bytes = 4 * given.scale->numel();
    if (limits.amax.data == given.scale->data + bytes &&
        limits.exceeded.data == limits.amax.data + bytes) {
        return clear(given.scale->ptr<void>(), 2 * bytes + 4, stream);
    }
    for (const TensorView* const x : {given.scale, &limits.amax, &limits.exceeded}) {
        clear(x->ptr<void>(), static_cast<std::size_t>(4 * x->numel()), stream);
    }
}

inline End make_end(const ProductArguments& given, bool is_floating, DType bytes, int M, int N) {
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
    if (is_floating) {
        expect_contiguous(given.out, "out", given.out.dtype, {M, width});
        end.out = rows_of(&given.out, "out", end.in_fours);
    } else {
        expect_contiguous(given.out, "out", bytes, {M, width});
        end.in_fours = end.in_fours && given.out.data % 4 == 0;
        end.out = {given.out.ptr<void>(), bytes, width};
    }
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

// Returns their number.
template <class C>
std::int64_t place_tiles(Params& p) {
    p.row_tiles = tiles_of(p.end.M, C::kRows);
    p.column_tiles = tiles_of(p.end.width, p.end.is_glu ? C::kN / 2 : C::kN);
    return std::int64_t{p.row_tiles} * p.column_tiles;
}

// That share the tiles.
inline unsigned count_blocks(std::int64_t tiles, int multiprocessors) {
    FEWSTEP_CHECK(tiles < (std::int64_t{1} << 30), "a, w: expected fewer than 2^30 tiles, got ",
                  tiles);
    return static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
}

// What depends on the tiling; returns the number of tiles.
template <class C>
std::int64_t set_tiles(const ProductArguments& given, Params& p) {
    constexpr int kHalf = C::kN / 2;
    p.a = map_rows(given.a, "a", given.a.size(1) / 2, C::kRows);
    p.w = map_rows(given.w, "w", given.w.size(1) / 2, kHalf);
    if (given.low != nullptr) {
        p.low = map_rows(*given.low, "low", p.rank, C::kRows);
        p.up = map_rows(*given.up, "up", p.rank, kHalf);
    }
    return place_tiles<C>(p);
}

template <class C>
void launch(const typename C::Given& given, std::int64_t tiles, int multiprocessors,
            cudaStream_t stream) {
    const unsigned blocks = count_blocks(tiles, multiprocessors);
    launch_kernel(gemm8_sm90_kernel<C>, "gemm8_sm90", dim3(blocks), kThreads, C::kSharedBytes,
                  stream, given);
}

// The tiling that FEWSTEP_GEMM8_TILING asks for, for measurements; -1 without it or where it
// is empty. It holds for all products of 8-bit rows: gemm_w4a8's, of gemm4_plan.h, too.
inline int asked_tiling() {
    const char* const text = std::getenv("FEWSTEP_GEMM8_TILING");
    if (text == nullptr || text[0] == 0) return -1;
    const int tiling = text[0] - '0';
    FEWSTEP_CHECK(tiling >= 0 && tiling < kTilings && text[1] == 0,
                  "FEWSTEP_GEMM8_TILING: expected 0 to ", kTilings - 1, ", got ", text);
    return tiling;
}

// Checks all but the weight's scales and fills what does not depend on tiles; false where there is
// nothing to do. Rows of w have `w_columns` elements of memory. With limits outputs are of 8 bits.
inline bool prepare(const ProductArguments& given, DType a_type, DType w_type,
                    std::int64_t w_columns, Params& p, const Limits* limits = nullptr) {
    constexpr std::int64_t kMost = std::int64_t{1} << 30;
    const std::int64_t M = given.out.size(0), N = given.w.size(0), K = given.a.size(1);
    FEWSTEP_CHECK(given.a_scale != nullptr, "a_scale: expected one per row, got none");
    FEWSTEP_CHECK(given.smooth == nullptr && given.rotate == 0,
                  "smooth, rotate: expected rows that are quantised already, got one");
    FEWSTEP_CHECK(limits != nullptr || given.scale == nullptr,
                  "scale: expected floating outputs, got int8 ones");
    expect_rows(given.a, "a", a_type, {M, K});
    expect_rows(given.w, "w", w_type, {N, w_columns});
    expect_contiguous(*given.a_scale, "a_scale", DType::kFloat32, {M});
    Requantized requantized{};
    if (limits != nullptr) requantized = make_requantized(given, *limits, M);
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
    p.end = make_end(given, limits == nullptr, a_type, static_cast<int>(M), p.N);
    p.end.requantized = requantized;
    return true;
}

// Checks a product of 8-bit rows and weights; as `prepare`.
template <typename In>
bool fill_params(const ProductArguments& given, const Limits* limits, Params& p) {
    constexpr DType kType = std::is_same_v<In, std::int8_t> ? DType::kInt8 : DType::kUInt8;
    expect_contiguous(given.w_scale, "w_scale", DType::kFloat32, {given.w.size(0)});
    p = {};
    p.w_scale = given.w_scale.ptr<float>();
    return prepare(given, kType, kType, given.a.size(1), p, limits);
}

// Calls f(Config) of a tiling: `given`, or where it is -1 the one that gemm8_plan.h finds best for
// products of M[i] rows.
template <typename In, typename Given, bool kRequantizes, typename F>
void with_tiling(int given, const int* M, int problems, int N, int slabs, int multiprocessors,
                 const F& f) {
    constexpr bool kIsFloat = !std::is_same_v<In, std::int8_t>;
    if (given < 0) given = choose_tiling(kIsFloat, M, problems, N, slabs, multiprocessors);
    switch (given) {
        case 0: return f(static_cast<Config<In, 0, Given, kRequantizes>*>(nullptr));
        case 1: return f(static_cast<Config<In, 1, Given, kRequantizes>*>(nullptr));
        default: return f(static_cast<Config<In, 2, Given, kRequantizes>*>(nullptr));
    }
}

// `tiling`: one of gemm8_plan.h's, or -1.
template <typename In>
void run(const ProductArguments& given, cudaStream_t stream, int tiling = asked_tiling()) {
    Params p;
    if (!fill_params<In>(given, nullptr, p)) return;
    const int multiprocessors = count_multiprocessors();
    const auto go = [&](auto* config) {
        using C = std::remove_pointer_t<decltype(config)>;
        const std::int64_t tiles = set_tiles<C>(given, p);
        launch<C>(p, tiles, multiprocessors, stream);
    };
    with_tiling<In, Params, false>(tiling, &p.end.M, 1, p.N, p.slabs, multiprocessors, go);
}

}  // namespace fewstep::cuda::gemm8
