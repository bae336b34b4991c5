"""norm_quantize_int8: what stands before the projections of an adaLN block in int8.

Fused, each row is read once and its int8 form written. The rivals write the modulated norm to
memory and read it again: torch's layer_norm and modulation with our quantize_int8, and torch alone,
eager and compiled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

LOW = torch.bfloat16
CASES = [
    Case("PixArt 1024px", {"B": 1, "N": 4096, "C": 1152}, LOW, quick=True),
    Case("FLUX.1 1024px", {"B": 1, "N": 4608, "C": 3072}, LOW, quick=True),
    Case("FLUX.1 text stream", {"B": 1, "N": 512, "C": 3072}, LOW),
    Case("Wan 2.1 14B 480p", {"B": 1, "N": 32760, "C": 5120}, LOW, ("cuda",)),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """x, and scale and shift as slices of one table, as adaLN has them."""
    x = torch.randn(case["B"], case["N"], case["C"], device=device).to(case.dtype)
    table = torch.randn(case["B"], 1, 2 * case["C"], device=device).to(case.dtype)
    return (x, *table.chunk(2, -1))


def fused(x: Tensor, scale: Tensor, shift: Tensor, impl: str) -> tuple[Tensor, ...]:
    return ops.norm_quantize_int8(x, scale=scale, shift=shift, impl=impl)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def unfused(*tensors: Tensor) -> tuple[Tensor, ...]:
    return ops.quantize_int8(modulated(*tensors))


def eager(*tensors: Any) -> tuple[Tensor, Tensor]:
    z = modulated(*tensors).float()
    amax = z.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    return torch.round(z * (127 / amax)).to(torch.int8), amax[..., 0] / 127


def flops(case: Case) -> float:
    return 13.0 * case["B"] * case["N"] * case["C"]


def bytes_moved(case: Case) -> float:
    return case["B"] * case["N"] * (case["C"] * (case.dtype.itemsize + 1.0) + 4)


BENCHMARK = Benchmark(
    "norm_quantize_int8",
    CASES,
    inputs,
    [
        *implementations("norm_quantize_int8", fused),
        baseline("torch layer_norm, modulation, then quantize_int8", unfused),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
