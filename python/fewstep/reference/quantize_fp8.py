"""Oracle of `fewstep.ops.quantize_fp8`.

    scale = max |x| / 448                over a row, or over blocks of neighbours in it
    q = round_to_e4m3(x / scale)         to nearest, ties to even, at most 448

A block whose maximum is below TINY counts as zero (scale 1, q 0); one that holds an infinity or a
NaN gets scale NaN and q 0. `_prologue.py` has what may come first: an activation, low, x smoothed
and rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._prologue import activated, prepare, project

TOP = 448.0  # the largest e4m3 number
TINY = TOP * 2.0**-126  # below it the scale would not be a normal float32


def quantize_fp8(
    x: Tensor,
    *,
    block: int | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, ...]:
    """Return (q, scale) and with down low; in float64 for float64, else in float32."""
    x = activated(x, activation)
    low = () if down is None else (project(x, down),)
    x = prepare(x, smooth, rotate)
    K = x.shape[-1]
    size = block or max(K, 1)
    count = -(-K // size) if block else 1
    blocks = F.pad(x, (0, count * size - K)).unflatten(-1, (count, size))
    amax = blocks.abs().amax(-1)
    top = torch.full_like(amax, TOP)  # a tensor: CUDA divides by a number inexactly
    finite, tiny = amax.isfinite(), amax < TINY
    scale = torch.where(tiny, torch.ones_like(amax), amax / top)
    used = torch.where((finite & ~tiny)[..., None], blocks, torch.zeros_like(blocks))
    q = (used / scale.nan_to_num(1.0)[..., None]).clamp(-TOP, TOP).to(torch.float8_e4m3fn)
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return q.flatten(-2)[..., :K], scale if block else scale[..., 0], *low
