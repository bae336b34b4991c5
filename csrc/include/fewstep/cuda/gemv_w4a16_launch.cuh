// gemv_w4a16.cuh, the host's side: arguments checked, the kernel chosen, launched.
#pragma once

#include <algorithm>
#include <limits>

#include "fewstep/cuda/gemv_w4a16.cuh"
#include "fewstep/ops/gemv_w4a16_grouped.h"

namespace fewstep::cuda::gemv {

inline int shared_bytes(std::int64_t M, std::int64_t K) {
    const std::int64_t chunks = (K + kChunk - 1) / kChunk;
    const std::int64_t rows = M * (chunks * kChunkBytes + 64);
    return static_cast<int>((rows + 127) / 128 * 128 + kZeroBytes);
}

template <typename T, int kParts, int kPasses>
void launch(const Group& group, cudaStream_t stream) {
    const int bytes = shared_bytes(group.M, group.K), most = max_shared_bytes();
    FEWSTEP_CHECK(bytes <= most, "x: expected rows that fit ", most,
                  " bytes of shared memory, got ", group.M, " of ", group.K, " columns: ", bytes);
    const int blocks = count_multiprocessors() * (2 * bytes <= most ? 2 : 1);
    const int tiles = group.tiles[group.count];
    launch_kernel<Group>(gemv_w4a16_kernel<T, kParts, kPasses>, "gemv_w4a16",
                         dim3(std::min(tiles, blocks)), kThreads, bytes, stream, group);
}

template <typename T>
void choose(const Group& group, cudaStream_t stream) {
    const int size = group.K / group.groups, M = group.M;
    FEWSTEP_CHECK(size == 32 || size == 64 || size == 128,
                  "w_scale: expected groups of 32, 64 or 128, got ", size);
    if (size == 128) return launch<T, 1, 1>(group, stream);
    if (size == 64) return M <= 4 ? launch<T, 2, 1>(group, stream) : launch<T, 2, 2>(group, stream);
    if (M <= 2) return launch<T, 4, 1>(group, stream);
    return M <= 4 ? launch<T, 4, 2>(group, stream) : launch<T, 4, 4>(group, stream);
}

// As many problems at a time as the arguments of a launch hold.
inline void run(const TensorView& x, const Views& w, const Views& w_scale, const Views& bias,
                const TensorView& out, cudaStream_t stream) {
    check_gemv_w4a16_grouped(x, w, w_scale, bias, out);
    FEWSTEP_CHECK(x.dtype == DType::kBFloat16 || x.dtype == DType::kFloat16,
                  "x: expected bfloat16 or float16, got ", name(x.dtype));
    if (out.numel() == 0) return;
    FEWSTEP_CHECK(x.size(2) > 0, "x: expected K above 0, got 0");
    Group group{};
    group.M = static_cast<int>(x.size(1));
    group.K = static_cast<int>(x.size(2));
    group.groups = static_cast<int>(w_scale[0].size(1));
    group.scales = w_scale[0].dtype;
    group.row_step = x.stride(1);
    group.x_step = x.size(0) > 1 ? x.stride(0) : 0;
    std::int64_t offset = 0;
    for (std::size_t begin = 0; begin < w.size(); begin += kProblems) {
        const std::size_t end = std::min(w.size(), begin + kProblems);
        group.count = 0;
        bool biased = false;
        for (std::size_t g = begin; g < end; ++g) {
            const std::int64_t N = w[g].size(0);
            const int i = group.count++;
            FEWSTEP_CHECK(w[g].numel() <= std::numeric_limits<int>::max(),
                          "w: expected fewer than 2^31 bytes each, got ", N, " rows of ",
                          group.K / 2);
            FEWSTEP_CHECK(w[g].data % 16 == 0, "w: expected memory from a multiple of 16 bytes on");
            const bool absent = bias[g].numel() == 0;
            FEWSTEP_CHECK(absent || !biased || bias[g].dtype == group.biases,
                          "bias: expected one dtype, got ", name(group.biases), " and ",
                          name(bias[g].dtype));
            if (!absent) group.biases = bias[g].dtype;
            biased = biased || !absent;
            group.w[i] = w[g].ptr<std::uint8_t>();
            group.scale[i] = w_scale[g].ptr<std::uint8_t>();
            group.bias[i] = absent ? nullptr : bias[g].ptr<void>();
            const auto tiles = static_cast<int>((N + kBlockRows - 1) / kBlockRows);
            group.tiles[i + 1] = group.tiles[i] + tiles;
            group.first[i + 1] = group.first[i] + static_cast<int>(N);
        }
        const std::int64_t input = group.x_step * static_cast<std::int64_t>(begin);
        const std::int64_t bytes = 2;
        group.x = reinterpret_cast<const void*>(x.data + bytes * input);
        group.out = reinterpret_cast<void*>(out.data + bytes * offset);
        offset += std::int64_t{group.M} * group.first[group.count];
        if (group.tiles[group.count] == 0) continue;
        if (x.dtype == DType::kBFloat16) {
            choose<__nv_bfloat16>(group, stream);
        } else {
            choose<__half>(group, stream);
        }
    }
}

}  // namespace fewstep::cuda::gemv
