// The vpdpbusd rate of one core. 24 accumulators hide the latency (4 cycles on Zen 4, 5 on Ice
// Lake); the loop is assembly so that no compiler adds register copies, which cost half the rate.
#include "fewstep/ops/probe_vnni.h"

#include "fewstep/cpu/isa.h"

namespace fewstep::cpu {

#if defined(__x86_64__)
#define FEWSTEP_DOT(n) "vpdpbusd %%zmm25, %%zmm24, %%zmm" #n "\n\t"
#define FEWSTEP_DOT4(a, b, c, d) FEWSTEP_DOT(a) FEWSTEP_DOT(b) FEWSTEP_DOT(c) FEWSTEP_DOT(d)

FEWSTEP_TARGET_AVX512 static void dot_products(std::int64_t iterations) {
    asm volatile(
        "1:\n\t"
        FEWSTEP_DOT4(0, 1, 2, 3) FEWSTEP_DOT4(4, 5, 6, 7) FEWSTEP_DOT4(8, 9, 10, 11)
        FEWSTEP_DOT4(12, 13, 14, 15) FEWSTEP_DOT4(16, 17, 18, 19) FEWSTEP_DOT4(20, 21, 22, 23)
        "dec %0\n\t"
        "jnz 1b\n\t"
        "vzeroupper\n\t"
        : "+r"(iterations)
        :
        : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",
          "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18", "zmm19",
          "zmm20", "zmm21", "zmm22", "zmm23");
}
#undef FEWSTEP_DOT4
#undef FEWSTEP_DOT
#endif

std::int64_t probe_vnni(std::int64_t iterations) {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512 && iterations > 0) {
        dot_products(iterations);
        return iterations * 24 * 64 * 2;
    }
#endif
    return 0;
}

}  // namespace fewstep::cpu
