"""Oracle of `fewstep.ops.forecast_apply`.

    y = base + sum_k w_k * value_k         in the order of k, base last

A snapshot whose weight is 0 is left out: whatever it holds does not matter. `weights` is [K],
[B, K], or with `step` a table [T, K] of which one row counts, NaN outside of it. `_slots.py` has
the values of codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._slots import dequantize


def forecast_apply(
    snapshots: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 128,
    step: Tensor | None = None,
) -> Tensor:
    """Return y in the accumulation dtype: float64 where an input is float64, else float32."""
    inputs = (snapshots, weights, base, scale)
    wide = any(x is not None and x.dtype == torch.float64 for x in inputs)
    dtype = torch.float64 if wide else torch.float32
    if step is not None:
        inside = (step >= 0) & (step < weights.shape[0])
        row = weights.index_select(0, step.reshape(1).clamp(0, weights.shape[0] - 1))[0]
        weights = torch.where(inside.reshape(1), row, torch.full_like(row, torch.nan))
    y: Tensor | None = None
    for k in range(snapshots.shape[0]):
        values = dequantize(snapshots[k], None if scale is None else scale[k], group, dtype)
        w = weights[..., k].to(dtype).view(-1, *[1] * (values.dim() - 1))
        term = torch.where(w == 0, torch.zeros_like(values), w * values)
        y = term if y is None else y + term
    assert y is not None  # K is at least 1
    return y if base is None else y + base.to(dtype)
