// What the host tells attention_jvp's Hopper kernels, apart from their code: the file that checks
// and launches does not compile them.
#pragma once

#include "fewstep/cuda/attention_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

// What decides which pairs meet, and what is added to their scores.
enum class Masking {
    kNone,      // all keys
    kPairs,     // causal, packed sequences, a boolean mask
    kAdditive,  // an additive mask, or a scale not above 0; the above too
};

struct Params {
    TensorMap q, k, v, t_q, t_k, t_v;
    void *o, *t_o;
    Strides o_strides, t_o_strides;
    float *lse, *mu, *lse_rest;
    const std::int32_t *cu_q, *cu_k;
    Mask mask, t_mask;
    bool mask_is_bool, is_causal;
    Grid grid;
    int heads, group, nq, nk, dv, sequences;  // sequences: packed ones, 0 for none
    float scale;
    // Zeros that the compiler doesn't know: P is unpacked three times, from P ^ zero. Else it
    // unpacks once and keeps the floats, which take twice the registers, and others spill.
    std::uint32_t zero[2] = {0, 0};
};

// The head dims that there are kernels for: without masks (nearly) every multiple of 16. Columns
// that a tensor doesn't have are zero in shared memory, and multiplied.
inline int padded_width(Masking masking, int width) {
    for (const int kernel : {48, 64, 80, 96, 112, 128}) {
        const bool exists = masking == Masking::kNone || kernel == 64 || kernel == 128;
        if (exists && width <= kernel) return kernel;
    }
    FEWSTEP_CHECK(false, "q, v: expected head dims up to 128, got ", width);
}

// Keys of a tile: the most that leave a thread's registers nothing to spill, by trial.
constexpr int keys_of_tile(Masking masking, int width, bool is_static) {
    if (masking == Masking::kAdditive) return width <= 64 ? 64 : 48;
    if (width <= 80) return 128;
    if (width == 96) return is_static ? 112 : 128;
    return width == 112 || is_static ? 96 : 112;
}

// Which kernel.
struct Launch {
    int width;  // of `padded_width`
    bool is_static;
    Masking masking;
    int batches;
};

template <typename T>
void launch(const Launch& how, const Params& p, cudaStream_t stream);

}  // namespace fewstep::cuda::attention_jvp_kernel
