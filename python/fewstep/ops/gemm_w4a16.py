"""Activations as they are x 4-bit weights: for few rows, where reading the weight is all the work.

    y_mn = sum_k x_mk q_nk s_ng(k) + bias_n + sum_r low_mr up_nr
    out  = residual + gate * activation(y)                                rounded once to x's dtype

x        [..., M, K]  float32, bfloat16 or float16
w        [N, K / 2]   uint8            w_scale  [N, K / G]   bfloat16 or float16, as `quantize_int4`
bias     [N]          float32, bfloat16 or float16
out      [..., M, N'] x's dtype
down, up, low         the low-rank branch: `ops/_gemm.py`; derivatives: `ops/_gemm_autograd.py`
activation, gate, residual, int8 outputs, and their error: `ops/_epilogue.py`

q s is exact in float32 (4 + 11 bits). Sums are float32 in any order and grouping, so without a
branch and before what follows y

    |y - exact| <= (K + 2) 2^-24 sum_k |x_mk q_nk s_ng| + 2^-24 |exact|,

for 16-bit x too: tensor cores multiply x by q, which is exact, and a group's sum is scaled in
float32. Modulation layers (adaLN), time and text embeddings have one row per image; for many rows
`gemm_w4a8` has eight times the arithmetic rate of float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from ..reference.gemm_w4a16 import dequantize_int4
from ..reference.gemm_w4a16 import gemm_w4a16 as _reference
from ._epilogue import expect_epilogue, width
from ._expect import expect_tensor, expect_tensors
from ._gemm import epilogue_rows, expect, expect_branch
from ._gemm_autograd import differentiate
from ._gemm_rows import quantise_rows
from ._layout import FLOATS, contiguous, matrix, unit_stride
from ._prologue import project
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from .gemv_w4a16_grouped import NO_RUN_YET, launch_few_rows, refuse_few_rows
from .gemv_w4a16_grouped import gate_cases as gate_cases_of_groups
from .quantize_int4 import expect_int4
from .quantize_int8 import run_native as quantize_native
from .quantize_int8 import run_reference as quantize_reference

__all__ = ["dequantize_int4", "gemm_w4a16"]


class _Operands(NamedTuple):
    """What an implementation gets, in the order of the op's schema."""

    x: Tensor
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    low: Tensor | None
    activation: str | None
    gate: Tensor | None
    residual: Tensor | None

    def new_output(self, dtype: torch.dtype | None = None) -> Tensor:
        N = width(self.w.shape[0], self.activation)
        return self.x.new_empty((*self.x.shape[:-1], N), dtype=dtype)


def _run_reference(*args: Any) -> Tensor:
    options = _Operands(*args)._asdict()
    first = [options.pop(name) for name in ("x", "w", "w_scale")]
    return _reference(*first, **options).contiguous()


def _run_kernel(launch: Any, p: _Operands) -> Tensor:
    out = p.new_output()
    if out.numel():
        low = None
        if p.up is not None:
            low = matrix(project(p.x, p.down, p.low)).contiguous()
        weight = (p.w.contiguous(), p.w_scale.contiguous())
        x, bias, up = unit_stride(matrix(p.x)), contiguous(p.bias), contiguous(p.up)
        end = epilogue_rows(p.activation, p.gate, p.residual, p.x.shape[:-1])
        launch(x, *weight, bias, low, up, *end, matrix(out))
    return out


def _launch_native(*args: Any) -> None:
    *left, activation, gate, residual, out = args
    _native.call("gemm_w4a16", *left, activation or "", gate, residual, out)


def _run_native(*args: Any) -> Tensor:
    p = _Operands(*args)
    return _run_kernel(_launch_native if p.x.device.type == "cpu" else launch_few_rows, p)


