"""gemv_w4a16_grouped: the modulation layers of a model, which read one row, in one launch.

Bytes are what counts: every weight is read once, so the limit is the copy rate. The rivals run the
layers one by one, with 4-bit weights and with torch's 16-bit ones, or as one product over the
weights laid end to end, which no model has them in.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, copy_limit, implementations

LOW = torch.bfloat16


def model(name: str, M: int, K: int, *layers: tuple[int, int], **options: Any) -> Case:
    """Return the case of a model with so many layers of so many columns each."""
    widths = [width for count, width in layers for _ in range(count)]
    shape = {"M": M, "N": sum(widths), "K": K, "G": 64, "layers": len(widths)}
    return Case(name, shape, LOW, options={"widths": widths}, **options)


# Two for each double block, one for each single one, and the last norm's.
FLUX = (38, 18432), (38, 9216), (1, 6144)
GPU = ("cuda",)
CASES = [
    model("FLUX.1, 1 image", 1, 3072, *FLUX, devices=GPU, quick=True),
    model("FLUX.1, 2 images", 2, 3072, *FLUX, devices=GPU),
    model("FLUX.1, 8 images", 8, 3072, *FLUX, devices=GPU),
    model("Qwen-Image, 1 image", 1, 3072, (120, 18432), (1, 6144), devices=GPU),
    model("SD3.5 large, 2 images", 2, 2432, (75, 14592), (2, 4864), devices=GPU),
    model("SD3 medium, 2 images", 2, 1536, (47, 9216), (2, 3072)),
    model("4 blocks of SD3 medium, 1 image", 1, 1536, (8, 9216), quick=True),
]


def inputs(case: Case, device: torch.device) -> tuple[Any, ...]:
    """x, and lists of values, scales and biases; scales that make outputs of order one."""
    K, groups, widths = case["K"], case["K"] // case["G"], case.options["widths"]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(case.dtype)

    w = [torch.randint(0, 256, (N, K // 2), device=device, dtype=torch.uint8) for N in widths]
    w_scale = [torch.full((N, groups), K**-0.5 / 5, device=device).to(LOW) for N in widths]
    return draw(case["M"], K), w, w_scale, [draw(N) for N in widths]


def grouped(x: Tensor, w: Any, w_scale: Any, bias: Any, *, impl: str) -> tuple[Tensor, ...]:
    return ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias, impl=impl)


def one_by_one(x: Tensor, w: Any, w_scale: Any, bias: Any) -> list[Tensor]:
    return [ops.gemm_w4a16(x, *layer, bias=b) for *layer, b in zip(w, w_scale, bias, strict=True)]


def end_to_end(case: Case, x: Tensor, *lists: list[Tensor]) -> tuple[Tensor, ...]:
    return x, *map(torch.cat, lists)


def one_product(x: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor:
    return ops.gemm_w4a16(x, w, w_scale, bias=bias)


def floating(case: Case, x: Tensor, w: Any, w_scale: Any, bias: Any) -> tuple[Any, ...]:
    return x, [torch.randn(len(b), case["K"], device=x.device).to(x.dtype) for b in bias], bias


def linears(x: Tensor, weights: Any, bias: Any) -> list[Tensor]:
    return [F.linear(x, *layer) for layer in zip(weights, bias, strict=True)]


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K, size = case["M"], case["N"], case["K"], case.dtype.itemsize
    return N * K * (0.5 + 2.0 / case["G"]) + (M * K + (M + 1.0) * N) * size


BENCHMARK = Benchmark(
    "gemv_w4a16_grouped",
    CASES,
    inputs,
    [
        *implementations("gemv_w4a16_grouped", grouped),
        baseline("gemm_w4a16, layer by layer", one_by_one),
        baseline("gemm_w4a16 of one long weight", one_product, end_to_end),
        baseline("torch linear, layer by layer", linears, floating),
        copy_limit(),
    ],
    flops,
    bytes_moved,
)
