"""forecast_apply: a skipped step's tensor from three snapshots.

One pass reads three slots and base and writes y. The baseline is the chain of diffusers'
TaylorSeerCache, factors of bfloat16 times powers of the step, one after another, in eager torch and
compiled; it needs the values of codes as bfloat16.
"""

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations
from fewstep.reference._slots import dequantize

SLOTS, GROUP = 3, 128
MODELS = [
    ("FLUX.1 1024px", (1, 4608, 3072), ("cpu", "cuda")),
    ("Wan 2.1 1.3B 480p", (2, 32760, 1536), ("cuda",)),
    ("HunyuanVideo 720p", (1, 118800, 3072), ("cuda",)),
    ("SDXL 1024px latents", (8, 128, 128), ("cpu", "cuda")),
]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8]
CASES = [
    Case(name, {"B": B, "S": S, "C": C, "K": SLOTS}, dtype, devices, quick=name.startswith("SDXL"))
    for name, (B, S, C), devices in MODELS
    for dtype in DTYPES
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    rows = (SLOTS, case["B"], case["S"])
    base = torch.randn((*rows[1:], case["C"]), device=device).bfloat16()
    weights = torch.tensor([1.0, 2.0, 2.0], device=device)
    if case.dtype.itemsize > 1:
        return torch.randn((*rows, case["C"]), device=device).to(case.dtype), weights, base, None
    columns = case["C"] // 2 if case.dtype == torch.uint8 else case["C"]
    bits = torch.randint(0, 120, (*rows, columns), dtype=torch.uint8, device=device)  # none NaN
    scale = torch.rand((*rows, -(-case["C"] // GROUP)), device=device)
    return bits.view(case.dtype), weights, base, scale


def forecast(ring: Tensor, w: Tensor, base: Tensor, scale: Tensor | None, impl: str) -> Tensor:
    return ops.forecast_apply(ring, w, base=base, scale=scale, group=GROUP, impl=impl)


def factors(
    case: Case, ring: Tensor, weights: Tensor, base: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    # One after another: the largest rings don't fit the memory as float32.
    values = [
        dequantize(ring[k], None if scale is None else scale[k], GROUP, torch.float32).bfloat16()
        for k in range(SLOTS)
    ]
    return torch.stack(values), base


def taylor(factors: Tensor, base: Tensor) -> Tensor:
    output = torch.zeros_like(base)
    for factor, coefficient in zip(factors, (1.0, 2.0, 2.0), strict=True):
        output = output + factor * coefficient
    return base + output


def flops(case: Case) -> float:
    return (2.0 * SLOTS + 1) * case["B"] * case["S"] * case["C"]


def bytes_moved(case: Case) -> float:
    bits = 4 if case.dtype == torch.uint8 else 8 * case.dtype.itemsize
    factor = 0 if bits == 16 else 4 / GROUP
    return case["B"] * case["S"] * case["C"] * (SLOTS * (bits / 8 + factor) + 4)


BENCHMARK = Benchmark(
    "forecast_apply",
    CASES,
    inputs,
    [
        *implementations("forecast_apply", forecast),
        baseline("torch eager", taylor, prepare=factors),
        baseline("torch.compile", torch.compile(taylor, dynamic=False), prepare=factors),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
