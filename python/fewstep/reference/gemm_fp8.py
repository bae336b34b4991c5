"""Oracle of `fewstep.ops.gemm_fp8`.

    out_mn = sum_k a_mk w_nk * a_scale_m * w_scale_n + bias_n + sum_r low_mr up_nr

and what follows it, as in `reference.gemm_w8a8`, on e4m3 values. Without a_scale, a is floating and
quantised first (`reference.quantize_fp8`); low is then a down^T, rounded to a's dtype.
With a scale for each 128 k of a row of a, and for 128 rows by 128 k of w, or one a row, operands
take their scales before the product.
A product is a multiple of 2^-18 below 2^18, so for K < 2^17 the sums are exact in float64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._prologue import project
from .gemm_w8a8 import gemm_w8a8
from .quantize_fp8 import quantize_fp8

BLOCK = 128


def spread_scales(scale: Tensor, N: int, K: int) -> Tensor:
    """Return scales of rows as [N, 1], of squares, [ceil(N / 128), ceil(K / 128)], as [N, K]."""
    if scale.dim() == 1:
        return scale[:, None]
    return scale.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]


def gemm_fp8(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    *,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    low: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """Return the scaled product; float64 throughout. `rest` is that of `gemm_w8a8`."""
    if down is not None:
        low = project(a, down)
    if a_scale is None:
        block = BLOCK if w_scale.dim() == 2 else None
        a, a_scale = quantize_fp8(a, block=block, smooth=smooth, rotate=rotate)
    if a_scale.dim() == a.dim():
        a = a.double() * a_scale.double().repeat_interleave(BLOCK, -1)[..., : a.shape[-1]]
        w = w.double() * spread_scales(w_scale.double(), *w.shape)
        a_scale, w_scale = a.new_ones(a.shape[:-1]), w.new_ones(w.shape[0])
    return gemm_w8a8(a, a_scale, w, w_scale, low=low, **rest)
