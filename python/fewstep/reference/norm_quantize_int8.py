"""Oracle of `fewstep.ops.norm_quantize_int8`: the oracles of its two halves, one after the other.

y = norm(x) * weight + bias
z = y (1 + scale) + shift                 rounded to x's dtype
q_scale = max_c |z_c| / 127
q = round(z * (127 / max_c |z_c|))        to nearest, ties to even
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .norm_jvp import norm_jvp
from .quantize_int8 import quantize_int8


def norm_quantize_int8(
    x: Tensor, *, smooth: Tensor | None = None, rotate: int = 0, **options: Any
) -> tuple[Tensor, ...]:
    """Return (q, q_scale); `options` are weight, bias, scale, shift, kind and eps."""
    z = norm_jvp(x, **options)[0]
    return quantize_int8(z.to(x.dtype), smooth=smooth, rotate=rotate)
