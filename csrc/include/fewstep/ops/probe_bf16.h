// probe_bf16: a probe, not an op. It runs vdpbf16ps on registers alone, so that a benchmark can
// state the rate of a GEMM in bfloat16 as a fraction of what this core does in the same run.
#pragma once

#include <cstdint>

namespace fewstep::cpu {

// Run `iterations` times 24 independent 512-bit vdpbf16ps on the calling thread and return the
// number of operations done (a multiply and an add are two); 0 where the machine has no such
// instruction.
std::int64_t probe_bf16(std::int64_t iterations);

}  // namespace fewstep::cpu
