"""Oracle of `fewstep.ops.gemm_w4a8`.

    top_n = max_g s_ng     f_ng = round(4096 (s_ng / top_n))     w8_nk = (q_nk f_ng + 128) >> 8
    out   = gemm_w8a8(a, a_scale, w8, top / 16, ...)

f is rounded to nearest, ties to even, after one float32 division and an exact product; the shift
rounds down. A row with a scale that is NaN has f 0 and the scale NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gemm_w8a8 import gemm_w8a8
from .quantize_int4 import unpack_nibbles


def fold_factors(w_scale: Tensor) -> Tensor:
    """Return f as int16 [N, K / G], in [0, 4096]; 0 where it is undefined."""
    s = w_scale.float()
    if s.shape[1] == 0:
        return s.to(torch.int16)
    factor = torch.round(4096 * (s / s.amax(1, keepdim=True)))
    return factor.nan_to_num(0.0).clamp(0, 4096).to(torch.int16)


def fold_int4(w: Tensor, w_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 weight [N, K] and its scale [N] float32 that a 4-bit weight stands for."""
    q = unpack_nibbles(w)
    if w_scale.shape[1] == 0:
        return q, w_scale.new_ones(w_scale.shape[0], dtype=torch.float32)
    products = q.to(torch.int32).unflatten(1, (w_scale.shape[1], -1))
    products = products * fold_factors(w_scale).to(torch.int32)[..., None]
    return ((products + 128) >> 8).to(torch.int8).flatten(1), w_scale.float().amax(1) / 16


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
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the scaled product with the folded weight; float64 throughout."""
    return gemm_w8a8(
        *(a, a_scale, *fold_int4(w, w_scale)),
        bias=bias,
        smooth=smooth,
        rotate=rotate,
        down=down,
        up=up,
        low=low,
        activation=activation,
        gate=gate,
        residual=residual,
        out_dtype=out_dtype,
    )
