"""Oracle of `fewstep.ops.modulate_jvp_backward`: every gradient that is not a copy.

    d_y = gate d_out + t_gate dt_out        d_gate = d_out y + dt_out t_y
    d_t_y = gate dt_out                     d_t_gate = dt_out y

d_out, dt_out are the cotangents of out, t_out of `modulate_jvp` (None is zero) and also the
gradients of x and t_x, unchanged. Gradients of gate and t_gate are summed over what they were
broadcast along. The result maps the names in `wanted` to gradients in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def modulate_jvp_backward(
    d_out: Tensor | None,
    dt_out: Tensor | None,
    y: Tensor,
    gate: Tensor | None = None,
    t_y: Tensor | None = None,
    t_gate: Tensor | None = None,
    *,
    wanted: Sequence[str],
) -> dict[str, Tensor]:
    """Return {name: gradient} for the names among y, gate, t_y and t_gate in `wanted`."""
    dtype = torch.float64 if y.dtype == torch.float64 else torch.float32
    zeros = torch.zeros_like(y, dtype=dtype)
    a, b, t_y_ = (zeros if v is None else v.to(dtype) for v in (d_out, dt_out, t_y))
    g = 1 if gate is None else gate.to(dtype)
    t_g = 0 if t_gate is None else t_gate.to(dtype)
    gradients = {
        "y": (g * a + t_g * b, y),
        "gate": (a * y.to(dtype) + b * t_y_, gate),
        "t_y": (g * b, t_y),
        "t_gate": (b * y.to(dtype), t_gate),
    }
    return {name: gradients[name][0].sum_to_size(gradients[name][1].shape) for name in wanted}
