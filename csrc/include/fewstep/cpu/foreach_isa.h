// Compiles one piece of source for every instruction set: define FEWSTEP_ISA_BODY to a header (one
// without include guards, and without includes of its own), then include this file at global scope.
// The body is seen three times, inside fewstep::cpu::{portable, avx2, avx512}, where kVectorBytes
// is the register width (in bits and for the preprocessor, FEWSTEP_BODY_BITS) and, with GCC and
// clang, every function is compiled for that set (these pragmas put a target attribute on each
// function). Choose among the three at run time by isa().
#if !defined(FEWSTEP_ISA_BODY)
#error "define FEWSTEP_ISA_BODY before including fewstep/cpu/foreach_isa.h"
#endif

#if defined(__x86_64__)
#include <immintrin.h>  // for the bodies: conversions that the vector extensions don't have
#endif

#define FEWSTEP_BODY_BITS 128
namespace fewstep::cpu::portable {
constexpr int kVectorBytes = FEWSTEP_BODY_BITS / 8;
#include FEWSTEP_ISA_BODY
}  // namespace fewstep::cpu::portable
#undef FEWSTEP_BODY_BITS

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define FEWSTEP_BODY_BITS 256
namespace fewstep::cpu::avx2 {
constexpr int kVectorBytes = FEWSTEP_BODY_BITS / 8;
#include FEWSTEP_ISA_BODY
}  // namespace fewstep::cpu::avx2
#undef FEWSTEP_BODY_BITS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define FEWSTEP_BODY_BITS 512
namespace fewstep::cpu::avx512 {
constexpr int kVectorBytes = FEWSTEP_BODY_BITS / 8;
#include FEWSTEP_ISA_BODY
}  // namespace fewstep::cpu::avx512
#undef FEWSTEP_BODY_BITS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#undef FEWSTEP_ISA_BODY
