// The choice among attention_jvp's Hopper kernels for one storage type; each file of
// csrc/cuda/attention_jvp_sm90/ instantiates it for one.
#pragma once

#include <type_traits>

#include "fewstep/cuda/attention_jvp_sm90.cuh"

namespace fewstep::cuda::attention_jvp_kernel {

template <class C>
void launch(const Params& p, int batches, cudaStream_t stream) {
    launch_kernel(attention_jvp_sm90_kernel<C>, "attention_jvp_sm90", p.grid.blocks(batches),
                  kThreads, C::kSharedBytes, stream, p);
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

}  // namespace fewstep::cuda::attention_jvp_kernel
