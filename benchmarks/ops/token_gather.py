"""token_gather: the chosen tokens of a step of region-adaptive sampling, before its first block.

Copies alone, and with the first block's norm and modulation. The baselines are torch's gather, and
layer_norm and modulation behind it, in eager torch and compiled.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

LOW = torch.bfloat16
MODELS = [
    ("PixArt 1024px", (2, 4096, 1152), ("cpu", "cuda")),
    ("SD3.5 1024px, guided", (2, 4096, 1536), ("cpu", "cuda")),
    ("FLUX.1 1024px", (1, 4096, 3072), ("cuda",)),
    ("Wan 2.1 14B 480p", (1, 32760, 5120), ("cuda",)),
]
CASES = [
    Case(f"{name}{label}", {"B": B, "N": N, "C": C, "M": N // 4, "norm": norm}, LOW, devices,
         quick=name.startswith("PixArt"))
    for name, (B, N, C), devices in MODELS
    for norm, label in ((0, ""), (1, ", with its norm"))
]  # fmt: skip


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    x = torch.randn(case["B"], case["N"], case["C"], device=device).to(case.dtype)
    index = torch.rand(x.shape[:2], device=device).topk(case["M"]).indices.sort().values
    if not case["norm"]:
        return x, index, None, None
    return x, index, *torch.randn(case["B"], 2 * case["C"], device=device).to(LOW).chunk(2, -1)


def fused(x: Tensor, index: Tensor, scale: Any, shift: Any, impl: str) -> Tensor:
    eps = None if scale is None else 1e-6
    return ops.token_gather(x, index, scale=scale, shift=shift, eps=eps, impl=impl)


def eager(x: Tensor, index: Tensor, scale: Any, shift: Any) -> Tensor:
    y = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    if scale is None:
        return y
    return F.layer_norm(y, y.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def flops(case: Case) -> float:
    return 9.0 * case["norm"] * case["B"] * case["M"] * case["C"]


def bytes_moved(case: Case) -> float:
    return case["B"] * case["M"] * (2.0 * case["C"] * case.dtype.itemsize + 8)


BENCHMARK = Benchmark(
    "token_gather",
    CASES,
    inputs,
    [
        *implementations("token_gather", fused),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
