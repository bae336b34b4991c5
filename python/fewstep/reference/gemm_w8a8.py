"""Oracle of `fewstep.ops.gemm_w8a8`.

    acc_mn = sum_k a_mk w_nk                              exact
    y_mn   = acc_mn * a_scale_m * w_scale_n + bias_n + sum_r low_mr up_nr
    out    = residual + gate * activation(y)              `reference/_epilogue.py`

rounded once to out_dtype. Without a_scale, a is floating and quantised first
(`reference.quantize_int8`); low is then a down^T, rounded to a's dtype.
The sums are exact in float64: |acc| < 2^31 for K < 2^17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._epilogue import finish
from ._prologue import project
from .quantize_int8 import quantize_int8


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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the scaled product; float64 throughout."""
    if down is not None:
        low = project(a, down)
    if a_scale is None:
        a, a_scale = quantize_int8(a, smooth=smooth, rotate=rotate)
    acc = a.double() @ w.double().mT
    out = acc * a_scale.double()[..., None] * w_scale.double()
    if bias is not None:
        out = out + bias.double()
    if up is not None and low is not None:
        out = out + low.double() @ up.double().mT
    return finish(out, activation, gate, residual).to(out_dtype)
