"""quantize_int8: the activation side of a W8A8 layer.

Each row is read once from memory (the second read comes from the cache) and its int8 form written.
"..., smoothed and rotated" has what may come first in the same pass, "..., with low" the low-rank
branch's first product of rank 32, and its baseline is that product by itself. Cases with an
activation end in the rows of a feed-forward layer's second product; "activation apart" writes them.
The other baselines are the same formula in eager torch and compiled.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import ops
from fewstep.bench import Benchmark, Case, Provider, baseline, copy_limit, implementations
from fewstep.bench.products import (
    activated_cases,
    activation_cases,
    activation_of,
    needs_activation,
)
from fewstep.ops._epilogue import activate, is_glu

CASES = [
    Case("SDXL 1280 channels", {"M": 1024, "K": 1280}, torch.bfloat16, quick=True),
    Case("SDXL 1280 channels", {"M": 1024, "K": 1280}, torch.float32),
    Case("FLUX.1 1024px", {"M": 4096, "K": 3072}, torch.bfloat16, ("cpu",)),
    *activation_cases(),
    *activated_cases(),
]


def width(case: Case) -> int:
    """Return the columns of x."""
    return case["K"] * (2 if is_glu(activation_of(case)) else 1)


def inputs(case: Case, device: torch.device) -> tuple[Tensor, str | None]:
    return torch.randn(case["M"], width(case), device=device).to(case.dtype), activation_of(case)


def quantize(x: Tensor, activation: str | None, impl: str) -> tuple[Tensor, ...]:
    return ops.quantize_int8(x, activation=activation, impl=impl)


def apart(x: Tensor, activation: str | None) -> tuple[Tensor, ...]:
    return ops.quantize_int8(activate(x, activation))


def eager(x: Tensor, activation: str | None) -> tuple[Tensor, Tensor]:
    x = activate(x, activation).float()
    amax = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    q = torch.round(x * (127 / amax)).to(torch.int8)
    return q, amax[..., 0] / 127


def prepared(case: Case, x: Tensor, activation: str | None) -> tuple[Tensor, ...]:
    return x, torch.rand(case["K"], device=x.device) + 0.5


def smoothed_and_rotated(x: Tensor, smooth: Tensor, impl: str = "auto") -> tuple[Tensor, ...]:
    return ops.quantize_int8(x, smooth=smooth, rotate=128, impl=impl)


def projected(case: Case, x: Tensor, activation: str | None) -> tuple[Tensor, ...]:
    return x, torch.randn(32, case["K"], device=x.device).to(case.dtype)


def with_low(x: Tensor, down: Tensor, impl: str = "auto") -> tuple[Tensor, ...]:
    return ops.quantize_int8(x, down=down, impl=impl)


def activated(case: Case, *inputs: Any) -> str | None:
    """Say that the case has an activation, or return None where it has none."""
    return "of cases without an activation" if activation_of(case) else None


def unrotated(case: Case, *inputs: Any) -> str | None:
    """Say why the case's rows are not rotated, or return None where they can be."""
    return activated(case) or ("128 does not divide K" if case["K"] % 128 else None)


def on_gpu(impl: str, name: str, call: Callable[..., Any], prepare: Any) -> Provider:
    """Return `call` by one implementation, for GPUs, where `auto` may leave it alone."""
    ways = ops.module("quantize_int8").IMPLEMENTATIONS
    refuse = next(way.refuse for way in ways if way.name == impl)

    def unless(case: Case, x: Tensor, activation: str | None) -> str | None:
        return (unrotated if prepare is prepared else activated)(case) or refuse(x)

    call = functools.partial(call, impl=impl)
    provider = baseline(f"fewstep {impl}, {name}", call, prepare, unless=unless)
    return dataclasses.replace(provider, devices=("cuda",))


def flops(case: Case) -> float:
    return 4.0 * case["M"] * case["K"]


def bytes_moved(case: Case) -> float:
    return case["M"] * (width(case) * case.dtype.itemsize + case["K"] + 4.0)


BENCHMARK = Benchmark(
    "quantize_int8",
    CASES,
    inputs,
    [
        *implementations("quantize_int8", quantize),
        baseline("fewstep, smoothed and rotated", smoothed_and_rotated, prepared, unless=unrotated),
        baseline("fewstep, with low", with_low, projected, unless=activated),
        *(
            on_gpu(impl, name, call, prepare)
            for impl in ("native", "triton")
            for name, call, prepare in (
                ("smoothed and rotated", smoothed_and_rotated, prepared),
                ("with low", with_low, projected),
            )
        ),
        baseline("torch linear, low alone", F.linear, projected, unless=activated),
        baseline("fewstep, activation apart", apart, unless=needs_activation),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
