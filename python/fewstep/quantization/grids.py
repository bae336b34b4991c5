"""The numbers that a quantised weight can take, column by column.

    code = nearest(w / s)        value = what the product makes of code and s

    int8            codes -127..127          value code s_n
    e4m3            codes e4m3               value code s_n
    4 bits          codes -8..7              value code s_ng; in w4a8 what `fold_int4` makes of it

w  [N]  one column of the weight      s_n  a scale per output      s_ng  one per output and group

Rounding that looks at what it did to earlier columns (`compensation`) needs this one column at a
time, with scales that are settled before. They are those of `QuantLinear.quantize_weight`, or
smaller ones where clipping the largest weights costs less than a coarser grid for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.quantize_int4 import pack_nibbles
from ..reference.gemm_w4a8 import fold_factors
from .linear import QuantLinear
from .scheme import Scheme

# Of the scale that just holds the largest weight. For 64 normal weights in 4 bits the best is near
# 0.85; less than 0.6 would clip all but the smallest of them.
SHRINK = tuple(1 - i / 32 for i in range(14))
TINY = 2.0**-126  # below it a scale would not be a normal number
_RANGES = {"w8a8": (-127.0, 127.0), "fp8": (-448.0, 448.0), "w4a8": (-8.0, 7.0)}
_RANGES["w4a16"] = _RANGES["w4a8"]


class Grid:
    """What the columns of a weight [N, K] can become.

    scale   as the layer stores it: [N], or [N, K / G]
    """

    def __init__(self, kind: str, scale: Tensor, columns: int) -> None:
        self.scale = scale
        self._kind = kind
        by_group = (scale if scale.dim() == 2 else scale[:, None]).float()
        self._size = columns // by_group.shape[1]
        self._steps = by_group.mT.contiguous()  # [K / G, N]: a column's are neighbours
        if kind == "w4a8":
            self._factors = fold_factors(scale).float().mT.contiguous()
            self._unit = by_group.amax(1) / 16

    def round(self, w: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """Return the codes and values [N], float32, nearest to a column w [N], float32."""
        group = column // self._size
        step = self._steps[group]
        code = _nearest(w / step, self._kind)
        if self._kind != "w4a8":
            return code, code * step
        # code times factor fits 16 bits, so all of this is exact in float32.
        folded = ((code * self._factors[group] + 128) / 256).floor()
        return code, folded * self._unit

    def pack(self, codes: Tensor) -> Tensor:
        """Return codes [N, K] as the layer stores them."""
        if self._kind == "fp8":
            return codes.to(torch.float8_e4m3fn)
        codes = codes.to(torch.int8)
        return codes if self._kind == "w8a8" else pack_nibbles(codes)


def _nearest(ratio: Tensor, kind: str) -> Tensor:
    ratio = ratio.clamp(*_RANGES[kind])
    return ratio.to(torch.float8_e4m3fn).float() if kind == "fp8" else ratio.round()


def search(weight: Tensor, scheme: Scheme, importance: Tensor) -> Grid:
    """Return the grid with the scales of the least error, each by itself.

        s = argmin_c sum_k h_k (w_k - s_c nearest(w_k / s_c))^2     s_c = c s_0, c in SHRINK

    Args:
        weight: float32 [N, K], as it will be quantised.
        scheme: without a rotation: that is done.
        importance: h [K], of the columns.
    """
    base = QuantLinear.kinds[scheme.kind].quantize_weight(weight, scheme)[1]
    groups = weight.unflatten(1, (-1, scheme.group or weight.shape[1]))
    cost = importance.unflatten(0, groups.shape[1:])
    best = base
    least = torch.full_like(base, torch.inf, dtype=torch.float32)
    for shrink in SHRINK:
        scale = (base.float() * shrink).clamp(min=TINY).to(base.dtype)
        step = scale.float().view(*groups.shape[:2], 1)
        error = groups - step * _nearest(groups / step, scheme.kind)
        error = (error.square() * cost).sum(-1).view(scale.shape)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(least, error)
    return Grid(scheme.kind, best, weight.shape[1])
