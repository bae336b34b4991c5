"""e4m3 x e4m3 product with float32 sums, scaled per row and per column.

    acc_mn = sum_k a_mk w_nk                                  products exact, sums in float32
    y_mn   = acc_mn * a_scale_m * w_scale_n + bias_n + sum_r low_mr up_nr
    out    = residual + gate * activation(y)                  rounded once to out_dtype

or, where a has scales of blocks, in the place of acc_mn * a_scale_m * w_scale_n, with b = k // 128

    sum_b (sum_{k in b} a_mk w_nk) * a_scale_mb * w_scale_nb  w_scale_n, or that of n's 128 rows

a        [..., M, K]  float8_e4m3fn    a_scale  [..., M] or [..., M, ceil(K / 128)]  float32
w        [N, K]       float8_e4m3fn    w_scale  [N] or, with blocks of a,
                                                [ceil(N / 128), ceil(K / 128)]       float32
bias     [N]          float32, bfloat16 or float16
out      [..., M, N]  float32, bfloat16 or float16
smooth, rotate        what comes before the rows of a floating a are quantised: `ops/_prologue.py`
down, up, low         the low-rank branch: `ops/_gemm.py`; derivatives: `ops/_gemm_autograd.py`
activation, gate, residual, int8 outputs, and their error: `ops/_epilogue.py`

A product of two e4m3 values has 8 bits and is exact in float32; K of them are added in float32 and
scaled as in `gemm_w8a8`. Without a branch and before what follows y, with S = sum_k |a_mk w_nk|
a_scale_m w_scale_n,

    |y - exact| <= (K + 3) 2^-24 S + 2^-24 |exact|            on CPUs: in order of k, by pairs.

With blocks K is at most 128 in this, and B = ceil(K / 128) sums are added instead of scaled:

    |y - exact| <= (min(K, 128) + B + 3) 2^-24 S + 2^-24 |exact|.

Tensor cores of Hopper add with about 13 bits behind the point of the largest term, cutting off the
rest. There no more than 128 products are added so before float32 takes over, and the error is

    |y - exact| <= (0.017 + K 2^-24) S + 2^-24 |exact|        at the very worst,

and of the order of 2^-12 S for values of random sign (docs/ops/gemm_fp8.md). NaN (0x7f, 0xff) makes
its row or column of out NaN.

Without `a_scale`, `a` is floating and is quantised first, exactly as by `quantize_fp8` row by row,
or by blocks of 128 where w has scales of blocks, in the same call. out_dtype is then a's
dtype unless given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.gemm_fp8 import gemm_fp8 as _reference
from ..reference.gemm_fp8 import spread_scales
from ._expect import expect_tensor
from ._gemm import (
    E4M3,
    Operands,
    expect,
    expect_operands,
    gate_layers,
    gate_tilings,
    register_product,
    rounding_dtype,
)
from ._requantize import gate_limits, register_requantized
from ._select import select
from .quantize_fp8 import BLOCK

__all__ = ["gemm_fp8"]


def _launcher() -> Callable[..., None]:
    from ..kernels.gemm_fp8 import launch_gemm_fp8

    return launch_gemm_fp8


IMPLEMENTATIONS, _op, _op_int8 = register_product(
    "gemm_fp8",
    form=E4M3,
    reference=_reference,
    launcher=_launcher,
    weight=lambda p: p.w.float() * spread_scales(p.w_scale, *p.w.shape),
)
_requantized = register_requantized("gemm_fp8", E4M3, lambda: IMPLEMENTATIONS)


def _validate(p: Operands) -> None:
    w = p.w
    expect_tensor("w", w)
    expect_tensor("w_scale", p.w_scale)
    if len(w.shape) != 2 or w.dtype != E4M3:
        raise ValueError(f"w: expected {E4M3} [N, K], got {w.dtype} {list(w.shape)}")
    N, K = w.shape[0], p.a.shape[-1] if p.a.shape else 0
    squares = p.w_scale.dim() == 2
    blocked = isinstance(p.a_scale, Tensor) and 0 < p.a.dim() == p.a_scale.dim()
    blocks = (-(-K // BLOCK),) if squares or blocked else ()
    expect_operands(p, (N, K), form=E4M3, blocks=blocks)
    shape = (-(-N // BLOCK), *blocks) if squares else (N,)
    expect("w_scale", p.w_scale, shape, (torch.float32,), p.a.device)


def gemm_fp8(
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
    """Return (a * a_scale) @ (w * w_scale).T + bias + low @ up.T for e4m3 a and w.

    Args:
        a: float8_e4m3fn [..., M, K], as from `quantize_fp8`. Floating without `a_scale`.
        a_scale: float32 [..., M], or [..., M, ceil(K / 128)] as with `block=128`, or None to
            quantise `a` here.
        w: float8_e4m3fn [N, K].
        w_scale: float32 [N], or [ceil(N / 128), ceil(K / 128)] of squares: a then has blocks too.
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
            int8: quantised again, row by row. float8_e4m3fn: with limit, by it.
        limit: float32 [..., M], of float8_e4m3fn outputs: the magnitude that each row is
            expected to keep to, in the place of its own (`ops/_requantize.py`).
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
        DerivativeError: a scale or an e4m3 operand carries a tangent or requires grad, or with
            out_dtype int8 any input does.
    """
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
    return op(*operands, select("gemm_fp8", impl, IMPLEMENTATIONS, *operands[:-1], out_dtype))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []

    def draw(*shape: int) -> Tensor:
        return (64 * torch.randn(shape, generator=generator)).to(E4M3)

    for M, N, K in ((1, 64, 64), (77, 130, 96), (300, 257, 1031)):
        a, w = draw(M, K).to(device), draw(N, K).to(device)
        a_scale, w_scale, bias = (torch.rand(n, generator=generator).to(device) for n in (M, N, N))
        # Scales make the terms' sizes add up to at most some K: see the bound above, typical signs.
        a_scale, w_scale = a_scale / 64, w_scale / 64
        cases.append(((a, a_scale, w, w_scale), {"bias": bias}, 2.0**-22, 2.0**-11 * K))

    def weight(N: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        w = (64 * torch.randn((N, K), generator=generator)).to(E4M3)
        return w, torch.full((N,), K**-0.5 / 64)

    cases += gate_layers(device, weight) + gate_tilings(device, weight)
    return cases + gate_limits(device, weight)
