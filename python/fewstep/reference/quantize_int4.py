"""Oracle of `fewstep.ops.quantize_int4`.

    s = round_to_bf16(max |w| / 7)               over a group of G neighbours in a row
    q = clamp(round(w / s), -8, 7)               to nearest, ties to even

A group whose scale is below TINY counts as zero (s TINY, q 0); one that holds an infinity or a NaN
gets s NaN and q 0. Two values a byte, the even column in the low half, two's complement.
With `rotate`, blocks of so many neighbours of w are rotated first (`_prologue.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._prologue import prepare

TINY = 2.0**-126  # below it the scale would not be a normal number


def pack_nibbles(q: Tensor) -> Tensor:
    """Return integers in [-8, 7] [..., K] as uint8 [..., K / 2]."""
    low, high = q.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low & 15) | (high << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Return uint8 [..., K / 2] as int8 [..., K] in [-8, 7]."""
    halves = torch.stack([packed & 15, packed >> 4], -1).flatten(-2)
    return (halves ^ 8).to(torch.int8) - 8


def quantize_int4(w: Tensor, *, group: int = 64, rotate: int = 0) -> tuple[Tensor, Tensor]:
    """Return (q, s), computed in float64 for float64, else in float32."""
    w = prepare(w, None, rotate)
    groups = w.unflatten(-1, (-1, group))
    amax = groups.abs().amax(-1)
    seven = torch.full_like(amax, 7)  # a tensor: CUDA divides by a number inexactly
    scale = (amax / seven).to(torch.bfloat16)
    finite, tiny = amax.isfinite() & scale.isfinite(), scale < TINY
    scale = scale.clamp(min=TINY)
    q = torch.round(groups / scale.to(w.dtype)[..., None]).clamp(-8, 7)
    q = torch.where((finite & ~tiny)[..., None], q, torch.zeros_like(q))
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return pack_nibbles(q.flatten(-2).to(torch.int8)), scale
