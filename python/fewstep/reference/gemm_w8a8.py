"""Oracle of `fewstep.ops.gemm_w8a8`.

    acc_mn = sum_k a_mk w_nk                              exact
    out_mn = acc_mn * a_scale_m * w_scale_n + bias_n      rounded once to out_dtype

Without a_scale, a is floating and quantised first (`reference.quantize_int8`).
The sums are exact in float64: |acc| < 2^31 for K < 2^17.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize_int8 import quantize_int8


def gemm_w8a8(
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the scaled product; float64 throughout."""
    if a_scale is None:
        a, a_scale = quantize_int8(a)
    acc = a.double() @ w.double().mT
    out = acc * a_scale.double()[..., None] * w_scale.double()
    if bias is not None:
        out = out + bias.double()
    return out.to(out_dtype)
