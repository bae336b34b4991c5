"""quantize_int4: a weight to 4 bits, once per layer when a model is quantised.

The weight is read once and half a byte a value written. The baseline is the same formula in eager
torch.
"""

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

CASES = [
    Case("SDXL 1280 proj", {"N": 1280, "K": 1280, "G": 64}, torch.bfloat16, quick=True),
    Case("FLUX.1 text out", {"N": 3072, "K": 3072, "G": 64}, torch.bfloat16),
    Case("FLUX.1 text out", {"N": 3072, "K": 3072, "G": 128}, torch.float32),
    Case("FLUX.1 image ff1", {"N": 12288, "K": 3072, "G": 64}, torch.bfloat16, ("cuda",)),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, int]:
    return torch.randn(case["N"], case["K"], device=device).to(case.dtype), case["G"]


def quantize(w: Tensor, group: int, *, impl: str) -> tuple[Tensor, Tensor]:
    return ops.quantize_int4(w, group=group, impl=impl)


def eager(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    groups = w.float().unflatten(1, (-1, group))
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    q = torch.round(groups / scale.float()[..., None]).clamp(-8, 7).to(torch.int8)
    low, high = q.flatten(1).view(torch.uint8).unflatten(1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4), scale


def flops(case: Case) -> float:
    return 4.0 * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    return case["N"] * case["K"] * (case.dtype.itemsize + 0.5 + 2.0 / case["G"])


BENCHMARK = Benchmark(
    "quantize_int4",
    CASES,
    inputs,
    [
        *implementations("quantize_int4", quantize),
        baseline("torch eager", eager),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
