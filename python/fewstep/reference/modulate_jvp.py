"""Oracle of `fewstep.ops.modulate_jvp`: the tangent written out by hand.

    out = x + gate y                        t_out = t_x + gate t_y + t_gate y

x, y, t_x, t_y, out, t_out [..., C]; gate, t_gate broadcast against x, gate None is one. A tangent
that is None is zero. Runs in float64 for float64 inputs, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def modulate_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    t_x: Tensor | None = None,
    t_y: Tensor | None = None,
    t_gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out, t_out) in the accumulation dtype."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = y.to(dtype)
    g = 1 if gate is None else gate.to(dtype)
    out = x.to(dtype) + g * y
    t_out = torch.zeros_like(out) if t_x is None else t_x.to(dtype)
    if t_y is not None:
        t_out = t_out + g * t_y.to(dtype)
    if t_gate is not None:
        t_out = t_out + t_gate.to(dtype) * y
    return out, t_out
