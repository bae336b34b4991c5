"""linear_attention_jvp: SANA's linear attention with its directional derivative.

Two passes read the six inputs once and write two results. The baseline is torch's forward mode
through the formula as diffusers' SanaLinearAttnProcessor2_0 has it, op by op in float32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations, matmul_limit

CASES = [
    Case("SANA 1.6B 512px", {"B": 1, "H": 70, "N": 256, "D": 32}, torch.float32, quick=True),
    Case("SANA 1.6B 1024px", {"B": 1, "H": 70, "N": 1024, "D": 32}, torch.bfloat16, quick=True),
    Case("SANA 1.6B 4096px", {"B": 1, "H": 70, "N": 16384, "D": 32}, torch.bfloat16, ("cuda",)),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    # Heads inside tokens, as a projection leaves them.
    shape = (case["B"], case["N"], case["H"], case["D"])
    return tuple(torch.randn(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(6))


def fused(*tensors: Tensor, impl: str) -> tuple[Tensor, ...]:
    return ops.linear_attention_jvp(*tensors, impl=impl)


def sana(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    f_q, f_k, value = F.relu(q).float(), F.relu(k).float(), v.float()
    value = F.pad(value, (0, 1), value=1.0)
    sums = torch.matmul(f_q, torch.matmul(f_k.mT, value))
    return (sums[..., :-1] / (sums[..., -1:] + 1e-15)).to(q.dtype)


def unfused(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(sana, tensors[:3], tensors[3:])


def flops(case: Case) -> float:
    tokens, d = case["B"] * case["H"] * case["N"], case["D"]
    return 2.0 * 6 * tokens * d * (d + 1)


def bytes_moved(case: Case) -> float:
    return 8.0 * case["B"] * case["H"] * case["N"] * case["D"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "linear_attention_jvp",
    CASES,
    inputs,
    [
        *implementations("linear_attention_jvp", fused),
        baseline("torch.func.jvp, unfused", unfused),
        copy_limit(),
        # Sums and states are float32 on either device; a CPU multiplies in float32 too.
        matmul_limit(torch.float32, only="cpu"),
        matmul_limit(only="cuda"),
    ],
    flops,
    bytes_moved,
)
