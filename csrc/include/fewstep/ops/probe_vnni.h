// probe_vnni: a probe, not an op. It runs vpdpbusd on registers alone, so that a benchmark can
// state the int8 rate of a GEMM as a fraction of what this core does in the same run.
#pragma once

#include <cstdint>

namespace fewstep::cpu {

// Run `iterations` times 24 independent 512-bit vpdpbusd on the calling thread and return the
// number of int8 operations done (a multiply and an add are two); 0 where the machine has no
// AVX-512 VNNI.
std::int64_t probe_vnni(std::int64_t iterations);

}  // namespace fewstep::cpu
