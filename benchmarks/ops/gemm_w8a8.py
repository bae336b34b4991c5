"""gemm_w8a8: the product of a W8A8 layer, and the layer end to end.

"fewstep native" and "fewstep triton" time the product on int8 operands. "..., from x" starts from
the floating activations, so it is what replaces a linear layer: quantise, product, scales, bias.
"..., kernel" calls the C++ kernel into an output that is there already: what the arithmetic reaches
on its threads. The op adds the way from Python to it, 0.1 ms and more where a product before it has
swept the caches (docs/ops/gemm_w8a8.md).
"..., 8-bit output" is what the next layer reads, where there is an activation: quantised by its own
rows, or by limits in the product's end (`limit`).
A case with an activation has it in "torch linear" too; "fewstep, activation apart" is the product
from x and then torch's activation.
The limit on CPUs is the rate of vpdpbusd itself on registers (`_C.cpu.probe_vnni`), per thread.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fewstep import _native, ops
from fewstep.bench import Benchmark, Case, Provider, baseline, implementations, matmul_limit, needs
from fewstep.bench.gpu_peers import int8_peers, worth_tuning
from fewstep.bench.products import (
    activation_of,
    byte_outputs,
    call,
    hopper_tilings,
    linear_only,
    model_cases,
    needs_activation,
    needs_onnx,
    on_cpu,
    onnx_int8,
    openvino_int8,
    output_width,
    plain_layer,
    torch_layer,
    vnni_limit,
)
from fewstep.ops._epilogue import activate

IMAGE = {"M": 4096, "N": 12288, "K": 3072}
GEGLU, FF1 = {"M": 1024, "N": 10240, "K": 1280}, {"M": 512, "N": 12288, "K": 3072}
CASES = [
    Case("SDXL 640 proj", {"M": 1024, "N": 640, "K": 640}, torch.bfloat16, quick=True),
    Case("SDXL 1280 proj", {"M": 1024, "N": 1280, "K": 1280}, torch.bfloat16),
    Case("SDXL 1280 proj", {"M": 1024, "N": 1280, "K": 1280}, torch.float32),
    Case("SDXL 1280 proj, 256 rows", {"M": 256, "N": 1280, "K": 1280}, torch.bfloat16),
    Case("FLUX.1 text out", {"M": 512, "N": 3072, "K": 3072}, torch.bfloat16, ("cpu",)),
    Case("SDXL GEGLU", {"M": 1024, "N": 10240, "K": 1280}, torch.bfloat16, ("cpu",)),
    Case("SDXL GEGLU, with it", GEGLU, torch.bfloat16, options={"activation": "geglu"}),
    Case("FLUX.1 text ff1, GELU", FF1, torch.bfloat16, options={"activation": "gelu_tanh"}),
    Case("FLUX.1 image ff1, GELU", IMAGE, torch.bfloat16, ("cuda",), {"activation": "gelu_tanh"}),
    Case("FLUX.1 adaLN", {"M": 16, "N": 9216, "K": 3072}, torch.bfloat16),
    *model_cases(),
]


def inputs(case: Case, device: torch.device) -> tuple[Tensor, ...]:
    shapes = ((case["M"], case["K"]), (case["N"], case["K"]), (case["N"],))
    return tuple(torch.randn(shape, device=device).to(case.dtype) for shape in shapes)


def integers(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    a, weight = ops.quantize_int8(x), ops.quantize_int8(w)
    return (*a, *weight, bias, case.dtype, activation_of(case))


def floats(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    return (x, None, *ops.quantize_int8(w), bias, case.dtype, activation_of(case))


def product(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor,
    dtype: torch.dtype,
    activation: str | None,
    *,
    impl: str = "auto",
) -> Tensor:
    options = {"bias": bias, "activation": activation, "out_dtype": dtype}
    return ops.gemm_w8a8(a, a_scale, w, w_scale, **options, impl=impl)


def product_then_activation(*operands: Any) -> Tensor:
    *rest, activation = operands
    return activate(product(*rest, None), activation)


def end_to_end() -> list[Provider]:
    providers = implementations("gemm_w8a8", product, floats)
    return [Provider(f"{p.name}, from x", p.make, p.role, p.impl) for p in providers]


def kernel(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Any] | str:
    if x.device.type != "cpu":
        return "on GPUs: the tiles below"
    out = x.new_zeros((case["M"], output_width(case)), dtype=case.dtype)
    end = (activation_of(case) or "", None, None, None)  # gate, residual, scale
    operands = (*ops.quantize_int8(x), *ops.quantize_int8(w), bias)
    arguments = (*operands, None, None, None, 0, *end, out)
    return functools.partial(_native.call, "gemm_w8a8", *arguments)


def int_mm_operands(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    q, scale = ops.quantize_int8(w)
    return (*ops.quantize_int8(x), q.t(), scale, bias, case.dtype)


def int_mm(
    a: Tensor, a_scale: Tensor, w: Tensor, w_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> Tensor:
    return (torch._int_mm(a, w).float() * a_scale[:, None] * w_scale + bias).to(dtype)


def int_mm_alone(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Callable[[], Any]:
    a, _, q, *_ = int_mm_operands(case, x, w, bias)
    return functools.partial(torch._int_mm, a, q)


def int_mm_from_x(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    q, scale = ops.quantize_int8(w)

    def layer(x: Tensor) -> Tensor:
        a_scale = x.abs().amax(1).float() / 127
        a = (x / a_scale[:, None].clamp_min(1e-12)).round().to(torch.int8)
        return int_mm(a, a_scale, q.t(), scale, bias, case.dtype)

    return layer, x


def enough_rows(case: Case, *tensors: Tensor) -> str | None:
    if tensors[0].device.type == "cuda" and case["M"] <= 16:
        return "torch._int_mm wants more than 16 rows on GPUs"
    return None


def worth_compiling(case: Case, *tensors: Tensor) -> str | None:
    why = worth_tuning(case) if tensors[0].device.type == "cuda" else None
    return why or needs("torchao")(case, *tensors)


def torchao_layer(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = plain_layer(w, bias)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(layer, dynamic=False), x


def dynamic_layer(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    # One scale and zero point for all of x, float32 in and out: unsigned activations, so oneDNN
    # takes its VNNI path. (Its signed one runs thousands of times slower without AMX.)
    model = nn.Sequential(plain_layer(w, bias).float())
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8), x.float()


def flops(case: Case) -> float:
    return 2.0 * case["M"] * case["N"] * case["K"]


def bytes_moved(case: Case) -> float:
    M, N, K = case["M"], case["N"], case["K"]
    return M * (K + 4.0) + N * (K + 4.0) + (M * output_width(case) + N) * case.dtype.itemsize


BENCHMARK = Benchmark(
    "gemm_w8a8",
    CASES,
    inputs,
    [
        *implementations("gemm_w8a8", product, integers),
        *end_to_end(),
        Provider("fewstep native, kernel", kernel, "op", "native"),
        *hopper_tilings("gemm_w8a8", integers),
        *byte_outputs("gemm_w8a8", integers),
        baseline("fewstep, activation apart", product_then_activation, floats, needs_activation),
        baseline("torch linear", call, torch_layer),
        Provider(
            "torch._int_mm alone",
            int_mm_alone,
            "baseline",
            unless=linear_only(enough_rows),
            devices=("cuda",),
        ),
        baseline("torch._int_mm, eager scales", int_mm, int_mm_operands, linear_only(enough_rows)),
        baseline("torch._int_mm, eager, from x", call, int_mm_from_x, linear_only(enough_rows)),
        baseline("torch dynamic int8", call, dynamic_layer, linear_only(on_cpu)),
        baseline(
            "torchao int8, compiled", call, torchao_layer, linear_only(worth_compiling), "torchao"
        ),
        baseline(
            "ONNX Runtime DynamicQuantizeMatMul",
            call,
            onnx_int8,
            linear_only(needs_onnx),
            "onnxruntime",
        ),
        baseline(
            "OpenVINO int8, dynamic",
            call,
            openvino_int8,
            linear_only(needs("openvino", "cpu")),
            "openvino",
        ),
        *int8_peers(),
        vnni_limit(),
        matmul_limit(torch.int8),
    ],
    flops,
    bytes_moved,
)
