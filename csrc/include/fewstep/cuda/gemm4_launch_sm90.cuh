// The product with a 4-bit weight on Hopper, the host's side: what it has of its own to check,
// tiles chosen, launched.
#pragma once

#include "fewstep/cuda/gemm4_sm90.cuh"
#include "fewstep/cuda/gemm8_launch_sm90.cuh"

namespace fewstep::cuda::gemm4 {

template <class C>
void launch(const ProductArguments& given, Params& p, int multiprocessors, cudaStream_t stream) {
    constexpr int kHalf = C::kN / 2;
    p.a = gemm8::map_rows(given.a, "a", given.a.size(1) / 2, C::kRows);
    p.w = gemm8::map_rows(given.w, "w", given.w.size(1) / 2, kHalf, kPackedBytes / 2);
    if (given.low != nullptr) {
        p.low = gemm8::map_rows(*given.low, "low", p.rank, C::kRows);
        p.up = gemm8::map_rows(*given.up, "up", p.rank, kHalf, kBranchColumns);
    }
    const unsigned blocks = gemm8::count_blocks(gemm8::place_tiles<C>(p), multiprocessors);
    launch_kernel(gemm4_sm90_kernel<C>, "gemm4_sm90", dim3(blocks), gemm8::kThreads,
                  C::kSharedBytes, stream, p);
}

// `tiling`: one of gemm4_plan.h's, or -1 for the one that it finds best.
inline void run(const ProductArguments& given, cudaStream_t stream,
                int tiling = gemm8::asked_tiling()) {
    static_assert(kTilings == gemm8::kTilings);  // which asked_tiling knows
    const std::int64_t K = given.a.size(1), groups = given.w_scale.size(1);
    Params p{};
    if (!gemm8::prepare(given, DType::kInt8, DType::kUInt8, K / 2, p)) return;
    const std::int64_t group = groups > 0 ? K / groups : 0;
    FEWSTEP_CHECK(K == groups * group && (group == 32 || group == 64 || group == 128),
                  "w_scale: expected [N, K / G] with G 32, 64 or 128 and K = ", K, ", got ", groups,
                  " groups");
    const DType type = given.w_scale.dtype;
    FEWSTEP_CHECK(type == DType::kBFloat16 || type == DType::kFloat16,
                  "w_scale: expected bfloat16 or float16, got ", name(type));
    expect_contiguous(given.w_scale, "w_scale", type, {p.N, groups});
    p.scales = given.w_scale.ptr<std::uint16_t>();
    p.scales_are_half = type == DType::kFloat16;
    p.in_eights = groups % 8 == 0 && given.w_scale.data % 16 == 0;
    p.groups = static_cast<int>(groups);
    p.group_shift = group == 32 ? 0 : group == 64 ? 1 : 2;
    p.branch_slabs = gemm8::tiles_of(p.rank, kBranchColumns);
    const int multiprocessors = count_multiprocessors();
    if (tiling < 0) tiling = choose_tiling(p.end.M, p.N, p.slabs, multiprocessors);
    switch (tiling) {
        case 0: return launch<Config<0>>(given, p, multiprocessors, stream);
        case 1: return launch<Config<1>>(given, p, multiprocessors, stream);
        default: return launch<Config<2>>(given, p, multiprocessors, stream);
    }
}

}  // namespace fewstep::cuda::gemm4
