"""gemm_grouped: the layers of one width of a model's image and text streams, in one launch.

N and K are those of all products, M the rows of all of them together. The rivals run the products
one by one: in 8 bits, and torch's 16-bit linear layers. "one product" is what a launch of so many
rows with a single weight takes, which two weights can't be. int8; e4m3 has the same loop.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import ops
from fewstep.bench import Benchmark, Case, baseline, implementations, matmul_limit

GPU = ("cuda",)


def streams(name: str, N: int, K: int, *rows: int, **options: Any) -> Case:
    """Return the case of products with these rows."""
    shape = {"M": sum(rows), "N": N, "K": K}
    return Case(name, shape, torch.bfloat16, options={"rows": rows}, **options)


CASES = [
    streams("FLUX.1 image and text qkv", 9216, 3072, 4096, 512, devices=GPU),
    streams("FLUX.1 image and text out", 3072, 3072, 4096, 512, devices=GPU),
    streams("FLUX.1 image and text ff1", 12288, 3072, 4096, 512, devices=GPU),
    streams("FLUX.1 image and text ff2", 3072, 12288, 4096, 512, devices=GPU),
    streams("FLUX.1 q, k, v of both, apart", 3072, 3072, *[4096] * 3, *[512] * 3, devices=GPU),
    streams("SD3 medium image and text out", 1536, 1536, 8192, 666, devices=GPU),
    streams("a block of small streams", 640, 640, 256, 77, quick=True),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    """The rows of all products, then a weight and a bias for each."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(case.dtype)

    count, N, K = len(case.options["rows"]), case["N"], case["K"]
    return draw(case["M"], K), *(draw(N, K) for _ in range(count)), *(draw(N) for _ in range(count))


def lists(case: Case, x: Tensor, *rest: Tensor) -> tuple[list[Tensor], ...]:
    rows = case.options["rows"]
    return list(x.split(rows)), list(rest[: len(rows)]), list(rest[len(rows) :])


def integers(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    x, w, bias = lists(case, *tensors)
    quantised = [zip(*map(ops.quantize_int8, y), strict=True) for y in (x, w)]
    return *(list(y) for both in quantised for y in both), bias, case.dtype


def grouped(*operands: Any, impl: str) -> list[Tensor]:
    *first, bias, dtype = operands
    return ops.gemm_grouped(*first, bias=bias, out_dtype=dtype, impl=impl)


def one_by_one(*operands: Any) -> list[Tensor]:
    *first, biases, dtype = operands
    impl = "native" if first[0][0].device.type == "cpu" or _takes_hopper(first) else "auto"
    return [
        ops.gemm_w8a8(*layer, bias=bias, out_dtype=dtype, impl=impl)
        for *layer, bias in zip(*first, biases, strict=True)
    ]


def _takes_hopper(first: list[Any]) -> bool:
    layer = [column[0] for column in first]
    native = next(x for x in ops.module("gemm_w8a8").IMPLEMENTATIONS if x.name == "native")
    return native.refuse(*layer) is None


def one_weight(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    a, a_scale, w, w_scale, bias, dtype = integers(case, *tensors)
    return [torch.cat(a)], [torch.cat(a_scale)], w[:1], w_scale[:1], bias[:1], dtype


def linears(x: list[Tensor], w: list[Tensor], bias: list[Tensor]) -> list[Tensor]:
    return [F.linear(*layer) for layer in zip(x, w, bias, strict=True)]


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K, count = case["M"], case["N"], case["K"], len(case.options["rows"])
    return M * (K + 4.0) + count * N * (K + 4.0) + (M + count) * N * case.dtype.itemsize


BENCHMARK = Benchmark(
    "gemm_grouped",
    CASES,
    inputs,
    [
        *implementations("gemm_grouped", grouped, integers),
        baseline("gemm_w8a8, one by one", one_by_one, integers),
        baseline("gemm_w8a8, one product", one_by_one, one_weight),
        baseline("torch linear, one by one", linears, lists),
        matmul_limit(torch.int8),
    ],
    flops,
    bytes_moved,
)
