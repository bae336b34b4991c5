"""Oracle of `fewstep.ops.norm_jvp_backward`: every gradient written out by hand.

With d_y, dt_y the cotangents of y, t_y (None is zero), names as in `reference.norm_jvp`, and
<v> the mean over the last axis:

    d_shift = d_y           d_scale = d_y z + dt_y t_z        d_z  = (1 + scale) d_y + t_scale dt_y
    d_t_shift = dt_y        d_t_scale = dt_y z                d_tz = (1 + scale) dt_y
    d_bias = sum d_z        d_weight = sum d_z n + d_tz t_n
    g = d_z weight          h = d_tz weight
    J v = rstd (v - <v> - n <n v>)                            without <v> for kind "rms"
    d_t_x = J h
    d_x = J g - rstd (n <h t_n> + a d_t_x + <n h> t_n)

Gradients of what was broadcast are summed over what it was broadcast along. The result maps the
names in `wanted` to gradients in the accumulation dtype. The derivation is in
docs/ops/norm_jvp_backward.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def norm_jvp_backward(
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    wanted: Sequence[str],
    kind: str = "layer",
) -> dict[str, Tensor]:
    """Return {name: gradient}; `stats` is the third result of `norm_jvp`."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, rstd, t_mean, a = stats.to(dtype).split(1, -1)
    zeros = torch.zeros_like(x, dtype=dtype)
    d_y, dt_y, u_t = (zeros if v is None else v.to(dtype) for v in (d_y, dt_y, t_x))
    w = 1 if weight is None else weight.to(dtype)
    s = 1 if scale is None else 1 + scale.to(dtype)
    t_s = 0 if t_scale is None else t_scale.to(dtype)

    def project(v: Tensor) -> Tensor:
        v = v - n * (n * v).mean(-1, keepdim=True) - (v.mean(-1, keepdim=True) if layer else 0)
        return rstd * v

    layer = kind == "layer"
    n = rstd * (x.to(dtype) - mean)
    t_n = rstd * (u_t - t_mean - n * a)
    z, t_z = n * w, t_n * w
    if bias is not None:
        z = z + bias.to(dtype)
    d_z, d_tz = s * d_y + t_s * dt_y, s * dt_y
    g, h = d_z * w, d_tz * w
    d_t_x = project(h)
    h_tn, n_h = ((h * v).mean(-1, keepdim=True) for v in (t_n, n))
    gradients = {
        "x": (project(g) - rstd * (n * h_tn + a * d_t_x + n_h * t_n), x),
        "t_x": (d_t_x, t_x),
        "weight": (d_z * n + d_tz * t_n, weight),
        "bias": (d_z, bias),
        "scale": (d_y * z + dt_y * t_z, scale),
        "shift": (d_y, shift),
        "t_scale": (dt_y * z, t_scale),
        "t_shift": (dt_y, t_shift),
    }
    return {name: gradients[name][0].sum_to_size(gradients[name][1].shape) for name in wanted}
