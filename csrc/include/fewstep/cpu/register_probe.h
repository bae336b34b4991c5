// The rate of one dot-product instruction of one core, on registers. 24 accumulators hide the
// latency (vpdpbusd: 4 cycles on Zen 4, 5 on Ice Lake); the loop is assembly so that no compiler
// adds register copies, which cost half the rate.
//
// FEWSTEP_REGISTER_PROBE("vpdpbusd", iterations) runs 24 of them `iterations` times, at least once,
// in a function compiled for AVX-512.
#pragma once

#if defined(__x86_64__)
#define FEWSTEP_DOT(instruction, n) instruction " %%zmm25, %%zmm24, %%zmm" #n "\n\t"
#define FEWSTEP_DOT4(instruction, a, b, c, d) \
    FEWSTEP_DOT(instruction, a)               \
    FEWSTEP_DOT(instruction, b) FEWSTEP_DOT(instruction, c) FEWSTEP_DOT(instruction, d)
#define FEWSTEP_REGISTER_PROBE(instruction, iterations) \
    asm volatile(                                                                                 \
        "1:\n\t"                                                                                  \
        FEWSTEP_DOT4(instruction, 0, 1, 2, 3) FEWSTEP_DOT4(instruction, 4, 5, 6, 7)               \
        FEWSTEP_DOT4(instruction, 8, 9, 10, 11) FEWSTEP_DOT4(instruction, 12, 13, 14, 15)         \
        FEWSTEP_DOT4(instruction, 16, 17, 18, 19) FEWSTEP_DOT4(instruction, 20, 21, 22, 23)       \
        "dec %0\n\t"                                                                              \
        "jnz 1b\n\t"                                                                              \
        "vzeroupper\n\t"                                                                          \
        : "+r"(iterations)                                                                        \
        :                                                                                         \
        : "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9",   \
          "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17", "zmm18",        \
          "zmm19", "zmm20", "zmm21", "zmm22", "zmm23")
#endif
