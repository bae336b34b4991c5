"""modulate_jvp: the gated residual that ends a branch of a block, with its directional derivative.

One pass reads x, y and their tangents and writes both results. The baseline is torch's forward
mode through the formula, op by op.
"""

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
    """x, y, gate, t_x, t_y, t_gate."""
    whole, shared = ((case["B"], n, case["C"]) for n in (case["N"], 1))
    shapes = (whole, whole, shared) * 2
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def fused(*tensors: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return ops.modulate_jvp(*tensors, impl=impl)


def unfused(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    return torch.func.jvp(lambda x, y, gate: x + gate * y, tensors[:3], tensors[3:])


def flops(case: Case) -> float:
    return 6.0 * case["B"] * case["N"] * case["C"]


def bytes_moved(case: Case) -> float:
    return 6.0 * case["B"] * case["N"] * case["C"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "modulate_jvp",
    CASES,
    inputs,
    [
        *implementations("modulate_jvp", fused),
        baseline("torch.func.jvp, unfused", unfused),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
