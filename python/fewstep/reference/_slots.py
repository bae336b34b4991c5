"""What the oracles of snapshots share: the codes of a ring's slots as numbers.

    value = code * scale         one scale for each group of neighbours along the last axis

Codes are float8_e4m3fn, int8, or int4: uint8, two a byte, the even column in the low half.
Floating snapshots have no scale and are their own values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize_int4 import unpack_nibbles


def dequantize(codes: Tensor, scale: Tensor | None, group: int, dtype: torch.dtype) -> Tensor:
    """Return the values of codes [..., C] (int4: [..., C / 2]) in `dtype`."""
    if codes.dtype == torch.uint8:
        codes = unpack_nibbles(codes)
    values = codes.to(dtype)
    if scale is None:
        return values
    return values * scale.to(dtype).repeat_interleave(group, -1)[..., : values.shape[-1]]
