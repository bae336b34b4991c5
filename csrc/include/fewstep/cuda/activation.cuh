// The activations of ops/_epilogue.py on the GPU: y times a number in [0, 1], fast rather than the
// CPU's to the bit, within a few 2^-23 of it.
#pragma once

#include <string>

#include "fewstep/check.h"
#include "fewstep/cuda/lanes.cuh"

namespace fewstep::cuda {

enum class Gating : int { kNone, kGelu, kGeluTanh, kSilu };

struct Activation {
    Gating gating = Gating::kNone;
    bool is_glu = false;  // value * gating(switch), the halves of a row

    static Activation named(const std::string& name) {
        const bool glu = name == "geglu" || name == "swiglu";
        if (name.empty()) return {};
        if (name == "gelu" || name == "geglu") return {Gating::kGelu, glu};
        if (name == "gelu_tanh") return {Gating::kGeluTanh, glu};
        FEWSTEP_CHECK(name == "silu" || glu, "activation: expected gelu, gelu_tanh, silu, geglu, ",
                      "swiglu or none, got ", name);
        return {Gating::kSilu, glu};
    }
};

// The normal distribution's integral up to y: the polynomial of fewstep/cpu/epilogue.h, which has
// no branch, where erff has one that neighbours take differently.
__device__ __forceinline__ float normal_integral(float y) {
    constexpr float kEnd = 5.3f, kSquash = 0.0711997151f;
    constexpr float kTerms[] = {0.00166835601f, -0.00143347296f, 0.00192513084f, -0.00546292774f,
                                0.00960014295f, -0.013396278f,   0.0186741538f,  -0.0252429917f,
                                0.0321183838f,  -0.0395950712f,  0.0492619276f,  -0.0665183142f,
                                0.133392587f};
    const float u = fused(y * y, kSquash, -1.0f);
    float p = -0.000652026501f;
#pragma unroll
    for (const float term : kTerms) p = fused(p, u, term);
    return fabsf(y) > kEnd ? (y < 0.0f ? 0.0f : 1.0f) : fused(p, y, 0.5f);
}

__device__ __forceinline__ float gate_of(float y, Gating gating) {
    if (gating == Gating::kNone) return y;
    if (gating == Gating::kGelu) return y * normal_integral(y);
    // (1 + tanh(z / 2)) / 2 = 1 / (1 + e^-z)
    const float z = gating == Gating::kSilu ? y : y * fused(y * y, 0.0713548128f, 1.5957691216f);
    const float e = fast_exp2(-1.44269504f * fabsf(z));
    return y * fast_divide(z < 0.0f ? e : 1.0f, 1.0f + e);
}

}  // namespace fewstep::cuda
