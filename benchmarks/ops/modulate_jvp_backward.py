"""modulate_jvp_backward: gradients of the gated residual and its directional derivative.

One pass reads both cotangents, y and its tangent, and writes two gradients; those of the gates are
sums. The baseline is torch's: reverse mode through forward mode, on a graph built beforehand.
"""

from typing import Any

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

LOW, FULL = torch.bfloat16, torch.float32

CASES = [
    Case("DiT-XL/2 256px", {"B": 2, "N": 256, "C": 1152}, FULL, quick=True),
    Case("FLUX.1 1024px", {"B": 1, "N": 4608, "C": 3072}, LOW, quick=True),
    Case("Wan 2.1 14B 480p", {"B": 1, "N": 32760, "C": 5120}, LOW, ("cuda",)),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """d_out, dt_out, y, gate, t_y, t_gate."""
    whole, shared = ((case["B"], n, case["C"]) for n in (case["N"], 1))
    shapes = (whole, whole, whole, shared, whole, shared)
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def fused(*tensors: Tensor, impl: str) -> Any:
    return ops.modulate_jvp_backward(*tensors, impl=impl)


def with_graph(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    leaves = [v.clone().requires_grad_() for v in tensors[2:]]
    y, gate, t_y, t_gate = leaves
    x = torch.zeros_like(y)
    primals, tangents = (x, y, gate), (x, t_y, t_gate)
    return torch.func.jvp(lambda x, y, g: x + g * y, primals, tangents), leaves, tensors[:2]


def unfused(outputs: Any, leaves: Any, cotangents: Any) -> Any:
    return torch.autograd.grad(outputs, leaves, cotangents, retain_graph=True)


def flops(case: Case) -> float:
    return 10.0 * case["B"] * case["N"] * case["C"]


def bytes_moved(case: Case) -> float:
    return 6.0 * case["B"] * case["N"] * case["C"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "modulate_jvp_backward",
    CASES,
    inputs,
    [
        *implementations("modulate_jvp_backward", fused),
        baseline("autograd of torch.func.jvp", unfused, with_graph),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
