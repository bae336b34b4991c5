"""snapshot_store: a full step's tensor into a ring, with the products that weights are made from.

One pass reads x, base and the other slots and writes one. Baselines: the formula in eager torch and
compiled, and what diffusers' TaylorSeerCache does instead at order 2, two differences of bfloat16
factors.
"""

import torch
from torch import Tensor

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations
from fewstep.reference.snapshot_store import snapshot_store as formula

SLOTS, GROUP = 3, 128
MODELS = [
    ("FLUX.1 1024px", (1, 4608, 3072), ("cpu", "cuda")),
    ("Wan 2.1 1.3B 480p", (2, 32760, 1536), ("cuda",)),
    ("HunyuanVideo 720p", (1, 118800, 3072), ("cuda",)),
    ("SDXL 1024px latents", (8, 128, 128), ("cpu", "cuda")),
]
DTYPES = [torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint8]
CASES = [
    Case(
        f"{name}, {'with' if gram else 'no'} products",
        {"B": B, "S": S, "C": C, "K": SLOTS},
        dtype,
        devices,
        quick=name.startswith("SDXL") and gram,
        options={"gram": gram},
    )
    for name, (B, S, C), devices in MODELS
    for dtype in DTYPES
    for gram in (False, True)
]
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, bool]


def inputs(case: Case, device: torch.device) -> Inputs:
    rows = (case["B"], case["S"])
    x, base = (torch.randn((*rows, case["C"]), device=device).bfloat16() for _ in range(2))
    columns = case["C"] // 2 if case.dtype == torch.uint8 else case["C"]
    ring = torch.zeros((SLOTS, *rows, columns), dtype=case.dtype, device=device)
    scale = None
    if case.dtype != torch.bfloat16:
        scale = torch.ones((SLOTS, *rows, -(-case["C"] // GROUP)), device=device)
    return x, base, ring, scale, case.options["gram"]


def store(
    x: Tensor, base: Tensor, ring: Tensor, scale: Tensor | None, gram: bool, *, impl: str
) -> Tensor | None:
    options = {"slot": 1, "base": base, "scale": scale, "group": GROUP, "gram": gram}
    return ops.snapshot_store(x, ring, **options, impl=impl)


def eager(x: Tensor, base: Tensor, ring: Tensor, scale: Tensor | None, gram: bool) -> Tensor | None:
    return formula(x, ring, slot=1, base=base, scale=scale, group=GROUP, gram=gram)


def factors(case: Case, x: Tensor, base: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return x, base, torch.zeros_like(x), torch.zeros_like(x)


def taylor(x: Tensor, base: Tensor, value: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
    residual = x - base
    first = (residual - value) / 4
    second = (first - slope) / 4
    return residual, first, second


def flops(case: Case) -> float:
    return (4.0 + 2 * SLOTS * case.options["gram"]) * case["B"] * case["S"] * case["C"]


def bytes_moved(case: Case) -> float:
    bits = 4 if case.dtype == torch.uint8 else 8 * case.dtype.itemsize
    slot = bits / 8 + (0 if bits == 16 else 4 / GROUP)
    slots = SLOTS if case.options["gram"] else 1  # the new one is written and not read
    return case["B"] * case["S"] * case["C"] * (4 + slots * slot)


BENCHMARK = Benchmark(
    "snapshot_store",
    CASES,
    inputs,
    [
        *implementations("snapshot_store", store),
        baseline("torch eager", eager),
        baseline("torch.compile", torch.compile(eager, dynamic=False)),
        baseline("TaylorSeer's differences", taylor, prepare=factors),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
