"""Rows in 8 bits by a limit for each that is given: `fewstep.ops._requantize` has the contract."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantize_fp8 import TINY as FP8_TINY
from .quantize_fp8 import TOP as FP8_TOP
from .quantize_int8 import TINY as INT8_TINY

TOPS = {torch.int8: (127.0, INT8_TINY), torch.float8_e4m3fn: (FP8_TOP, FP8_TINY)}


def requantize(v: Tensor, limit: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return (q, scale, amax, exceeded) of v [..., N], in the precision of limit."""
    top_value, tiny_value = TOPS[dtype]
    top = torch.full_like(limit, top_value)  # a tensor: CUDA divides by a number inexactly
    tiny, finite = limit < tiny_value, limit.isfinite()
    used = finite & ~tiny
    scale = torch.where(used, limit / top, torch.ones_like(limit))
    if dtype == torch.int8:
        x = v * torch.where(used, top / limit, torch.zeros_like(limit))[..., None]
    else:
        x = torch.where(used[..., None], v / scale[..., None], torch.zeros_like(v))
    x = x.nan_to_num(0.0, top_value, -top_value).clamp(-top_value, top_value)
    q = (x.round() if dtype == torch.int8 else x).to(dtype)
    amax = v.abs().amax(-1) if v.shape[-1] else torch.zeros_like(limit)
    nan = torch.full_like(scale, torch.nan)
    exceeded = (~(v.abs() <= limit[..., None])).sum(dtype=torch.int32)
    return q, torch.where(finite & amax.isfinite(), scale, nan), amax, exceeded
