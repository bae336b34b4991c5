"""Oracle of `fewstep.ops.gemm_fp8`.

    out_mn = sum_k a_mk w_nk * a_scale_m * w_scale_n + bias_n + sum_r low_mr up_nr

and what follows it, as in `reference.gemm_w8a8`, on e4m3 values. Without a_scale, a is floating and
quantised first (`reference.quantize_fp8`); low is then a down^T, rounded to a's dtype.
A product is a multiple of 2^-18 below 2^18, so for K < 2^17 the sums are exact in float64.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._prologue import project
from .gemm_w8a8 import gemm_w8a8
from .quantize_fp8 import quantize_fp8


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
        a, a_scale = quantize_fp8(a, smooth=smooth, rotate=rotate)
    return gemm_w8a8(a, a_scale, w, w_scale, low=low, **rest)
