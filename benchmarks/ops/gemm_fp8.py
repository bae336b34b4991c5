"""gemm_fp8: the product of an FP8 layer, and the layer end to end.

"fewstep native" and "fewstep triton" time the product on e4m3 operands. "..., from x" starts from
the floating activations, so it is what replaces a linear layer: quantise, product, scales, bias.
"..., kernel" calls the C++ kernel into an output that is there already.
A CPU multiplies in bfloat16, so its limit is the rate of vdpbf16ps on registers
(`_C.cpu.probe_bf16`), per thread, and what is gained over torch's bf16 linear is memory.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fewstep import _native, ops
from fewstep.bench import Benchmark, Case, Provider, baseline, implementations, matmul_limit
from fewstep.bench.gpu_peers import fp8_peers
from fewstep.bench.products import bf16_limit, byte_outputs, call, hopper_tilings, model_cases

CASES = [
    Case("SDXL 640 proj", {"M": 1024, "N": 640, "K": 640}, torch.bfloat16, ("cpu",), quick=True),
    Case("SDXL 1280 proj", {"M": 1024, "N": 1280, "K": 1280}, torch.bfloat16, ("cpu",)),
    Case("SDXL 1280 proj, 256 rows", {"M": 256, "N": 1280, "K": 1280}, torch.bfloat16, ("cpu",)),
    Case("FLUX.1 text out", {"M": 512, "N": 3072, "K": 3072}, torch.bfloat16, ("cpu",)),
    Case("SDXL GEGLU", {"M": 1024, "N": 10240, "K": 1280}, torch.bfloat16, ("cpu",)),
    Case("FLUX.1 adaLN", {"M": 16, "N": 9216, "K": 3072}, torch.bfloat16),
    *model_cases(),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    shapes = ((case["M"], case["K"]), (case["N"], case["K"]), (case["N"],))
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def e4m3(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    return (*ops.quantize_fp8(x), *ops.quantize_fp8(w), bias, case.dtype)


def floats(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    return (x, None, *ops.quantize_fp8(w), bias, case.dtype)


def product(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    *,
    impl: str,
) -> Tensor:
    return ops.gemm_fp8(a, a_scale, w, w_scale, bias=bias, out_dtype=dtype, impl=impl)


def end_to_end() -> list[Provider]:
    providers = implementations("gemm_fp8", product, floats)
    return [Provider(f"{p.name}, from x", p.make, p.role, p.impl) for p in providers]


def kernel(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Any] | str:
    if x.device.type != "cpu":
        return "on GPUs: the tiles below"
    a, a_scale, w, w_scale, *_ = e4m3(case, x, w, bias)
    out = x.new_zeros((case["M"], case["N"]), dtype=case.dtype)
    plain = (None, None, None, 0, "", None, None, None)  # low to scale
    operands = (a.view(torch.uint8), a_scale, w.view(torch.uint8), w_scale, bias)
    return functools.partial(_native.call, "gemm_fp8", *operands, *plain, out)


def scaled_mm(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    scales = a_scale[:, None], w_scale[None]
    return torch._scaled_mm(a, w.t(), *scales, bias=bias, out_dtype=dtype)


def fast_scaled_mm(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Any]:
    a, a_scale, w, w_scale, *_ = e4m3(case, x, w, bias)
    options = {"bias": bias, "out_dtype": case.dtype, "use_fast_accum": True}
    scales = a_scale[:, None], w_scale[None]
    return functools.partial(torch._scaled_mm, a, w.t(), *scales, **options)


def scaled_mm_from_x(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    q, scale = ops.quantize_fp8(w)

    def layer(x: Tensor) -> Tensor:
        a_scale = x.abs().amax(1).float().clamp_min(1e-12) / 448
        a = (x / a_scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        return scaled_mm(a, a_scale, q, scale, bias, case.dtype)

    return layer, x


def one_scale(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch._scaled_mm(a, w.t(), a_scale[0], w_scale[0], bias=bias, out_dtype=dtype)


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K = case["M"], case["N"], case["K"]
    return M * (K + 4.0) + N * (K + 4.0) + (M + 1.0) * N * case.dtype.itemsize


BENCHMARK = Benchmark(
    "gemm_fp8",
    CASES,
    inputs,
    [
        *implementations("gemm_fp8", product, e4m3),
        *end_to_end(),
        Provider("fewstep native, kernel", kernel, "op", "native"),
        *hopper_tilings("gemm_fp8", e4m3),
        *byte_outputs("gemm_fp8", e4m3, activation="gelu_tanh"),
        baseline("torch linear", F.linear),
        baseline("torch._scaled_mm, row-wise", scaled_mm, e4m3),
        Provider(
            "torch._scaled_mm, row-wise, fast accumulation",
            fast_scaled_mm,
            "baseline",
            devices=("cuda",),
        ),
        baseline("torch._scaled_mm, row-wise, eager, from x", call, scaled_mm_from_x),
        baseline("torch._scaled_mm, one scale", one_scale, e4m3),
        *fp8_peers(),
        bf16_limit(),
        matmul_limit(torch.float8_e4m3fn, only="cuda"),
    ],
    flops,
    bytes_moved,
)
