"""Oracle of `fewstep.ops.quantize_int8`.

    amax = max_k |x_k|
    scale = amax / 127
    q = round(x * (127 / amax))          to nearest, ties to even

A row whose amax is below TINY counts as zero (scale 1, q 0); a row that holds an infinity or a NaN
gets scale NaN and q 0. `_prologue.py` has what may come first: an activation, low, x smoothed and
rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prologue import activated, prepare, project

TINY = 127 * 2.0**-126  # below it the scale would not be a normal float32


def quantize_int8(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """Return (q, scale) and with down low; in float64 for float64, else in float32."""
    x = activated(x, activation)
    low = () if down is None else (project(x, down),)
    x = prepare(x, smooth, rotate)
    amax = x.abs().amax(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    top = torch.full_like(amax, 127)  # a tensor: CUDA divides by a number inexactly
    finite, tiny = amax.isfinite(), amax < TINY
    inverse = torch.where(finite & ~tiny, top / amax, torch.zeros_like(amax))
    q = torch.round(x * inverse[..., None]).nan_to_num(0.0).to(torch.int8)
    scale = torch.where(tiny, torch.ones_like(amax), amax / top)
    return q, torch.where(finite, scale, torch.full_like(scale, torch.nan)), *low
