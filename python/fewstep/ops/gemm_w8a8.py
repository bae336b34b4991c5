"""int8 x int8 product with exact integer accumulation, scaled per row and per column.

    acc_mn = sum_k a_mk w_nk                                  exact in int32, K < 131,072
    y_mn   = float(acc_mn) * a_scale_m * w_scale_n + bias_n + sum_r low_mr up_nr
    out    = residual + gate * activation(y)                  rounded once to out_dtype

a        [..., M, K]  int8             a_scale  [..., M]  float32
w        [N, K]       int8             w_scale  [N]       float32
bias     [N]          float32, bfloat16 or float16
out      [..., M, N'] float32, bfloat16 or float16
smooth, rotate        what comes before the rows of a floating a are quantised: `ops/_prologue.py`
down, up, low         the low-rank branch: `ops/_gemm.py`; derivatives: `ops/_gemm_autograd.py`
activation, gate, residual, int8 outputs, and their error: `ops/_epilogue.py`

The scaling runs in float32 in the order written; the last product and the bias are one fused
multiply-add in native code, and may be two operations in Triton. Each of the at most four
roundings is relative 2^-24, so without a branch and before what follows y

    |y - exact| <= 3 * 2^-24 |acc a_scale w_scale| + 2^-24 |exact|.

Without `a_scale`, `a` is floating and is quantised first, exactly as by `quantize_int8`, in the
same call: a whole linear layer costs one dispatch. out_dtype is then a's dtype unless given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.gemm_w8a8 import gemm_w8a8 as _reference
from ._expect import expect_tensor
from ._gemm import (
    INT8,
    Operands,
    expect,
    expect_operands,
    gate_layers,
    gate_tilings,
    register_product,
    rounding_dtype,
)
from ._gemm_short import run_short
from ._requantize import gate_limits, register_requantized
from ._select import select

__all__ = ["gemm_w8a8"]


def _expect_weight(w: Tensor, w_scale: Tensor) -> None:
    expect_tensor("w", w)
    expect_tensor("w_scale", w_scale)
    if len(w.shape) != 2 or w.dtype != torch.int8:
        raise ValueError(f"w: expected torch.int8 [N, K], got {w.dtype} {list(w.shape)}")


def _launcher() -> Callable[..., None]:
    from ..kernels.gemm_w8a8 import launch_gemm_w8a8

    return launch_gemm_w8a8


IMPLEMENTATIONS, _op, _op_int8 = register_product(
    "gemm_w8a8",
    reference=_reference,
    launcher=_launcher,
    weight=lambda p: p.w.float() * p.w_scale[:, None],
)
_requantized = register_requantized("gemm_w8a8", INT8, lambda: IMPLEMENTATIONS)


def _validate(p: Operands) -> None:
    _expect_weight(p.w, p.w_scale)
    expect_operands(p, (p.w.shape[0], p.a.shape[-1] if p.a.shape else 0))
    expect("w_scale", p.w_scale, (p.w.shape[0],), (torch.float32,), p.a.device)


def gemm_w8a8(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    up: Tensor | None = None,
    low: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    limit: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Return (a * a_scale) @ (w * w_scale).T + bias + low @ up.T for int8 a and w.

    Args:
        a: int8 [..., M, K], as from `quantize_int8`; K < 131,072. Floating without `a_scale`.
        a_scale: float32 [..., M], or None to quantise `a` here.
        w: int8 [N, K].
        w_scale: float32 [N].
        bias: floating [N], added in float32.
        smooth: floating [K], positive, for floating a: its columns are divided by it first.
        rotate: 0, or 16, 32, 64, 128 or 256 for floating a: every so many neighbours are rotated
            after that. W must be rotated too, and have been multiplied by smooth.
        down: [R, K] of floating a, in its dtype: low is a @ down.T.
        up: floating [N, R]: the low-rank branch, with down or low.
        low: floating [..., M, R], instead of down.
        activation: None, "gelu", "gelu_tanh", "silu", or "geglu" and "swiglu", which halve N.
        gate: floating [N'], [..., 1, N'] or [..., M, N']: outputs are multiplied by it.
        residual: floating [..., M, N'], added last.
        out_dtype: float32, bfloat16 or float16; a's dtype if floating, else float32 by default.
            int8: quantised again, row by row. With limit: by it.
        limit: float32 [..., M], of int8 outputs: the magnitude that each row is expected to
            keep to, in the place of its own (`ops/_requantize.py`).
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [..., M, N'] in out_dtype, N' columns being left of N. Differentiable with respect to
        floating a, bias, down, up, low, gate and residual, in both modes. For int8 (q, scale), as
        `quantize_int8` of the result in a's dtype if floating, else in bfloat16. With limit
        (q, scale, amax, exceeded): the rows' magnitudes, and how many outputs exceed their limit.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: a scale carries a tangent or requires grad, or with out_dtype int8 any
            input does.
    """
    bare = low is None and gate is None and residual is None
    if bare and limit is None and (impl == "auto" or impl == "native"):
        first, branch = (a, a_scale, w, w_scale, bias), (down, up)
        out = run_short("gemm_w8a8", *first, smooth, rotate, *branch, activation, out_dtype)
        if out is not None:
            return out
    expect_tensor("a", a)
    prologue, branch = (smooth, rotate), (down, up, low)
    epilogue = (activation, gate, residual)
    rounded = rounding_dtype(a, None if limit is not None else out_dtype)
    first = (a, a_scale, w, w_scale, bias)
    operands = Operands(*first, *prologue, *branch, *epilogue, rounded)
    _validate(operands)
    if limit is not None:
        return _requantized(operands._replace(out_dtype=torch.float32), limit, out_dtype, impl)
    op = _op_int8 if out_dtype == torch.int8 else _op
    return op(*operands, select("gemm_w8a8", impl, IMPLEMENTATIONS, *operands[:-1], out_dtype))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for M, N, K in ((1, 64, 64), (77, 130, 96), (300, 257, 1031)):
        a = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8).to(device)
        w = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8).to(device)
        a_scale, w_scale, bias = (torch.rand(n, generator=generator).to(device) for n in (M, N, N))
        # Positive bias, product of either sign: cancellation is covered by the absolute term,
        # 4 * 2^-24 of the largest |acc| a_scale of these shapes, 2^7 * 1031.
        atol = 4 * 2.0**-24 * 2**7 * K
        cases.append(((a, a_scale / 128, w, w_scale), {"bias": bias}, 2.0**-22, atol))

    def weight(N: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        w = torch.randint(-128, 128, (N, K), generator=generator, dtype=torch.int8)
        return w, torch.full((N,), K**-0.5 / 128)

    cases += gate_layers(device, weight) + gate_tilings(device, weight)
    return cases + gate_limits(device, weight)