def _refuse_native(
    x: Tensor,
    *args: Any,
    up: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> str | None:
    if x.device.type != "cuda":
        return refuse_native("gemm_w4a16", [x], FLOATS)
    reason = refuse_few_rows(x)
    plain = activation is None and all(part is None for part in (up, gate, residual))
    if reason is None and not (plain and out_dtype in (None, x.dtype)):
        reason = "the CUDA kernel: expected a product and a bias, got a branch or an end"
    return reason


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.gemm_w4a16 import launch_gemm_w4a16

    return _run_kernel(launch_gemm_w4a16, _Operands(*args))


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native, held_back=NO_RUN_YET),
    Implementation("triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(*args: Any) -> Tensor:
    return _Operands(*args[:-1]).new_output()


def _fake_int8(*args: Any) -> tuple[Tensor, Tensor]:
    p = _Operands(*args[:-1])
    return p.new_output(torch.int8), p.x.new_empty(p.x.shape[:-1], dtype=torch.float32)


def _weight(*inputs: Any) -> Tensor:
    p = _Operands._make(inputs[: len(_Operands._fields)])
    return dequantize_int4(p.w, p.w_scale).float()


_SCHEMA = (
    "(Tensor x, Tensor w, Tensor w_scale, Tensor? bias, Tensor? down, Tensor? up, Tensor? low,"
    " str? activation, Tensor? gate, Tensor? residual, str impl) -> "
)
_op = register(
    "gemm_w4a16",
    _SCHEMA + "Tensor",
    IMPLEMENTATIONS,
    _fake,
    differentiate(" ".join(_Operands._fields), _weight, lambda: _op),
)
_op_int8 = register(
    "gemm_w4a16_int8",
    _SCHEMA + "(Tensor, Tensor)",
    (
        replace(IMPLEMENTATIONS[0], run=lambda *args: quantize_native(_run_native(*args))),
        replace(
            IMPLEMENTATIONS[1], run=lambda *args: quantise_rows(torch.int8, _run_triton(*args))
        ),
        replace(IMPLEMENTATIONS[2], run=lambda *args: quantize_reference(_run_reference(*args))),
    ),
    _fake_int8,
)


def gemm_w4a16(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    low: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return x @ W.T + bias + low @ up.T for a 4-bit weight W.

    On GPUs the native kernel is that of `gemv_w4a16_grouped`: for up to 8 rows of 16 bits, without
    a branch, an activation, a gate, a residual and int8 outputs.

    Args:
        x: floating [..., M, K].
        w: uint8 [N, K / 2], as from `quantize_int4`.
        w_scale: bfloat16 or float16 [N, K / G] with G 32, 64 or 128.
        bias: floating [N], added in float32.
        down: [R, K] in x's dtype: low is x @ down.T.
        up: floating [N, R]: the low-rank branch, with down or low.
        low: floating [..., M, R], instead of down.
        activation: None, "gelu", "gelu_tanh", "silu", or "geglu" and "swiglu", which halve N.
        gate: floating [N'], [..., 1, N'] or [..., M, N']: outputs are multiplied by it.
        residual: floating [..., M, N'], added last.
        out_dtype: x's dtype, which is the default, or int8: quantised again, row by row.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [..., M, N'] in x's dtype, N' columns being left of N. Differentiable with respect to x,
        bias, down, up, low, gate and residual, in both modes. For int8 (q, scale), as
        `quantize_int8` of that.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: a scale carries a tangent or requires grad, or with out_dtype int8 any
            input does.
    """
    expect_tensor("x", x)
    expect_tensors(bias=bias)
    if not x.shape or x.dtype not in FLOATS:
        raise ValueError(f"x: expected floating [..., M, K], got {x.dtype} {list(x.shape)}")
    expect_int4(w, w_scale)
    (*_, K), N = x.shape, w.shape[0]
    if K % 2:
        raise ValueError(f"x: expected an even K, got {K}")
    expect("w", w, (N, K // 2), (torch.uint8,), x.device)
    expect("bias", bias, (N,), FLOATS, x.device)
    expect_branch(x, N, down, up, low)
    expect_epilogue(x.shape[:-1], N, x.device, activation, gate, residual)
    if out_dtype not in (None, x.dtype, torch.int8):
        raise ValueError(f"out_dtype: expected x's {x.dtype} or torch.int8, got {out_dtype}")
    op = _op_int8 if out_dtype == torch.int8 else _op
    end = {"activation": activation, "gate": gate, "residual": residual, "out_dtype": out_dtype}
    impl = select("gemm_w4a16", impl, IMPLEMENTATIONS, x, up=up, **end)
    return op(x, w, w_scale, bias, down, up, low, activation, gate, residual, impl)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    if device.type == "cuda":  # what its native kernel takes: one problem of a group
        for (x, w, w_scale), options, *bounds in gate_cases_of_groups(device):
            if isinstance(x, Tensor):
                cases.append(((x, w[0], w_scale[0]), {"bias": options["bias"][0]}, *bounds))
    for dtype in FLOATS:
        for M, N, K, group in ((1, 64, 64, 32), (5, 130, 192, 64), (70, 257, 1024, 128)):
            x = torch.randn((M, K), generator=generator).to(device, dtype)
            w = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
            w_scale = torch.rand((N, K // group), generator=generator).bfloat16().to(device)
            bias = torch.randn(N, generator=generator).to(device, dtype)
            low, up = (torch.randn((n, 8), generator=generator).to(device, dtype) for n in (M, N))
            kwargs = {"bias": bias, "low": low, "up": up}
            # float32 sums of K terms of up to 8 with random signs: partial sums of 8 sqrt(k), and
            # as many roundings of 2^-24 of them, again with random signs: 2^-21 K / sqrt(2). Twice
            # that, and one rounding to the dtype.
            rtol, atol = torch.finfo(dtype).eps, 2.0**-20 * K
            cases.append(((x, w.to(device), w_scale), kwargs, rtol, atol))
            # The slope of silu is at most 1.1, and what it adds of its own 2^-21 of sums of 100.
            blend = torch.rand(N, generator=generator), torch.randn((M, N), generator=generator)
            gate, residual = (x.to(device, dtype) for x in blend)
            kwargs = kwargs | {"activation": "silu", "gate": gate, "residual": residual}
            cases.append(((x, w.to(device), w_scale), kwargs, rtol, 2 * atol))
    return cases
