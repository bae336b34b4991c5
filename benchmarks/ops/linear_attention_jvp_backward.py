"""linear_attention_jvp_backward: gradients of SANA's linear attention and its derivative.

Two passes read the cotangents and the six inputs once and write six gradients. The baseline is
torch's: reverse mode through forward mode, op by op in float32, on a graph built beforehand.
"""

from typing import Any

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
    """d_o, dt_o and the inputs of linear_attention_jvp, heads inside tokens."""
    shape = (case["B"], case["N"], case["H"], case["D"])
    return tuple(torch.randn(shape, device=device).to(case.dtype).transpose(1, 2) for _ in range(8))


def with_states(case: Case, *tensors: Tensor) -> tuple[Tensor, ...]:
    states = ops.linear_attention_jvp(*tensors[2:], return_state=True)[2:]
    return (*tensors, *states)


def fused(*tensors: Tensor, impl: str) -> Any:
    return ops.linear_attention_jvp_backward(*tensors, impl=impl)


def sana(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    f_q, f_k, value = F.relu(q).float(), F.relu(k).float(), v.float()
    value = F.pad(value, (0, 1), value=1.0)
    sums = torch.matmul(f_q, torch.matmul(f_k.mT, value))
    return (sums[..., :-1] / (sums[..., -1:] + 1e-15)).to(q.dtype)


def with_graph(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    leaves = [v.clone().requires_grad_() for v in tensors[2:]]
    outputs = torch.func.jvp(sana, tuple(leaves[:3]), tuple(leaves[3:]))
    return outputs, leaves, tensors[:2]


def unfused(outputs: Any, leaves: Any, cotangents: Any) -> Any:
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def flops(case: Case) -> float:
    tokens, d = case["B"] * case["H"] * case["N"], case["D"]
    return 2.0 * 15 * tokens * d * (d + 1)


def bytes_moved(case: Case) -> float:
    return 14.0 * case["B"] * case["H"] * case["N"] * case["D"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "linear_attention_jvp_backward",
    CASES,
    inputs,
    [
        *implementations("linear_attention_jvp_backward", fused, with_states),
        baseline("autograd of torch.func.jvp", unfused, with_graph),
        copy_limit(),
        # Sums and states are float32 on either device; a CPU multiplies in float32 too.
        matmul_limit(torch.float32, only="cpu"),
        matmul_limit(only="cuda"),
    ],
    flops,
    bytes_moved,
)
