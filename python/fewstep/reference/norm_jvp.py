"""Oracle of `fewstep.ops.norm_jvp`: the tangent written out by hand.

    u = x - mean(x)                         t_u = t_x - mean(t_x)            kind "layer"
    u = x                                   t_u = t_x                        kind "rms"
    rstd = (mean(u^2) + eps)^-1/2           a = mean(n t_u)
    n = rstd u                              t_n = rstd (t_u - n a)
    z = n weight + bias                     t_z = t_n weight
    y = z (1 + scale) + shift               t_y = (1 + scale) t_z + t_scale z + t_shift

x, t_x, y, t_y [..., C], means over the last axis; weight, bias [C]; scale, shift and their tangents
broadcast against x. What is None is zero (weight: one). stats [..., 4] holds mean(x), rstd,
mean(t_x) and a. Nothing here is taken from torch's own forward mode. Runs in float64 for float64
inputs, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def norm_jvp(
    x: Tensor,
    t_x: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, t_y, stats) in the accumulation dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype)
    t_x = torch.zeros_like(x) if t_x is None else t_x.to(dtype)
    mean, t_mean = (
        v.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(v[..., :1])
        for v in (x, t_x)
    )
    u, t_u = x - mean, t_x - t_mean
    rstd = (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    n = rstd * u
    a = (n * t_u).mean(-1, keepdim=True)
    t_n = rstd * (t_u - n * a)
    z, t_z = n, t_n
    if weight is not None:
        z, t_z = z * weight.to(dtype), t_z * weight.to(dtype)
    if bias is not None:
        z = z + bias.to(dtype)
    y, t_y = z, t_z
    if scale is not None:
        y, t_y = z * (1 + scale.to(dtype)), t_z * (1 + scale.to(dtype))
    if t_scale is not None:
        t_y = t_y + t_scale.to(dtype) * z
    if shift is not None:
        y = y + shift.to(dtype)
    if t_shift is not None:
        t_y = t_y + t_shift.to(dtype)
    return y, t_y, torch.cat([mean, rstd, t_mean, a], -1)
