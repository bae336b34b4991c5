"""What the benchmarks of low-bit linear layers share: peers on the CPU, and the rate of vpdpbusd.

A peer is `make(case, x, w, ..., bias)` of one layer with the weight that the op has. Packages that
are not requirements are imported when a peer is made; see `providers.needs`.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import _native, ops
from ..ops._epilogue import activate, width
from ..ops._gemm import bits
from ..ops.quantize_int4 import unpack_nibbles
from .model import Case, Provider
from .providers import needs

PROBE_ITERATIONS = 1_000_000

# (M, N, K) of public models' linear layers, for GPUs: images of 1024 x 1024 pixels; SDXL, SANA and
# PixArt with guidance (batch 2). Qwen-Image's image stream has FLUX.1's shapes.
MODEL_SHAPES = {
    "FLUX.1 image qkv": (4096, 9216, 3072),
    "FLUX.1 image out": (4096, 3072, 3072),
    "FLUX.1 image ff1": (4096, 12288, 3072),
    "FLUX.1 image ff2": (4096, 3072, 12288),
    "FLUX.1 text qkv": (512, 9216, 3072),
    "FLUX.1 text out": (512, 3072, 3072),
    "FLUX.1 text ff1": (512, 12288, 3072),
    "FLUX.1 text ff2": (512, 3072, 12288),
    "FLUX.1 single qkv and mlp": (4608, 21504, 3072),
    "FLUX.1 single out": (4608, 3072, 15360),
    "SDXL 1280 proj, batch 2": (2048, 1280, 1280),
    "SDXL 1280 ff1": (2048, 10240, 1280),
    "SDXL 1280 ff2": (2048, 1280, 5120),
    "SDXL 640 proj, batch 2": (8192, 640, 640),
    "SDXL 640 ff1": (8192, 5120, 640),
    "SDXL 640 ff2": (8192, 640, 2560),
    "SDXL 1280 text k, v": (154, 1280, 2048),
    "SDXL 640 text k, v": (154, 640, 2048),
    "SANA qkv": (2048, 6720, 2240),
    "SANA out": (2048, 2240, 2240),
    "SANA ff1": (2048, 11200, 2240),
    "SANA ff2": (2048, 2240, 5600),
    "PixArt qkv": (8192, 3456, 1152),
    "PixArt out": (8192, 1152, 1152),
    "PixArt ff1": (8192, 4608, 1152),
    "PixArt ff2": (8192, 1152, 4608),
    "FLUX.2 single qkv and mlp": (4608, 55296, 6144),
    "FLUX.2 single out": (4608, 6144, 24576),
}


def model_cases(group: int | None = None) -> list[Case]:
    """Return MODEL_SHAPES as GPU cases in bfloat16.

    `group` adds G, the group of 4-bit weights: this one where it divides K, else 32.
    """
    cases = []
    for name, (M, N, K) in MODEL_SHAPES.items():
        groups = {} if group is None else {"G": group if K % group == 0 else 32}
        cases.append(Case(name, {"M": M, "N": N, "K": K} | groups, torch.bfloat16, ("cuda",)))
    return cases


def activation_cases(**more: int) -> list[Case]:
    """Return what the layers of MODEL_SHAPES quantise, [M, K], as GPU cases; each shape once."""
    shapes = {(M, K): name for name, (M, _, K) in reversed(MODEL_SHAPES.items())}
    return [
        Case(f"x of {name}", {"M": M, "K": K} | more, torch.bfloat16, ("cuda",))
        for (M, K), name in reversed(shapes.items())
    ]


def activated_cases(**more: int) -> list[Case]:
    """Return what feed-forward layers quantise before their second product, with its activation."""
    layers = {
        "PixArt": (4096, 1152 * 4, "gelu_tanh", ("cpu",)),
        "FLUX.1 image": (4096, 12288, "gelu_tanh", ("cuda",)),
        "SDXL 1280, batch 2": (2048, 5120, "geglu", ("cuda",)),
        "SDXL 640, batch 2": (8192, 2560, "geglu", ("cuda",)),
        "FLUX.2 image": (4096, 18432, "swiglu", ("cuda",)),
    }
    return [
        Case(
            f"{name} ff, {activation}",
            {"M": M, "K": K} | more,
            torch.bfloat16,
            devices,
            options={"activation": activation},
        )
        for name, (M, K, activation, devices) in layers.items()
    ]


def activation_of(case: Case) -> str | None:
    """Return the activation that ends the case's layer, if one does."""
    return case.options.get("activation")


def output_width(case: Case) -> int:
    """Return the columns of the case's output."""
    return width(case["N"], activation_of(case))


