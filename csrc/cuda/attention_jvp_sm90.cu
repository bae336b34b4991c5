// attention_jvp on Hopper, the host's side: which kernel, and what it is told.
// The kernels: csrc/include/fewstep/cuda/attention_jvp_sm90.cuh, attention_jvp_wide_sm90.cuh,
// attention_jvp_scores8_sm90.cuh.
#include <algorithm>
#include <type_traits>

#include "fewstep/check.h"
#include "fewstep/cuda/attention_jvp_scores8_sm90.cuh"
#include "fewstep/cuda/attention_jvp_wide_sm90.cuh"
#include "fewstep/ops/attention_jvp.h"

namespace fewstep::cuda {
namespace {

using namespace attention_jvp_kernel;

template <class C>
void launch(const Params& p, int batches, cudaStream_t stream) {
    launch_kernel(attention_jvp_sm90_kernel<C>, "attention_jvp_sm90", p.grid.blocks(batches),
                  kThreads, C::kSharedBytes, stream, p);
}

template <typename T, int kD, Masking kMasking>
void launch_wide(const Launch& how, const Params& p, cudaStream_t stream) {
    const auto with = [&](auto is_static) {
        using C = WideConfig<T, kD, decltype(is_static)::value, kMasking>;
        launch_kernel(attention_jvp_wide_sm90_kernel<C>, "attention_jvp_wide_sm90",
                      p.grid.blocks(how.batches), kThreads, C::kSharedBytes, stream, p);
    };
    if (how.is_static) return with(std::true_type{});
    with(std::false_type{});
}

// Calls f with the one of kDims that `width` is, as a type.
template <int... kDims, typename F>
void dispatch_width(int width, F&& f) {
    ((width == kDims ? f(std::integral_constant<int, kDims>{}) : void()), ...);
}

template <typename T>
void launch(const Launch& how, const Params& p, cudaStream_t stream) {
    const auto with = [&](auto width, auto masking) {
        constexpr int kD = decltype(width)::value;
        constexpr Masking kMasking = decltype(masking)::value;
        if (how.is_static) {
            launch<Config<T, kD, true, kMasking>>(p, how.batches, stream);
        } else {
            launch<Config<T, kD, false, kMasking>>(p, how.batches, stream);
        }
    };
    if (how.width > kMostColumns) {
        if (how.masking == Masking::kAdditive) {
            return launch_wide<T, 256, Masking::kAdditive>(how, p, stream);
        }
        if (how.width == 160) return launch_wide<T, 160, Masking::kPairs>(how, p, stream);
        return launch_wide<T, 256, Masking::kPairs>(how, p, stream);
    }
    switch (how.masking) {
        case Masking::kNone:
            return dispatch_width<48, 64, 80, 96, 112, 128>(how.width, [&](auto width) {
                with(width, std::integral_constant<Masking, Masking::kNone>{});
            });
        case Masking::kPairs:
            return dispatch_width<64, 128>(how.width, [&](auto width) {
                with(width, std::integral_constant<Masking, Masking::kPairs>{});
            });
        case Masking::kAdditive:
            return dispatch_width<64, 128>(how.width, [&](auto width) {
                with(width, std::integral_constant<Masking, Masking::kAdditive>{});
            });
    }
}

// The operands in 8 bits, then the kernel.
template <typename T, typename Format, int kW>
void launch8(const Launch& how, const Scores8Params& p, const QuantizeParams& operands,
             cudaStream_t stream) {
    const int blocks =
        operands.query_blocks + how.batches * operands.keys.heads * operands.keys.tiles;
    launch_kernel(attention_jvp_centres_kernel<T, kW>, "attention_jvp_centres",
                  dim3(how.batches * operands.keys.heads), kW, 0, stream, operands);
    launch_kernel(attention_jvp_sizes_kernel<T, kW>, "attention_jvp_sizes", dim3(blocks),
                  kQuantizeThreads, 0, stream, operands);
    launch_kernel(attention_jvp_rows_kernel<T, Format, kW>, "attention_jvp_rows", dim3(blocks),
                  kQuantizeThreads, 0, stream, operands);
    const auto with = [&](auto is_static, auto masked) {
        using C = Config8<T, Format, kW, decltype(is_static)::value, decltype(masked)::value>;
        launch_kernel(attention_jvp_scores8_sm90_kernel<C>, "attention_jvp_scores8_sm90",
                      p.grid.blocks(how.batches), kThreads, C::kSharedBytes, stream, p);
    };
    const auto with_static = [&](auto masked) {
        how.is_static ? with(std::true_type{}, masked) : with(std::false_type{}, masked);
    };
    how.masking == Masking::kPairs ? with_static(std::true_type{}) : with_static(std::false_type{});
}

template <typename T>
void launch8(const Launch& how, const Scores8Params& p, const QuantizeParams& operands,
             bool integers, cudaStream_t stream) {
    dispatch_width<64, 128>(how.width, [&](auto width) {
        constexpr int kW = decltype(width)::value;
        if (integers) {
            launch8<T, std::int8_t, kW>(how, p, operands, stream);
        } else {
            launch8<T, Float8, kW>(how, p, operands, stream);
        }
    });
}

// Bytes [B, H, N, C] as half as many 16-bit values, for the copy engine, which moves bits.
TensorView as_halves(const TensorView& x) {
    TensorView view = x;
    view.dtype = DType::kBFloat16;
    view.sizes[3] /= 2;
    for (int axis = 0; axis < 3; ++axis) view.strides[axis] /= 2;
    return view;
}

// Lays out the memory for 8-bit scores; `p` gets what the kernel reads of it.
QuantizeParams plan_operands(const TensorView& q, const TensorView& t_q, const TensorView& k,
                             const TensorView* t_k, const TensorView& q8, const TensorView& k8,
                             const TensorView& rows8, int width, Scores8Params& p) {
    const std::int64_t B = q.size(0), H = q.size(1), Nq = q.size(2), G = k.size(1), Nk = k.size(2);
    FEWSTEP_CHECK(q8.dtype == DType::kInt8 || q8.dtype == DType::kUInt8,
                  "q8: expected int8 or uint8, got ", name(q8.dtype));
    expect_contiguous(q8, "q8", q8.dtype, {B, H, Nq, 2 * width});
    expect_contiguous(k8, "k8", q8.dtype, {B, G, Nk, (t_k == nullptr ? 1 : 2) * width});
    const std::int64_t rows = B * H * Nq;
    expect_contiguous(rows8, "rows8", DType::kFloat32, {3 * rows + B * G * (Nk + 2 * width + 4)});
    float* const scales = rows8.ptr<float>();
    QuantizeParams operands{};
    const auto side = [&](Side& s, const TensorView& x, const TensorView* t_x,
                          const TensorView& bytes, float* scale) {
        s.x = x.ptr<void>();
        s.strides = Strides::of(x, 0);
        if (t_x != nullptr) {
            s.t_x = t_x->ptr<void>();
            s.t_strides = Strides::of(*t_x, 0);
        }
        s.bytes = bytes.ptr<std::uint8_t>();
        s.scales = scale;
        s.heads = static_cast<int>(x.size(1));
        s.rows = static_cast<int>(x.size(2));
        s.tiles = (s.rows + kQuantizeRows - 1) / kQuantizeRows;
    };
    side(operands.queries, q, &t_q, q8, scales);
    side(operands.keys, k, t_k, k8, scales + 3 * rows);
    operands.queries.shift = scales + rows;
    operands.queries.t_shift = scales + 2 * rows;
    operands.centres = scales + 3 * rows + B * G * Nk;
    operands.largest = operands.centres + B * G * 2 * width;
    operands.head_dim = static_cast<int>(q.size(3));
    const std::int64_t query_blocks = B * H * operands.queries.tiles;
    FEWSTEP_CHECK(query_blocks + B * G * operands.keys.tiles < (std::int64_t{1} << 31),
                  "q, k: expected fewer than 2^31 tiles of rows");
    operands.query_blocks = static_cast<int>(query_blocks);
    p.q_scales = operands.queries.scales;
    p.shift = operands.queries.shift;
    p.t_shift = operands.queries.t_shift;
    p.k_scales = operands.keys.scales;
    p.largest = operands.largest;
    return operands;
}

// One direction of a tangent [1, B, H, N, D], as its primal is.
TensorView direction(const TensorView& x) {
    FEWSTEP_CHECK(x.ndim == 5 && x.size(0) == 1, "tangents: expected one direction, got ",
                  x.ndim == 5 ? x.size(0) : 0);
    TensorView view = x;
    view.ndim = 4;
    for (int axis = 0; axis < 4; ++axis) {
        view.sizes[axis] = x.size(axis + 1);
        view.strides[axis] = x.stride(axis + 1);
    }
    return view;
}

}  // namespace

void attention_jvp_sm90(const TensorView& q, const TensorView& k, const TensorView& v,
                        const TensorView* t_q, const TensorView* t_k, const TensorView* t_v,
                        const TensorView* attn_mask, const TensorView* t_attn_mask,
                        const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k,
                        bool is_causal, const TensorView& o, const TensorView& t_o,
                        const TensorView& lse, const TensorView& mu, const TensorView* lse_rest,
                        const TensorView* q8, const TensorView* k8, const TensorView* rows8,
                        double scale, std::uintptr_t stream) {
    const std::int64_t B = q.size(0), H = q.size(1), Nq = q.size(2), D = q.size(3);
    const std::int64_t G = k.size(1), Nk = k.size(2), Dv = v.size(3);
    if (B * H * Nq == 0) return;
    FEWSTEP_CHECK(q.dtype == DType::kBFloat16 || q.dtype == DType::kFloat16,
                  "q: expected bfloat16 or float16, got ", name(q.dtype));
    FEWSTEP_CHECK(t_q != nullptr, "t_q: expected a tangent, got none");
    FEWSTEP_CHECK((t_k == nullptr) == (t_v == nullptr), "t_k, t_v: expected both or none");
    FEWSTEP_CHECK(G > 0 && H % G == 0, "k: expected heads that divide ", H, ", got ", G);
    const TensorView tangent_q = direction(*t_q), tangent_o = direction(t_o);
    expect_loadable(q, "q", q.dtype, {B, H, Nq, D});
    expect_loadable(k, "k", q.dtype, {B, G, Nk, D});
    expect_loadable(v, "v", q.dtype, {B, G, Nk, Dv});
    expect_loadable(tangent_q, "t_q", q.dtype, {B, H, Nq, D});
    expect_loadable(o, "o", q.dtype, {B, H, Nq, Dv});
    expect_loadable(tangent_o, "t_o", q.dtype, {B, H, Nq, Dv});
    expect_contiguous(lse, "lse", DType::kFloat32, {B, H, Nq});
    expect_contiguous(mu, "mu", DType::kFloat32, {1, B, H, Nq});
    if (lse_rest != nullptr) expect_contiguous(*lse_rest, "lse_rest", DType::kFloat32, {B, H, Nq});
    const bool mask_is_bool = attn_mask != nullptr && attn_mask->dtype == DType::kBool;
    if (attn_mask != nullptr) {
        expect_shape(*attn_mask, "attn_mask", mask_is_bool ? DType::kBool : q.dtype,
                     {B, H, Nq, Nk});
    }
    if (t_attn_mask != nullptr) {
        expect_shape(*t_attn_mask, "t_attn_mask", q.dtype, {1, B, H, Nq, Nk});
    }
    const std::int64_t sequences = count_sequences(cu_seqlens_q, cu_seqlens_k, attn_mask, B);

    Scores8Params p{};
    p.scale = static_cast<float>(scale);
    const int columns = static_cast<int>(std::max(D, Dv));
    const bool wide = columns > kMostColumns;
    const int rows = wide ? kGroupRows : kRows;  // of a block of threads
    p.grid = Grid::of(Nq, sequences, H, rows);
    Launch how{};
    how.is_static = t_k == nullptr;
    how.batches = static_cast<int>(B);
    p.sequences = static_cast<int>(sequences);
    const bool additive = (attn_mask != nullptr && !mask_is_bool) || t_attn_mask != nullptr;
    const bool pairs = is_causal || cu_seqlens_q != nullptr || mask_is_bool;
    how.masking = additive || p.scale <= 0 ? Masking::kAdditive
                  : pairs || wide          ? Masking::kPairs
                                           : Masking::kNone;
    const bool bytes = q8 != nullptr;
    FEWSTEP_CHECK(bytes == (k8 != nullptr) && bytes == (rows8 != nullptr),
                  "q8, k8, rows8: expected all or none");
    FEWSTEP_CHECK(!bytes || how.masking != Masking::kAdditive,
                  "q8: expected no additive mask and a scale above 0 beside 8-bit scores");
    FEWSTEP_CHECK(!bytes || !wide, "q8: expected head dims up to ", kMostColumns, ", got ",
                  columns);
    // Of 8-bit scores the same two as with masks.
    how.width = wide ? wide_width(how.masking, columns)
                     : padded_width(bytes ? Masking::kPairs : how.masking, columns);
    TensorView tangent_k = k, tangent_v = v;
    if (t_k != nullptr) {
        tangent_k = direction(*t_k);
        tangent_v = direction(*t_v);
        expect_loadable(tangent_k, "t_k", q.dtype, {B, G, Nk, D});
        expect_loadable(tangent_v, "t_v", q.dtype, {B, G, Nk, Dv});
    }
    if (Nk > 0) {  // else nothing is loaded
        const int keys = wide    ? kWideKeys
                         : bytes ? keys_of_tile8(how.width)
                                 : keys_of_tile(how.masking, how.width, how.is_static);
        p.q = make_tensor_map(bytes ? as_halves(*q8) : q, rows);
        p.t_q = make_tensor_map(tangent_q, rows);
        p.k = make_tensor_map(bytes ? as_halves(*k8) : k, keys);
        p.v = make_tensor_map(v, keys);
        p.t_k = make_tensor_map(tangent_k, keys);
        p.t_v = make_tensor_map(tangent_v, keys);
    }
    p.o = o.ptr<void>();
    p.t_o = tangent_o.ptr<void>();
    p.o_strides = Strides::of(o, 0);
    p.t_o_strides = Strides::of(tangent_o, 0);
    p.lse = lse.ptr<float>();
    p.mu = mu.ptr<float>();
    p.lse_rest = lse_rest == nullptr ? nullptr : lse_rest->ptr<float>();
    if (attn_mask != nullptr) p.mask = {attn_mask->ptr<void>(), Strides::of(*attn_mask, 0)};
    if (t_attn_mask != nullptr) p.t_mask = {t_attn_mask->ptr<void>(), Strides::of(*t_attn_mask, 1)};
    p.cu_q = cu_seqlens_q == nullptr ? nullptr : cu_seqlens_q->ptr<std::int32_t>();
    p.cu_k = cu_seqlens_k == nullptr ? nullptr : cu_seqlens_k->ptr<std::int32_t>();
    p.mask_is_bool = mask_is_bool;
    p.is_causal = is_causal;
    p.heads = static_cast<int>(H);
    p.group = static_cast<int>(H / G);
    p.nq = static_cast<int>(Nq);
    p.nk = static_cast<int>(Nk);
    p.dv = static_cast<int>(Dv);
    if (bytes && Nk > 0) {
        const bool integers = q8->dtype == DType::kInt8;
        const QuantizeParams operands = plan_operands(
            q, tangent_q, k, how.is_static ? nullptr : &tangent_k, *q8, *k8, *rows8, how.width, p);
        if (q.dtype == DType::kBFloat16) {
            launch8<__nv_bfloat16>(how, p, operands, integers, as_stream(stream));
        } else {
            launch8<__half>(how, p, operands, integers, as_stream(stream));
        }
    } else if (q.dtype == DType::kBFloat16) {
        launch<__nv_bfloat16>(how, p, as_stream(stream));
    } else {
        launch<__half>(how, p, as_stream(stream));
    }
}

}  // namespace fewstep::cuda
