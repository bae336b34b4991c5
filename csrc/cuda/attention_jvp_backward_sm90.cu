// attention_jvp_backward on Hopper, the host's side: the passes and what they are told.
// The kernels: csrc/include/fewstep/cuda/attention_jvp_backward_sm90.cuh.
#include <algorithm>
#include <vector>

#include "fewstep/check.h"
#include "fewstep/cuda/attention_jvp_backward_sm90.cuh"
#include "fewstep/ops/attention_jvp_backward.h"

namespace fewstep::cuda {
namespace {

using namespace attention_jvp_backward_kernel;

template <class C>
void launch_config(const Launch& how, const Params& p, cudaStream_t stream) {
    launch_kernel(attention_jvp_backward_sm90_kernel<C>, "attention_jvp_backward_sm90",
                  p.grid.blocks(how.batches), kThreads, C::kSharedBytes, stream, p);
}

template <typename T, int kD, Pass kPass, bool kFused, bool kStatic>
void launch_masked(const Launch& how, const Params& p, cudaStream_t stream) {
    if (how.masked)
        return launch_config<Config<T, kD, kPass, true, kFused, kStatic>>(how, p, stream);
    launch_config<Config<T, kD, kPass, false, kFused, kStatic>>(how, p, stream);
}

template <typename T, int kD, Pass kPass>
void launch_pass(const Launch& how, const Params& p, cudaStream_t stream) {
    if (how.is_static) return launch_masked<T, kD, kPass, false, true>(how, p, stream);
    if constexpr (kPass == Pass::kBoth || kPass == Pass::kKeys) {
        if (how.fused) return launch_masked<T, kD, kPass, true, false>(how, p, stream);
    }
    launch_masked<T, kD, kPass, false, false>(how, p, stream);
}

template <typename T>
void launch(const Launch& how, const Params& p, cudaStream_t stream) {
    const bool narrow = how.width == 64;
    switch (how.pass) {
        case Pass::kQueries:
            if (narrow) return launch_pass<T, 64, Pass::kQueries>(how, p, stream);
            return launch_pass<T, 128, Pass::kQueries>(how, p, stream);
        case Pass::kKeys: return launch_pass<T, 128, Pass::kKeys>(how, p, stream);
        case Pass::kValues: return launch_pass<T, 128, Pass::kValues>(how, p, stream);
        case Pass::kBoth: return launch_pass<T, 64, Pass::kBoth>(how, p, stream);
    }
}

template <typename T>
void round_query_gradients(const RoundParams& p, int batches, cudaStream_t stream) {
    launch_kernel(round_query_gradients_kernel<T>, "attention_jvp_backward_sm90 (rounding)",
                  p.grid.blocks(batches), kGroupThreads, 0, stream, p);
}

Gradient gradient(const TensorView* x) {
    if (x == nullptr) return {};
    return {x->ptr<void>(), Strides::of(*x, 0), static_cast<int>(x->size(3))};
}

// Checks that the workspace holds the tiles of every head.
QuerySums sums_of(const TensorView& x, std::int64_t B, std::int64_t H, std::int64_t rows,
                  std::int64_t sequences, int tile, int width) {
    const std::int64_t tiles = sequences == 0 ? (rows + tile - 1) / tile : rows / tile + sequences;
    FEWSTEP_CHECK(x.ndim == 5 && x.size(3) >= tiles * tile, "query_sums: expected at least ",
                  tiles * tile, " rows of each head");
    expect_contiguous(x, "query_sums", DType::kFloat32, {2, B, H, x.size(3), width});
    return {x.ptr<float>(), x.stride(0), x.stride(2)};
}

}  // namespace

void attention_jvp_backward_sm90(
    const TensorView* d_o, const TensorView* dt_o, const TensorView* delta0,
    const TensorView& delta1, const TensorView& q, const TensorView& k, const TensorView& v,
    const TensorView* t_q, const TensorView* t_k, const TensorView* t_v, const TensorView& lse,
    const TensorView* mu, const TensorView* lse_rest, const TensorView* attn_mask,
    const TensorView* t_attn_mask, const TensorView* cu_seqlens_q, const TensorView* cu_seqlens_k,
    bool is_causal, const TensorView* d_q, const TensorView* d_k, const TensorView* d_v,
    const TensorView* dt_q, const TensorView* dt_k, const TensorView* dt_v,
    const TensorView* query_sums, double scale, std::uintptr_t stream) {
    const std::int64_t B = q.size(0), H = q.size(1), Nq = q.size(2), D = q.size(3);
    const std::int64_t G = k.size(1), Nk = k.size(2), Dv = v.size(3);
    FEWSTEP_CHECK(q.dtype == DType::kBFloat16 || q.dtype == DType::kFloat16,
                  "q: expected bfloat16 or float16, got ", name(q.dtype));
    FEWSTEP_CHECK(std::max(D, Dv) <= 128, "q, v: expected head dims up to 128, got ",
                  std::max(D, Dv));
    FEWSTEP_CHECK(d_o != nullptr && dt_o != nullptr && delta0 != nullptr && mu != nullptr,
                  "d_o, dt_o, delta0, mu: expected all of them");
    FEWSTEP_CHECK(t_q != nullptr && (t_k == nullptr) == (t_v == nullptr),
                  "t_q, t_k, t_v: expected t_q, and both or none of t_k and t_v");
    const bool additive = attn_mask != nullptr && attn_mask->dtype != DType::kBool;
    FEWSTEP_CHECK(additive || (lse_rest == nullptr && t_attn_mask == nullptr),
                  "lse_rest, t_attn_mask: expected none, they go with an additive mask");
    FEWSTEP_CHECK(!additive || t_k == nullptr,
                  "attn_mask: expected a boolean one where t_k and t_v are given");
    if (B * H * G == 0) return;
    FEWSTEP_CHECK(H % G == 0, "k: expected heads that divide ", H, ", got ", G);
    struct Expected {
        const TensorView* x;
        const char* name;
        std::int64_t heads, rows, columns;
    };
    for (const Expected& e :
         {Expected{&q, "q", H, Nq, D}, Expected{&k, "k", G, Nk, D}, Expected{&v, "v", G, Nk, Dv},
          Expected{t_q, "t_q", H, Nq, D}, Expected{t_k, "t_k", G, Nk, D},
          Expected{t_v, "t_v", G, Nk, Dv}, Expected{d_o, "d_o", H, Nq, Dv},
          Expected{dt_o, "dt_o", H, Nq, Dv}, Expected{d_q, "d_q", H, Nq, D},
          Expected{d_k, "d_k", G, Nk, D}, Expected{d_v, "d_v", G, Nk, Dv},
          Expected{dt_q, "dt_q", H, Nq, D}, Expected{dt_k, "dt_k", G, Nk, D},
          Expected{dt_v, "dt_v", G, Nk, Dv}}) {
        if (e.x != nullptr) {
            expect_loadable(*e.x, e.name, q.dtype, {B, e.heads, e.rows, e.columns});
        }
    }
    expect_contiguous(lse, "lse", DType::kFloat32, {B, H, Nq});
    expect_contiguous(*mu, "mu", DType::kFloat32, {B, H, Nq});
    expect_contiguous(*delta0, "delta0", DType::kFloat32, {B, H, Nq});
    expect_contiguous(delta1, "delta1", DType::kFloat32, {B, H, Nq});
    if (attn_mask != nullptr) {
        expect_shape(*attn_mask, "attn_mask", additive ? q.dtype : DType::kBool, {B, H, Nq, Nk});
    }
    if (t_attn_mask != nullptr) {
        expect_shape(*t_attn_mask, "t_attn_mask", q.dtype, {B, H, Nq, Nk});
    }
    if (lse_rest != nullptr) {
        expect_contiguous(*lse_rest, "lse_rest", DType::kFloat32, {B, H, Nq});
    }
    const std::int64_t sequences = count_sequences(cu_seqlens_q, cu_seqlens_k, attn_mask, B);

    Params p{};
    p.lse = lse.ptr<float>();
    p.mu = mu->ptr<float>();
    p.delta0 = delta0->ptr<float>();
    p.delta1 = delta1.ptr<float>();
    p.lse_rest = lse_rest == nullptr ? nullptr : lse_rest->ptr<float>();
    if (attn_mask != nullptr) p.mask = {attn_mask->ptr<void>(), Strides::of(*attn_mask, 0)};
    if (t_attn_mask != nullptr) {
        p.t_mask = {t_attn_mask->ptr<void>(), Strides::of(*t_attn_mask, 0)};
    }
    p.mask_is_bool = attn_mask != nullptr && !additive;
    p.cu_q = cu_seqlens_q == nullptr ? nullptr : cu_seqlens_q->ptr<std::int32_t>();
    p.cu_k = cu_seqlens_k == nullptr ? nullptr : cu_seqlens_k->ptr<std::int32_t>();
    p.is_causal = is_causal;
    p.heads = static_cast<int>(H);
    p.group = static_cast<int>(H / G);
    p.nq = static_cast<int>(Nq);
    p.nk = static_cast<int>(Nk);
    p.scale = static_cast<float>(scale);
    Launch how{};
    how.width = std::max(D, Dv) <= 64 ? 64 : 128;
    how.masked = is_causal || attn_mask != nullptr || cu_seqlens_q != nullptr;
    how.batches = static_cast<int>(B);
    p.sequences = static_cast<int>(sequences);

    // The table at the top of the kernels' header.
    using Views = std::vector<const TensorView*>;
    struct Plan {
        Pass pass;
        Views owned, streamed, sums;
    };
    const Views keys = {&k, t_k, &v, t_v}, outputs_first = {dt_o, d_o, &q, t_q};
    how.is_static = t_k == nullptr;
    const Plan for_queries = {
        Pass::kQueries, {&q, t_q, dt_o, d_o}, {&v, t_v, &k, t_k}, {dt_q, d_q}};
    std::vector<Plan> plans;
    if (how.width == 64) {
        plans.push_back({Pass::kBoth, keys, outputs_first, {dt_k, d_k, dt_v, d_v}});
    } else {
        plans.push_back({Pass::kKeys, keys, outputs_first, {dt_k, d_k}});
        plans.push_back({Pass::kValues, {&k, t_k}, {&q, t_q, dt_o, d_o}, {dt_v, d_v}});
    }
    const auto wanted = [](const Plan& plan) {
        return std::any_of(plan.sums.begin(), plan.sums.end(),
                           [](const TensorView* x) { return x != nullptr && x->numel() > 0; });
    };
    // The first of the keys' passes has dS0 and dS1; if it runs anyway it can serve the queries.
    const bool fused =
        query_sums != nullptr && !how.is_static && wanted(for_queries) && wanted(plans[0]);
    if (fused) {
        p.queries = sums_of(*query_sums, B, H, Nq, sequences,
                            tile_rows(plans[0].pass, how.width, false), how.width);
    } else {
        plans.push_back(for_queries);
    }
    for (const Plan& plan : plans) {
        if (!wanted(plan)) continue;
        const bool queries = plan.pass == Pass::kQueries;
        const std::int64_t rows = queries ? Nq : Nk, heads = queries ? H : G;
        std::transform(plan.sums.begin(), plan.sums.end(), p.sums, gradient);
        how.pass = plan.pass;
        how.fused = fused && &plan == &plans[0];
        p.grid = Grid::of(rows, sequences, heads);
        if (Nq > 0 && Nk > 0) {  // else nothing is loaded
            const auto describe = [](const Views& views, TensorMap* maps, int rows) {
                for (const TensorView* view : views) {
                    if (view != nullptr) *maps++ = make_tensor_map(*view, rows);
                }
            };
            describe(plan.owned, p.owned, kRows);
            describe(plan.streamed, p.streamed,
                     tile_rows(plan.pass, how.width, how.is_static && how.masked));
        }
        if (q.dtype == DType::kBFloat16) {
            launch<__nv_bfloat16>(how, p, as_stream(stream));
        } else {
            launch<__half>(how, p, as_stream(stream));
        }
    }
    if (!fused) return;
    RoundParams round{};
    round.queries = p.queries;
    round.to[0] = gradient(dt_q);
    round.to[1] = gradient(d_q);
    round.cu_q = p.cu_q;
    round.grid = Grid::of(Nq, sequences, H);
    round.nq = p.nq;
    round.sequences = p.sequences;
    round.tile = tile_rows(plans[0].pass, how.width, false);
    round.width = how.width;
    round.scale = p.scale;
    if (q.dtype == DType::kBFloat16) {
        round_query_gradients<__nv_bfloat16>(round, how.batches, as_stream(stream));
    } else {
        round_query_gradients<__half>(round, how.batches, as_stream(stream));
    }
}

}  // namespace fewstep::cuda