def torch_layer(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """Return F.linear and its operands, or with the case's activation a function of them."""
    activation = activation_of(case)
    if activation is None:
        return F.linear, x, w, bias
    return (lambda *args: activate(F.linear(*args), activation)), x, w, bias


def linear_only(
    unless: Callable[..., str | None] | None = None,
) -> Callable[..., str | None]:
    """Return `unless` for peers that end with the bias."""

    def refuse(case: Case, *tensors: Tensor) -> str | None:
        if activation_of(case) is not None:
            return "has no activation"
        return unless(case, *tensors) if unless else None

    return refuse


def needs_activation(case: Case, *tensors: Tensor) -> str | None:
    """Say that the case has no activation, or return None where it has one."""
    return None if activation_of(case) else "there is no activation to keep apart"


# By FEWSTEP_GEMM8_TILING: gemm8_plan.h's, rows x columns; gemm4_plan.h's, rows of w x rows of a.
HOPPER_TILES = {
    "gemm_w8a8": ("128 x 256", "128 x 128 in turns", "64 x 128 in turns"),
    "gemm_fp8": ("128 x 192", "128 x 128", "64 x 128 in turns"),
    "gemm_w4a8": ("128 x 256", "128 x 128", "128 x 64"),
}


@contextlib.contextmanager
def asked_tiling(tiling: int) -> Iterator[None]:
    """Have the Hopper kernel of 8-bit rows take one of its tilings; -1 leaves it to the kernel."""
    name = "FEWSTEP_GEMM8_TILING"
    before = os.environ.get(name)
    os.environ[name] = "" if tiling < 0 else str(tiling)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def hopper_tilings(
    op: str,
    operands: Callable[..., tuple[Any, ...]],
    branch: Callable[..., tuple[Tensor | None, Tensor | None]] = lambda *_: (None, None),
) -> list[Provider]:
    """Return the Hopper kernel with each of its tiles, into an output that is there already.

    `operands(case, x, w, bias)` are those of the op, then out_dtype and perhaps more;
    `branch(case, x, w, bias)` are low and up.
    Each tiling passes the gate by itself. The fastest of each shape is what the kernel's own choice
    of tiles is to become.
    """

    def make(case: Case, *tensors: Tensor) -> Callable[[], Any] | str:
        device = tensors[0].device
        if (reason := _native.unavailable(op, device)) is not None:
            return reason
        a, a_scale, w, w_scale, bias, dtype, *_ = operands(case, *tensors)
        out = torch.empty((case["M"], output_width(case)), dtype=dtype, device=device)
        given = (bits(a), a_scale, bits(w), w_scale, bias, *branch(case, *tensors), None, 0)
        end = (activation_of(case) or "", None, None, None, out)
        return functools.partial(_native.call, op, *given, *end)

    return [
        Provider(
            f"fewstep native, tiles {name}",
            make,
            "op",
            "native",
            devices=("cuda",),
            state=functools.partial(asked_tiling, i),
        )
        for i, name in enumerate(HOPPER_TILES[op])
    ]


def byte_outputs(
    op: str, operands: Callable[..., tuple[Any, ...]], activation: str | None = None
) -> list[Provider]:
    """Return the layer with the activation and outputs of 8 bits, for GPUs, as the next layer reads
    them: in 16 bits first and quantised by their own rows; by limits, in the product's end.

    `operands` as above; `activation` is that of all cases, where cases name none.
    """
    quantize = ops.quantize_int8 if op == "gemm_w8a8" else ops.quantize_fp8
    product = getattr(ops, op)

    def make(by_limits: bool, case: Case, *tensors: Tensor) -> Callable[[], Any] | str:
        device, name = tensors[0].device, activation or activation_of(case)
        if (reason := _native.unavailable(op, device)) is not None:
            return reason
        if name is None:
            return "there is no activation"
        *first, bias, dtype = operands(case, *tensors)[:6]
        options = {"bias": bias, "activation": name, "impl": "native"}
        if by_limits:
            limit = torch.full((case["M"],), 1000.0, device=device)
            options |= {"out_dtype": first[2].dtype, "limit": limit}
            return functools.partial(product, *first, **options)
        return lambda: quantize(product(*first, **options, out_dtype=dtype))

    return [
        Provider(
            f"fewstep native, 8-bit output {how}",
            functools.partial(make, by_limits),
            "op",
            "native",
            devices=("cuda",),
        )
        for by_limits, how in ((False, "of its own scales"), (True, "by limits"))
    ]


def call(layer: Callable[..., Any], *args: Any) -> Any:
    """Return layer(*args)."""
    return layer(*args)


def _call_beside(layer: Callable[..., Any], kept: Tensor, *args: Any) -> Any:
    return layer(*args)


def plain_layer(w: Tensor, bias: Tensor) -> nn.Linear:
    """Return nn.Linear with this weight and bias, without gradients."""
    layer = nn.Linear(w.shape[1], w.shape[0], device=w.device, dtype=w.dtype)
    layer.weight.data.copy_(w)
    layer.bias.data.copy_(bias)
    return layer.requires_grad_(False)


def on_cpu(case: Case, *tensors: Tensor) -> str | None:
    """Say that a peer runs on the CPU only, or return None there."""
    return None if tensors[0].device.type == "cpu" else "runs on the CPU only"


def needs_onnx(case: Case, *tensors: Tensor) -> str | None:
    """Say what ONNX Runtime lacks, or return None; `onnx` builds the graph."""
    reasons = (needs(package, "cpu")(case, *tensors) for package in ("onnxruntime", "onnx"))
    return next((reason for reason in reasons if reason is not None), None)


def _onnx_layer(
    x: Tensor, op: str, names: list[str], constants: dict[str, Tensor], **attributes: Any
) -> tuple[Any, ...]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(op, names, ["y"], domain="com.microsoft", **attributes)
    shapes = {"x": tuple(x.shape), "y": (x.shape[0], constants["bias"].shape[0])}
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name])] for name in "xy"
    )
    initial = [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()]
    graph = helper.make_graph([node], op, inputs, outputs, initial)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would go on spinning after a call, on the cores of whoever is timed next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run, None, {"x": x.float().numpy()}


