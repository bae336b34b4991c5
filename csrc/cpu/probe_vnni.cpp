// The vpdpbusd rate of one core.
#include "fewstep/ops/probe_vnni.h"

#include "fewstep/cpu/isa.h"
#include "fewstep/cpu/register_probe.h"

namespace fewstep::cpu {

#if defined(__x86_64__)
FEWSTEP_TARGET_AVX512 static void dot_products(std::int64_t iterations) {
    FEWSTEP_REGISTER_PROBE("vpdpbusd", iterations);
}
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
