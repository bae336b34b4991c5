// What the host tells attention_jvp_backward's Hopper kernels, apart from their code.
#pragma once

#include "fewstep/cuda/attention_sm90.cuh"

namespace fewstep::cuda::attention_jvp_backward_kernel {

enum class Pass { kQueries, kKeys, kValues };

// Rows that are streamed at a time: what leaves a thread's registers nothing to spill, by trial.
constexpr int tile_rows(Pass pass, int width, bool half) {
    if (width <= 64 || pass == Pass::kValues) return 64;
    return pass == Pass::kQueries && !half ? 48 : 32;
}

struct Gradient {
    void* data = nullptr;  // null where it is not wanted
    Strides strides{};
};

// Of one pass; the kernel's header has the table of what is owned and streamed.
struct Params {
    TensorMap owned[4], streamed[4];
    Gradient a, b;
    const float *lse, *mu, *delta0, *delta1;
    const std::int32_t *cu_q, *cu_k;
    Mask mask;  // boolean
    bool is_causal;
    Grid grid;
    int heads, group, nq, nk, columns;  // query heads; columns of the gradients
    int sequences;                      // packed ones, 0 for none
    float scale;
    // Zeros that the compiler doesn't know: what is packed is unpacked late, from x ^ zero. Else it
    // is unpacked at once, and the floats take registers until they are used.
    std::uint32_t zero[3] = {0, 0, 0};
};

struct Launch {
    Pass pass;
    int width;  // 64 or 128
    bool masked;
    int batches;
};

template <typename T>
void launch(const Launch& how, const Params& p, cudaStream_t stream);

}  // namespace fewstep::cuda::attention_jvp_backward_kernel
