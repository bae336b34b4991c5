"""gemm_w4a8: the product of a W4A8 layer, and the layer end to end.

Names as in gemm_w8a8.py: "fewstep native" and "fewstep triton" time the product on int8
activations, "..., from x" starts from floating ones, "..., kernel" calls the C++ kernel into an
output that is there already. The baseline "fewstep gemm_w8a8" says what 4 bits cost or save beside
8. Peers get the same values and scales; ONNX Runtime and OpenVINO float32 activations, which is
what they quantise.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fewstep import _native, ops
from fewstep.bench import Benchmark, Case, Provider, baseline, implementations, matmul_limit, needs
from fewstep.bench.gpu_peers import int4_peers
from fewstep.bench.products import (
    activation_of,
    call,
    hopper_tilings,
    linear_only,
    model_cases,
    needs_activation,
    needs_onnx,
    on_cpu,
    onnx_int4,
    openvino_int4,
    output_width,
    torch_int4,
    torch_layer,
    vnni_limit,
)
from fewstep.ops._epilogue import activate

LOW, GPU = torch.bfloat16, ("cuda",)
IMAGE_OUT = {"M": 4096, "N": 3072, "K": 3072, "G": 64}
GEGLU, FF1 = (
    {"M": M, "N": N, "K": K, "G": 128} for M, N, K in ((1024, 10240, 1280), (512, 12288, 3072))
)
CASES = [
    Case("SDXL 640 proj", {"M": 1024, "N": 640, "K": 640, "G": 128}, LOW, quick=True),
    Case("SDXL 1280 proj", {"M": 1024, "N": 1280, "K": 1280, "G": 128}, LOW),
    Case("SDXL 1280 proj, g64", {"M": 1024, "N": 1280, "K": 1280, "G": 64}, LOW),
    Case("SDXL 1280 proj, 256 rows", {"M": 256, "N": 1280, "K": 1280, "G": 128}, LOW),
    Case("FLUX.1 text out", {"M": 512, "N": 3072, "K": 3072, "G": 128}, LOW),
    Case("  rank 32", {"M": 512, "N": 3072, "K": 3072, "G": 128, "R": 32}, LOW),
    Case("SDXL GEGLU", {"M": 1024, "N": 10240, "K": 1280, "G": 128}, LOW, ("cpu",)),
    Case("SDXL GEGLU, with it", GEGLU, LOW, options={"activation": "geglu"}),
    Case("FLUX.1 text ff1, GELU", FF1, LOW, options={"activation": "gelu_tanh"}),
    Case("FLUX.1 adaLN", {"M": 16, "N": 9216, "K": 3072, "G": 128}, LOW),
    *model_cases(group=64),
    Case("FLUX.1 image out, rank 32", IMAGE_OUT | {"R": 32}, LOW, GPU),
    Case("FLUX.1 image out, rank 128", IMAGE_OUT | {"R": 128}, LOW, GPU),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    shapes = ((case["M"], case["K"]), (case["N"], case["K"]), (case["N"],))
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def quantised(case: Case, w: Tensor) -> dict[str, Tensor]:
    q, scale = ops.quantize_int4(w, group=case["G"])
    return {"w": q, "w_scale": scale}


def branch(case: Case, x: Tensor, first: str) -> dict[str, Tensor]:
    """Return the low-rank branch of the case, if it has one; `first` is "down" or "low"."""
    R = case.shape.get("R", 0)
    shapes = {"down": (R, case["K"]), "low": (case["M"], R), "up": (case["N"], R)}
    names = (first, "up") if R else ()
    return {name: torch.randn(shapes[name], device=x.device).to(x.dtype) for name in names}


def integers(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[dict[str, Any]]:
    a, a_scale = ops.quantize_int8(x)
    operands = {"a": a, "a_scale": a_scale, "bias": bias, "out_dtype": case.dtype}
    operands["activation"] = activation_of(case)
    return (operands | quantised(case, w) | branch(case, x, "low"),)


def floats(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[dict[str, Any]]:
    operands = {"a": x, "a_scale": None, "bias": bias, "activation": activation_of(case)}
    return (operands | quantised(case, w) | branch(case, x, "down"),)


def product(operands: dict[str, Any], *, impl: str = "auto") -> Tensor:
    return ops.gemm_w4a8(**operands, impl=impl)


def product_then_activation(operands: dict[str, Any]) -> Tensor:
    return activate(product(operands | {"activation": None}), operands["activation"])


def end_to_end() -> list[Provider]:
    providers = implementations("gemm_w4a8", product, floats)
    return [Provider(f"{p.name}, from x", p.make, p.role, p.impl) for p in providers]


def kernel(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Any] | str:
    (p,) = integers(case, x, w, bias)
    if x.device.type != "cpu":
        return "on GPUs: the tiles below"
    out = x.new_zeros((case["M"], output_width(case)))
    end = (None, 0, p["activation"] or "", None, None, None)  # smooth, rotate, ..., gate to scale
    arguments = (p["a"], p["a_scale"], p["w"], p["w_scale"], bias, p.get("low"), p.get("up"))
    return functools.partial(_native.call, "gemm_w4a8", *arguments, *end, out)


def in_order(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    (p,) = integers(case, *tensors)
    return tuple(p[name] for name in ("a", "a_scale", "w", "w_scale", "bias", "out_dtype"))


def low_and_up(case: Case, x: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None]:
    given = branch(case, x, "low")
    return given.get("low"), given.get("up")


def eight_bits(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    q, scale = ops.quantize_int8(w)
    operands = {"bias": bias, "activation": activation_of(case)}
    operands |= branch(case, x, "down")
    return functools.partial(ops.gemm_w8a8, **operands), x, None, q, scale


def eight_bits_native(case: Case, *tensors: Tensor) -> tuple[Any, ...]:
    layer, *args = eight_bits(case, *tensors)
    return functools.partial(layer, impl="native"), *args


def unless_native(case: Case, x: Tensor, *_: Tensor) -> str | None:
    """Say why gemm_w8a8 has no native kernel on this GPU; on CPUs that is what `auto` takes."""
    if x.device.type == "cpu":
        return "as above"
    return _native.unavailable("gemm_w8a8", x.device)


def whole(unless: Callable[..., str | None]) -> Callable[..., str | None]:
    """Return `unless` for peers that have neither a low-rank branch nor an activation."""
    bare = linear_only(unless)
    return lambda case, *tensors: (
        "has no low-rank branch" if case.shape.get("R") else bare(case, *tensors)
    )


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K = case["M"], case["N"], case["K"]
    return (
        M * (K + 4.0)
        + N * K * (0.5 + 2.0 / case["G"])
        + (M * output_width(case) + N) * case.dtype.itemsize
    )


BENCHMARK = Benchmark(
    "gemm_w4a8",
    CASES,
    inputs,
    [
        *implementations("gemm_w4a8", product, integers),
        *end_to_end(),
        Provider("fewstep native, kernel", kernel, "op", "native"),
        *hopper_tilings("gemm_w4a8", in_order, low_and_up),
        baseline("fewstep, activation apart", product_then_activation, floats, needs_activation),
        baseline("torch linear", call, torch_layer),
        baseline("fewstep gemm_w8a8, from x", call, eight_bits),
        baseline("fewstep gemm_w8a8 native, from x", call, eight_bits_native, unless_native),
        baseline("torch weight-only int4", call, torch_int4, whole(on_cpu)),
        baseline("ONNX Runtime MatMulNBits", call, onnx_int4, whole(needs_onnx), "onnxruntime"),
        baseline(
            "OpenVINO int4, dynamic",
            call,
            openvino_int4,
            whole(needs("openvino", "cpu")),
            "openvino",
        ),
        *int4_peers(),
        vnni_limit(),
        matmul_limit(torch.int8),
    ],
    flops,
    bytes_moved,
)
