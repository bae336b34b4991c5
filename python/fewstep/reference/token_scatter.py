"""Oracle of `fewstep.ops.token_scatter`.

    p = position[b, n]
    y[b, n] = base[b, n]                              where p < 0
    y[b, n] = [base[b, n] +] gate[b] value[b, p]      where 0 <= p < M; NaN beyond

Rows that are only put in place keep their bits; sums are taken in float64 for float64, else in
float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_scatter(
    value: Tensor,
    position: Tensor,
    base: Tensor,
    *,
    gate: Tensor | None = None,
    residual: bool = False,
) -> Tensor:
    """Return y in the dtype of base, in the accumulation dtype with gate or residual."""
    position = position[..., None]
    inside = (position >= 0) & (position < value.shape[1])
    if value.shape[1] == 0:
        rows = torch.zeros_like(base)
    else:
        at = torch.where(inside, position, 0).long().expand(-1, -1, value.shape[2])
        rows = value.gather(1, at)
    rows = torch.where(inside, rows, torch.nan)
    if gate is not None or residual:
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        rows, base = rows.to(dtype), base.to(dtype)
        if gate is not None:
            rows = gate.to(dtype)[:, None] * rows
        rows = base + rows if residual else rows
    return torch.where(position < 0, base, rows)
