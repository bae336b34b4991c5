"""int8 activations x 4-bit weights with exact integer accumulation: 4-bit storage, 8-bit sums.

    top_n  = max_g s_ng      f_ng = round(4096 (s_ng / top_n))     w8_nk = (q_nk f_ng + 128) >> 8
    acc_mn = sum_k a_mk w8_nk                                         exact in int32, K < 131,072
    y_mn   = float(acc_mn) * a_scale_m * (top_n / 16) + bias_n + sum_r low_mr up_nr
    out    = residual + gate * activation(y)                          rounded once to out_dtype

a        [..., M, K]  int8             a_scale  [..., M]     float32
w        [N, K / 2]   uint8            w_scale  [N, K / G]   bfloat16 or float16, as `quantize_int4`
bias     [N]          float32, bfloat16 or float16
out      [..., M, N'] float32, bfloat16 or float16
smooth, rotate        what comes before the rows of a floating a are quantised: `ops/_prologue.py`
down, up, low         the low-rank branch: `ops/_gemm.py`; derivatives: `ops/_gemm_autograd.py`
activation, gate, residual, int8 outputs, and their error: `ops/_epilogue.py`

The scales of the groups are folded into an int8 weight with one scale per column, so the product is
`gemm_w8a8`'s, on any machine that has one: no promotion of sums group by group. f is taken with one
float32 division and rounded to nearest, ties to even; q f fits 16 bits, the shift rounds down, and
|w8| <= 128: every implementation makes the same integers. Against q s the fold rounds by at most
1/2 + 1/64 of top / 16, a 112th of the largest weight 7 top; docs/ops/gemm_w4a8.md measures it.

Without `a_scale`, `a` is floating and is quantised first, as by `quantize_int8`, in the same call.
Sums, scaling and their error are `gemm_w8a8`'s.

Scales below zero stand for no weight: `quantize_int4` makes none and layers load none. The values
of a tensor are not looked at here, and what comes of one differs between implementations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.gemm_w4a8 import fold_int4
from ..reference.gemm_w4a8 import gemm_w4a8 as _reference
from ._expect import expect_tensor
from ._gemm import (
    Operands,
    expect_operands,
    gate_layers,
    gate_tilings,
    register_product,
    rounding_dtype,
)
from ._gemm_short import run_short
from ._select import select
from .quantize_int4 import expect_int4

__all__ = ["fold_int4", "gemm_w4a8"]

# As _gemm.py's, for csrc/include/fewstep/cuda/gemm4_plan.h, of whole groups.
TILED_SHAPES = ((1490, 1492, 576), (1094, 1096, 192))


def _launcher() -> Callable[..., None]:
    from ..kernels.gemm_w4a8 import launch_gemm_w4a8

    return launch_gemm_w4a8


def _weight(p: Operands) -> Tensor:
    w8, scale = fold_int4(p.w, p.w_scale)
    return w8.float() * scale[:, None]


IMPLEMENTATIONS, _op, _op_int8 = register_product(
    "gemm_w4a8",
    reference=_reference,
    launcher=_launcher,
    weight=_weight,
)


def gemm_w4a8(
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
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return (a * a_scale) @ W.T + bias + low @ up.T for int8 a and a 4-bit weight W.

    Args:
        a: int8 [..., M, K], as from `quantize_int8`; K < 131,072. Floating without `a_scale`.
        a_scale: float32 [..., M], or None to quantise `a` here.
        w: uint8 [N, K / 2], as from `quantize_int4`.
        w_scale: bfloat16 or float16 [N, K / G] with G 32, 64 or 128; not negative.
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
            int8: quantised again, row by row.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        [..., M, N'] in out_dtype, N' columns being left of N. Differentiable with respect to
        floating a, bias, down, up, low, gate and residual, in both modes. For int8 (q, scale), as
        `quantize_int8` of the result in a's dtype if floating, else in bfloat16.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: a scale carries a tangent or requires grad, or with out_dtype int8 any
            input does.
    """
    bare = low is None and gate is None and residual is None
    if bare and (impl == "auto" or impl == "native"):
        first, branch = (a, a_scale, w, w_scale, bias), (down, up)
        out = run_short("gemm_w4a8", *first, smooth, rotate, *branch, activation, out_dtype)
        if out is not None:
            return out
    expect_tensor("a", a)
    prologue, branch = (smooth, rotate), (down, up, low)
    epilogue, rounded = (activation, gate, residual), rounding_dtype(a, out_dtype)
    first = (a, a_scale, w, w_scale, bias)
    operands = Operands(*first, *prologue, *branch, *epilogue, rounded)
    expect_int4(w, w_scale)
    K = a.shape[-1] if a.shape else 0
    if K % 2:
        raise ValueError(f"a: expected an even K, got {K}")
    expect_operands(operands, (w.shape[0], K // 2))
    op = _op_int8 if out_dtype == torch.int8 else _op
    return op(*operands, select("gemm_w4a8", impl, IMPLEMENTATIONS, *operands[:-1], out_dtype))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for M, N, K, group in ((1, 64, 64, 32), (77, 130, 192, 64), (300, 257, 1024, 128)):
        a = torch.randint(-128, 128, (M, K), generator=generator, dtype=torch.int8).to(device)
        w = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8).to(device)
        w_scale = torch.rand((N, K // group), generator=generator).bfloat16().to(device)
        a_scale, bias = (torch.rand(n, generator=generator).to(device) for n in (M, N))
        low, up = (torch.randn((n, 8), generator=generator).to(device) for n in (M, N))
        branch = {"low": low, "up": up}  # float32, which the Hopper kernel does not take
        # Four roundings and the branch's ten, relative to the largest |acc| a_scale top / 16 of
        # these shapes, which is beyond what 8 products of the branch add up to.
        atol = 14 * 2.0**-24 * 2**7 * K / 16
        args = a, a_scale / 128, w, w_scale
        cases += [(args, {"bias": bias, **extra}, 2.0**-22, atol) for extra in (branch, {})]

    def weight(N: int, K: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        w = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
        scale = torch.rand((N, K // 64), generator=generator) + 0.5
        return w, (scale * K**-0.5 / 8).bfloat16()

    return cases + gate_layers(device, weight) + gate_tilings(device, weight, TILED_SHAPES)
