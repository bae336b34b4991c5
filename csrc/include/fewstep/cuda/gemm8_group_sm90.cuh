// Several products of rows in 8 bits in one launch, the host's side: layers of one width for the
// streams of a model, such as FLUX.1's image and text. Each keeps its own rows, weight, scales,
// branch and end; N, K and the activation are those of all, and so is whether outputs are floating.
// Where gemm8_plan.h finds that it would take longer, and no tiling is asked for, they are launched
// one by one.
#pragma once

#include <vector>

#include "fewstep/cuda/gemm8_launch_sm90.cuh"

namespace fewstep::cuda::gemm8 {

template <typename In, bool kRequantizes>
void run_group(const std::vector<ProductArguments>& given, const std::vector<Limits>& limits,
               cudaStream_t stream, int tiling) {
    GroupParams group{};
    const ProductArguments* filled[kMostProblems];
    int M[kMostProblems], count = 0;
    for (std::size_t i = 0; i < given.size(); ++i) {
        const Limits* const own = kRequantizes ? &limits[i] : nullptr;
        FEWSTEP_CHECK(given[i].w.size(0) == given[0].w.size(0) &&
                          given[i].a.size(1) == given[0].a.size(1) &&
                          given[i].activation == given[0].activation,
                      "w: expected one N, one K and one activation for all products");
        Params p;
        if (!fill_params<In>(given[i], own, p)) continue;
        FEWSTEP_CHECK(count < kMostProblems, "a: expected at most ", kMostProblems,
                      " products, got ", given.size());
        M[count] = p.end.M;
        filled[count] = &given[i];
        group.problems[count++] = p;
    }
    const int multiprocessors = count_multiprocessors();
    const Params& first = group.problems[0];
    if (count > 0 && tiling < 0 &&
        !grouping_pays(!std::is_same_v<In, std::int8_t>, M, count, first.N, first.slabs,
                       multiprocessors)) {
        for (std::size_t i = 0; i < given.size(); ++i) {
            const std::vector<Limits> own(limits.begin() + (kRequantizes ? i : 0),
                                          limits.begin() + (kRequantizes ? i + 1 : 0));
            run_group<In, kRequantizes>({given[i]}, own, stream, tiling);
        }
        return;
    }
    for (std::size_t i = 0; kRequantizes && i < given.size(); ++i) {
        clear_found(given[i], limits[i], stream);
    }
    if (count == 0) return;
    const auto go = [&](auto* config) {
        using C = std::remove_pointer_t<decltype(config)>;
        std::int64_t tiles = 0;
        for (int i = 0; i < count; ++i) tiles += set_tiles<C>(*filled[i], group.problems[i]);
        group.tiles = static_cast<int>(tiles);
        launch<C>(group, tiles, multiprocessors, stream);
    };
    with_tiling<In, GroupParams, kRequantizes>(tiling, M, count, first.N, first.slabs,
                                               multiprocessors, go);
}

// Outputs are of 8 bits where there are limits, one of them for each product.
template <typename In>
void run(const std::vector<ProductArguments>& given, const std::vector<Limits>& limits,
         cudaStream_t stream, int tiling = asked_tiling()) {
    if (limits.empty()) return run_group<In, false>(given, limits, stream, tiling);
    FEWSTEP_CHECK(limits.size() == given.size(), "limit: expected one for each product, got ",
                  limits.size(), " for ", given.size());
    run_group<In, true>(given, limits, stream, tiling);
}

}  // namespace fewstep::cuda::gemm8
