"""quantize_fp8: rows to e4m3, with a scale for each or for each 128 neighbours.

Each row is read once from memory (the second read comes from the cache) and its e4m3 form written.
The baselines are the same formula in eager torch and compiled.
"""

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations
from fewstep.bench.products import activated_cases, activation_cases, activation_of
from fewstep.ops._epilogue import activate, is_glu

CASES = [
    Case("SDXL 1280 channels", {"M": 1024, "K": 1280, "block": 0}, torch.bfloat16, quick=True),
    Case("SDXL 1280 channels, blocks", {"M": 1024, "K": 1280, "block": 128}, torch.bfloat16),
    Case("FLUX.1 1024px", {"M": 4096, "K": 3072, "block": 0}, torch.bfloat16, ("cpu",)),
    Case("FLUX.1 1024px, blocks", {"M": 4096, "K": 3072, "block": 128}, torch.bfloat16, ("cuda",)),
    *activation_cases(block=0),
    *activated_cases(block=0),
]


def width(case: Case) -> int:
    """Return the columns of x."""
    return case["K"] * (2 if is_glu(activation_of(case)) else 1)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, int | None, str | None]:
    x = torch.randn(case["M"], width(case), device=device).to(case.dtype)
    return x, case["block"] or None, activation_of(case)


def quantize(x: Tensor, block: int | None, activation: str | None, impl: str) -> tuple[Tensor, ...]:
    return ops.quantize_fp8(x, block=block, activation=activation, impl=impl)


def eager(x: Tensor, block: int | None, activation: str | None) -> tuple[Tensor, Tensor]:
    x = activate(x, activation).float()
    blocks = x.unflatten(-1, (-1, block or x.shape[-1]))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    q = (blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(-2), scale[..., 0]


def flops(case: Case) -> float:
    return 4.0 * case["M"] * case["K"]


def bytes_moved(case: Case) -> float:
    scales = case["K"] // case["block"] if case["block"] else 1
    return case["M"] * (width(case) * case.dtype.itemsize + case["K"] + 4.0 * scales)


BENCHMARK = Benchmark(
    "quantize_fp8",
    CASES,
    inputs,
    [
        *implementations("quantize_fp8", quantize),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
