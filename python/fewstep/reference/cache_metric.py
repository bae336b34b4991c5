"""Oracle of `fewstep.ops.cache_metric`.

    r = x - y
    metric = sum |r - previous| / sum |previous|     with `previous`
    metric = sum |r| / sum |y|                       without;  0 / 0 = 0

Sums run over everything, or over all but the first axis with `per_sample`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cache_metric(
    x: Tensor, y: Tensor, *, previous: Tensor | None = None, per_sample: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (metric, residual) in the accumulation dtype: float64 for float64, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(dtype), y.to(dtype)
    residual = x - y
    change, scale = residual.abs(), y.abs()
    if previous is not None:
        previous = previous.to(dtype)
        change, scale = (residual - previous).abs(), previous.abs()
    if per_sample:
        axes = list(range(1, x.dim()))  # an empty list would sum over everything
        numerator, denominator = (s.sum(axes) if axes else s for s in (change, scale))
    else:
        numerator, denominator = change.sum(), scale.sum()
    metric = torch.where(numerator == 0, torch.zeros_like(numerator), numerator / denominator)
    return metric, residual
