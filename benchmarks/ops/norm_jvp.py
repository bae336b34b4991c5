"""norm_jvp: adaLN (a norm, scale and shift) with its directional derivative.

One pass reads x and its tangent and writes both results. The baseline is what users have: torch's
forward mode through F.layer_norm or F.rms_norm and the modulation, op by op.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

GPU = ("cuda",)
LOW, FULL = torch.bfloat16, torch.float32

CASES = [
    Case("DiT-XL/2 256px", {"B": 2, "N": 256, "C": 1152}, FULL, quick=True),
    Case("FLUX.1 1024px", {"B": 1, "N": 4608, "C": 3072}, LOW, quick=True),
    Case("Wan 2.1 14B 480p", {"B": 1, "N": 32760, "C": 5120}, LOW, GPU),
    Case("FLUX.1 QK norm", {"B": 24, "N": 4608, "C": 128}, LOW, options={"kind": "rms"}),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """x, t_x, and scale, shift, t_scale, t_shift as slices of one table, as adaLN has them."""
    shape = (case["B"], case["N"], case["C"])
    x, t_x = (torch.randn(shape, device=device).to(case.dtype) for _ in range(2))
    table = torch.randn(case["B"], 1, 4 * case["C"], device=device).to(case.dtype)
    return (x, t_x, *table.chunk(4, -1))


def with_kind(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    return (case.options.get("kind", "layer"), *tensors)


def fused(kind: str, x: Tensor, t_x: Tensor, *table: Tensor, impl: str) -> tuple[Tensor, ...]:
    modulation = dict(zip(("scale", "shift", "t_scale", "t_shift"), table, strict=True))
    return ops.norm_jvp(x, t_x, **modulation, kind=kind, impl=impl)


def unfused(kind: str, x: Tensor, t_x: Tensor, *table: Tensor) -> tuple[Tensor, Tensor]:
    scale, shift, t_scale, t_shift = table
    norm = F.rms_norm if kind == "rms" else F.layer_norm

    def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    return torch.func.jvp(modulated, (x, scale, shift), (t_x, t_scale, t_shift))


def flops(case: Case) -> float:
    return 25.0 * case["B"] * case["N"] * case["C"]


def bytes_moved(case: Case) -> float:
    return 4.0 * case["B"] * case["N"] * case["C"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "norm_jvp",
    CASES,
    inputs,
    [
        *implementations("norm_jvp", fused, with_kind),
        baseline("torch.func.jvp, unfused", unfused, with_kind),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
