"""token_scatter: computed tokens into what is kept of all.

In place as keys and values are, and with gate and residual into a new tensor. The baselines are
torch's scatter, in place, and gather, product, sum and scatter one by one, eager and compiled.
"""

from typing import Any

import torch
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
    Case(f"{name}{label}", {"B": B, "N": N, "C": C, "M": N // 4, "gated": gated}, LOW, devices,
         quick=name.startswith("PixArt"))
    for name, (B, N, C), devices in MODELS
    for gated, label in ((0, ", in place"), (1, ", gated residual"))
]  # fmt: skip


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    shape = case["B"], case["M"], case["C"]
    value = torch.randn(shape, device=device).to(case.dtype)
    base = torch.randn(case["B"], case["N"], case["C"], device=device).to(case.dtype)
    index = torch.rand(base.shape[:2], device=device).topk(case["M"]).indices.sort().values
    position = torch.full(base.shape[:2], -1, device=device)
    position.scatter_(1, index, torch.arange(case["M"], device=device).expand_as(index))
    gate = torch.randn(case["B"], case["C"], device=device).to(LOW) if case["gated"] else None
    return value, position, base, gate, index


def fused(value: Tensor, position: Tensor, base: Tensor, gate: Any, _: Any, impl: str) -> Tensor:
    gated = gate is not None
    return ops.token_scatter(
        value, position, base, gate=gate, residual=gated, in_place=not gated, impl=impl
    )


def eager(value: Tensor, _: Tensor, base: Tensor, gate: Any, index: Tensor) -> Tensor:
    at = index[..., None].expand_as(value)
    if gate is None:
        return base.scatter_(1, at, value)
    return base.scatter(1, at, base.gather(1, at) + gate[:, None] * value)


def flops(case: Case) -> float:
    return 2.0 * case["gated"] * case["B"] * case["M"] * case["C"]


def bytes_moved(case: Case) -> float:
    rows = 2 * case["M"] if not case["gated"] else case["M"] + 2 * case["N"]
    return case["B"] * (rows * float(case["C"]) * case.dtype.itemsize + 8 * case["N"])


BENCHMARK = Benchmark(
    "token_scatter",
    CASES,
    inputs,
    [
        *implementations("token_scatter", fused),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
