"""Oracle of `fewstep.ops.snapshot_store`.

    r = x - base
    scale = max |r| / top        over groups of neighbours; top is 127 (int8), 448 (e4m3), 7 (int4)
    code = round(r * (top / max |r|))
    snapshots[slot], scale[slot] = code, scale          floats: r, rounded
    gram[b, k] = sum value[slot] * value[k]             of values as stored

A group whose maximum is below top * 2^-126 counts as zero (scale 0, codes 0); one that holds an
infinity or a NaN gets scale NaN and codes 0. Outside of the ring nothing is stored and gram is NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ._slots import dequantize
from .quantize_int4 import pack_nibbles

TOPS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.uint8: 7.0}


def quantize(r: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """Return codes of `dtype` and their scale, in the dtype of r."""
    C = r.shape[-1]
    count = -(-C // group)
    groups = F.pad(r, (0, count * group - C)).unflatten(-1, (count, group))
    amax = groups.abs().amax(-1)
    top = torch.full_like(amax, TOPS[dtype])  # a tensor: CUDA divides by a number inexactly
    finite, tiny = amax.isfinite(), amax < top * 2.0**-126
    used = finite & ~tiny
    inverse = torch.where(used, top / amax, torch.zeros_like(amax))
    steps = torch.where(used[..., None], groups * inverse[..., None], torch.zeros_like(groups))
    steps = steps.flatten(-2)[..., :C]
    if dtype == torch.float8_e4m3fn:
        codes = steps.clamp(-448, 448).to(dtype)
    else:
        codes = torch.round(steps).to(torch.int8)
    scale = torch.where(tiny, torch.zeros_like(amax), amax / top)
    scale = torch.where(finite, scale, torch.full_like(scale, torch.nan))
    return pack_nibbles(codes) if dtype == torch.uint8 else codes, scale


def _put(ring: Tensor, index: Tensor, known: Tensor, new: Tensor) -> None:
    if ring.dtype == torch.float8_e4m3fn:
        ring, new = ring.view(torch.uint8), new.view(torch.uint8)
    old = ring.index_select(0, index)
    ring.index_copy_(0, index, torch.where(known, new.to(ring.dtype), old))


def snapshot_store(
    x: Tensor,
    snapshots: Tensor,
    *,
    slot: int | Tensor,
    base: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 128,
    gram: bool = False,
) -> Tensor | None:
    """Store in place; return the products with `gram`, in float64 for float64 x, else float32."""
    wide = x.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    r = x.to(dtype) if base is None else x.to(dtype) - base.to(dtype)
    slots = snapshots.shape[0]
    at = torch.as_tensor(slot, device=x.device).reshape(1)
    known, index = (at >= 0) & (at < slots), at.clamp(0, slots - 1)
    if scale is None:
        codes = r
    else:
        codes, scales = quantize(r, snapshots.dtype, group)
        _put(scale, index, known.view(-1, *[1] * scales.dim()), scales[None])
    _put(snapshots, index, known.view(-1, *[1] * codes.dim()), codes[None])
    if not gram:
        return None
    values = dequantize(snapshots, scale, group, dtype).double().flatten(2)
    products = (values.index_select(0, index) * values).sum(-1).T
    return torch.where(known, products, torch.full_like(products, torch.nan)).to(dtype)
