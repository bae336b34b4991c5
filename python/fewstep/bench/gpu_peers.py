"""Other packages' low-bit linear layers on GPUs: torchao, gemlite, comfy-kitchen.

Each is `make(case, x, w, bias)` of one layer from the floating activations, made, called and
checked against torch's linear before it is timed. What a package raises on the way is why it has no
number: none of them is a requirement, and each picks kernels by architecture.

They are timed at TUNED shapes only: torchao is compiled for each, and gemlite tries its tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import ops
from ..ops.quantize_int4 import unpack_nibbles
from .model import Case, Provider, Thunk
from .products import activation_of, plain_layer
from .providers import needs

# Names of products.MODEL_SHAPES: FLUX.1's image stream, and one or two of each other width.
TUNED = (
    "FLUX.1 image qkv",
    "FLUX.1 image out",
    "FLUX.1 image ff1",
    "FLUX.1 image ff2",
    "FLUX.1 text ff1",
    "FLUX.1 single qkv and mlp",
    "SDXL 1280 proj, batch 2",
    "SDXL 1280 ff1",
    "SANA out",
    "PixArt ff1",
)
# How far outputs may be from torch's. Of normal rows and weights, int8 leaves 1.4 %, e4m3's 3 bits
# 3.7 %, and 4 bits in groups of 64 or 128 10 to 15 %; a layer of other weights 140 %.
FARTHEST = {"int8": 0.02, "fp8": 0.06, "int4": 0.25}
Layer = Callable[[Tensor], Tensor]


def worth_tuning(case: Case) -> str | None:
    """Say that the case is not one of TUNED, or has more than a linear layer, or return None."""
    if case.name not in TUNED or case.devices != ("cuda",):
        return "timed at fewer shapes: it is compiled or tuned for each"
    if activation_of(case) is not None or case.shape.get("R"):
        return "has neither an activation nor a low-rank branch"
    return None


def checked(layer: Layer, form: str, x: Tensor, w: Tensor, bias: Tensor) -> str | None:
    """Call a layer; return why it is not torch's linear to a format's precision, or None."""
    want, got = F.linear(x, w, bias).float(), layer(x).float()
    off = float((got - want).norm() / want.norm())
    return (
        None if off <= FARTHEST[form] else f"expected torch's linear, got an output {off:.2g} off"
    )


def peer(
    name: str, package: str, form: str, make: Callable[..., Layer], module: str = ""
) -> Provider:
    """Return the baseline of a package; `make(case, x, w, bias)` returns its layer.

    `form` is that of what it multiplies with fewest bits: a key of FARTHEST.
    """

    def unless(case: Case, *inputs: Any) -> str | None:
        if inputs[0].device.type != "cuda":
            return f"{package} is timed on cuda only"
        missing = needs(module or package)(case, *inputs)
        return worth_tuning(case) or (missing and f"{package} is not installed")

    def made(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Thunk | str:
        try:
            layer = make(case, x, w, bias)
            reason = checked(layer, form, x, w, bias)
        except Exception as error:  # the package's own
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return reason or (lambda: layer(x))

    return Provider(name, made, "baseline", unless=unless, package=package, devices=("cuda",))


def torchao_fp8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """torchao's FP8 weights and rows with a scale for each row, compiled."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    layer = plain_layer(w, bias)
    quantize_(layer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return torch.compile(layer, dynamic=False)


def gemlite_int8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """gemlite's A8W8 in int8."""
    from gemlite.helper import A8W8_int8_dynamic

    make = A8W8_int8_dynamic(device=x.device, dtype=x.dtype)
    return make.from_linear(plain_layer(w, bias), del_orig=False)


def gemlite_fp8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """gemlite's A8W8 in FP8."""
    from gemlite.helper import A8W8_fp8_dynamic

    make = A8W8_fp8_dynamic(device=x.device, dtype=x.dtype)
    return make.from_linear(plain_layer(w, bias), del_orig=False)


def gemlite_int4(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """gemlite's 4-bit weights in groups, with rows in FP8: its nearest to W4A8."""
    from gemlite.helper import A8W4_HQQ_INT_dynamic

    q, scale = ops.quantize_int4(w, group=case["G"])
    unsigned = (unpack_nibbles(q) + 8).to(torch.uint8)
    scale = scale.to(x.dtype).reshape(-1, 1)
    make = A8W4_HQQ_INT_dynamic(device=x.device, dtype=x.dtype)
    return make.from_weights(unsigned, scale, torch.full_like(scale, 8), bias)


def comfy_int8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """comfy-kitchen's int8 linear, without its rotation."""
    import comfy_kitchen

    q, scale = ops.quantize_int8(w)
    return lambda x: comfy_kitchen.int8_linear(x, q, scale, bias, out_dtype=x.dtype)


def comfy_int4(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> Layer:
    """comfy-kitchen's W4A8: rotated, groups of 16 with a codebook, expanded to int8 rows."""
    from comfy_kitchen.tensor.w4a8_int8 import quantize_w4a8_int8_weight, w4a8_int8_linear

    q, scale, row_scale, correction, codebook = quantize_w4a8_int8_weight(w)
    weight = q, scale, row_scale, codebook, correction
    return lambda x: w4a8_int8_linear(x, *weight, bias, out_dtype=x.dtype)


def int8_peers() -> list[Provider]:
    """Return the peers of gemm_w8a8, but for torchao, which is one on CPUs as well."""
    return [
        peer("gemlite int8", "gemlite", "int8", gemlite_int8),
        peer("comfy-kitchen int8", "comfy-kitchen", "int8", comfy_int8, "comfy_kitchen"),
    ]


def fp8_peers() -> list[Provider]:
    """Return the peers of gemm_fp8."""
    return [
        peer("torchao FP8 by rows, compiled", "torchao", "fp8", torchao_fp8),
        peer("gemlite FP8", "gemlite", "fp8", gemlite_fp8),
    ]


def int4_peers() -> list[Provider]:
    """Return the peers of gemm_w4a8."""
    return [
        peer("gemlite int4 x FP8", "gemlite", "int4", gemlite_int4),
        peer("comfy-kitchen W4A8", "comfy-kitchen", "int4", comfy_int4, "comfy_kitchen"),
    ]
