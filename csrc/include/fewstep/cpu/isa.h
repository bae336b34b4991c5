// Which instruction set the CPU kernels use: the best this machine has, chosen at run time.
// FEWSTEP_CPU_ISA=portable|avx2|avx512 lowers it (never raises it), which is how tests reach the
// fallbacks. Kernels compile their variants with function-level target attributes.
#pragma once

#include <cstdlib>
#include <cstring>

#include "fewstep/tensor.h"

namespace fewstep::cpu {

enum class Isa : int { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

inline Isa best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vnni")) {
        return Isa::kAvx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
        return Isa::kAvx2;
    }
#endif
    return Isa::kPortable;
}

inline Isa isa() {
    static const Isa best = best_isa();
    const char* wish = std::getenv("FEWSTEP_CPU_ISA");
    if (wish == nullptr || *wish == '\0') return best;
    Isa wanted = best;
    if (std::strcmp(wish, "portable") == 0) {
        wanted = Isa::kPortable;
    } else if (std::strcmp(wish, "avx2") == 0) {
        wanted = Isa::kAvx2;
    } else {
        FEWSTEP_CHECK(std::strcmp(wish, "avx512") == 0,
                      "FEWSTEP_CPU_ISA: expected portable, avx2 or avx512, got ", wish);
    }
    return wanted < best ? wanted : best;
}

// Whether there are also dot products of bfloat16, which FEWSTEP_CPU_ISA=avx512 leaves out.
inline bool has_bf16_dots() {
#if defined(__x86_64__)
    const char* wish = std::getenv("FEWSTEP_CPU_ISA");
    return (wish == nullptr || *wish == '\0') && isa() == Isa::kAvx512 &&
           __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

inline const char* name(Isa isa) {
    switch (isa) {
        case Isa::kAvx512: return "avx512_vnni";
        case Isa::kAvx2: return "avx2";
        default: return "portable";
    }
}

}  // namespace fewstep::cpu

#if defined(__x86_64__)
#define FEWSTEP_TARGET_AVX512 \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c,prfchw")))
// Beyond what Isa::kAvx512 promises: ask the machine for avx512bf16 first.
#define FEWSTEP_TARGET_AVX512_BF16 \
    __attribute__((                \
        target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")))
#define FEWSTEP_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#endif