def onnx_int8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """ONNX Runtime's DynamicQuantizeMatMul: one scale and zero point for x, one scale a column."""
    q, scale = ops.quantize_int8(w)
    constants = {
        "w": q.t().contiguous(),
        "scale": scale,
        "zero": torch.zeros(w.shape[0], dtype=torch.int8),
        "bias": bias.float(),
    }
    return _onnx_layer(x, "DynamicQuantizeMatMul", ["x", *constants], constants)


def onnx_int4(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """ONNX Runtime's MatMulNBits with 8-bit arithmetic (accuracy_level 4), groups of case["G"]."""
    (N, K), G = w.shape, case["G"]
    q, scale = ops.quantize_int4(w, group=G)
    constants = {
        "w": (q ^ 0x88).view(N, K // G, G // 2),  # unsigned, the zero point at 8
        "scale": scale.float().reshape(N, -1),
        "bias": bias.float(),
    }
    names = ["x", "w", "scale", "", "", "bias"]
    attributes = {"K": K, "N": N, "bits": 4, "block_size": G, "accuracy_level": 4}
    return _onnx_layer(x, "MatMulNBits", names, constants, **attributes)


def _openvino_layer(x: Tensor, weight: Any, group: int, bias: Tensor) -> tuple[Any, ...]:
    import openvino
    from openvino import opset15

    parameter = opset15.parameter([-1, x.shape[1]], openvino.Type.f32)
    product = opset15.matmul(parameter, weight, False, True)
    model = openvino.Model([opset15.add(product, bias.float().numpy())], [parameter])
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(group),
    }
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    return request.infer, {0: x.float().numpy()}


def openvino_int8(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """OpenVINO with an int8 weight and x quantised in groups of 128."""
    from openvino import opset15

    q, scale = ops.quantize_int8(w)
    weight = opset15.convert(opset15.constant(q.numpy()), "f32")
    weight = opset15.multiply(weight, opset15.constant(scale[:, None].numpy()))
    return _openvino_layer(x, weight, 128, bias)


def openvino_int4(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """OpenVINO with a 4-bit weight in groups of case["G"], and x quantised in the same."""
    import openvino
    from openvino import opset15

    (N, K), G = w.shape, case["G"]
    q, scale = ops.quantize_int4(w, group=G)
    packed = openvino.Tensor(q.numpy(), openvino.Shape([N, K // G, G]), openvino.Type.i4)
    weight = opset15.convert(opset15.constant(packed), "f32")
    weight = opset15.multiply(weight, opset15.constant(scale.float()[..., None].numpy()))
    weight = opset15.reshape(weight, opset15.constant([N, K]), False)
    infer, feed = _openvino_layer(x, weight, G, bias)
    return functools.partial(_call_beside, infer, q), feed  # the 4-bit tensor doesn't own q


def torch_int4(case: Case, x: Tensor, w: Tensor, bias: Tensor) -> tuple[Any, ...]:
    """torch's weight-only int4 op for the CPU, with the bias added."""
    q, scale = ops.quantize_int4(w, group=case["G"])
    unsigned = (unpack_nibbles(q) + 8).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1)
    scale = scale.t().to(x.dtype)
    scales_and_zeros = torch.stack([scale, torch.zeros_like(scale)], -1).contiguous()

    def layer(x: Tensor) -> Tensor:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, case["G"], scales_and_zeros)
        return product.add_(bias)

    return layer, x


def _probe(name: str, per_instruction: int, case: Case, *tensors: Tensor) -> Any:
    probe = getattr(_native._C.cpu, name) if tensors[0].device.type == "cpu" else None
    if probe is None or probe(1) != 24 * per_instruction:
        return "this machine has no such instruction"
    return functools.partial(probe, PROBE_ITERATIONS)


def _dot_limit(instruction: str, name: str, products: int) -> Provider:
    def amount(case: Case, device: torch.device) -> float:
        return 24 * 2.0 * products * PROBE_ITERATIONS * torch.get_num_threads()

    make = functools.partial(_probe, name, 2 * products)
    return Provider(instruction, make, "limit", resource="flops", amount=amount)


def vnni_limit() -> Provider:
    """Return the rate of vpdpbusd on registers, per thread (`_C.cpu.probe_vnni`)."""
    return _dot_limit("vpdpbusd", "probe_vnni", 64)


def bf16_limit() -> Provider:
    """Return the rate of vdpbf16ps on registers, per thread (`_C.cpu.probe_bf16`)."""
    return _dot_limit("vdpbf16ps", "probe_bf16", 32)
