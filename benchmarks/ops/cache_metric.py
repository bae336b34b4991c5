"""cache_metric: the decision of first-block caching.

One pass reads x, y and the previous residual and writes the new one. The baselines are the
formula as diffusers' FirstBlockCache spells it (a subtraction, then two reductions over
temporaries), in eager torch and compiled.
"""

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

CASES = [
    Case("FLUX.1 1024px", {"B": 1, "S": 4096, "C": 3072}, torch.bfloat16, quick=True),
    Case("Wan 2.1 1.3B 480p", {"B": 2, "S": 32760, "C": 1536}, torch.bfloat16, ("cuda",)),
    Case("SD3.5 1024px, guided", {"B": 2, "S": 4096, "C": 1536}, torch.float32),
    Case("DiT-XL/2 256px", {"B": 2, "S": 256, "C": 1152}, torch.float32),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    shape = (case["B"], case["S"], case["C"])
    return tuple(torch.randn(shape, device=device).to(case.dtype) for _ in range(3))


def fused(x: Tensor, y: Tensor, previous: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return ops.cache_metric(x, y, previous=previous, return_residual=True, impl=impl)


def eager(x: Tensor, y: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
    residual = x - y
    change = (residual - previous).abs().mean()
    return change / previous.abs().mean(), residual


def flops(case: Case) -> float:
    return 6.0 * case["B"] * case["S"] * case["C"]


def bytes_moved(case: Case) -> float:
    return 4.0 * case["B"] * case["S"] * case["C"] * case.dtype.itemsize


BENCHMARK = Benchmark(
    "cache_metric",
    CASES,
    inputs,
    [
        *implementations("cache_metric", fused),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
