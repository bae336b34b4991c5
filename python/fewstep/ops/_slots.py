"""Snapshots of a tensor in a ring: what `forecast_apply` reads and `snapshot_store` writes.

    ring    [K, B, ..., C]          float32, bfloat16 or float16; float64 on the CPU, as oracle
                                    float8_e4m3fn or int8, with scale
            [K, B, ..., C / 2]      uint8: int4 in two's complement, two a byte, the even column in
                                    the low half, with scale
    scale   [K, B, ..., ceil(C / group)]    float32, one factor a group of neighbours along C
    value = code * scale

Both are contiguous, K is 8 at most.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._expect import expect_tensor, expect_tensors
from ._layout import DTYPES, FLOATS

E4M3 = torch.float8_e4m3fn
CODES = (E4M3, torch.int8, torch.uint8)
MAX_SLOTS = 8
MAX_GROUP = 4096  # a program of Triton's holds one


def ring_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes of rings that native kernels take on the device of x."""
    return (*(DTYPES if x.device.type == "cpu" else FLOATS), *CODES)


def expect_ring(ring: Tensor, scale: Tensor | None, group: int) -> tuple[int, ...]:
    """Refuse what is no ring of slots; return the shape [B, ..., C] of what a slot holds."""
    expect_tensor("snapshots", ring)
    shape, dtype = ring.shape, ring.dtype
    if len(shape) < 3 or not 1 <= shape[0] <= MAX_SLOTS:
        raise ValueError(
            f"snapshots: expected [K, B, ..., C] with K from 1 to {MAX_SLOTS}, got {list(shape)}"
        )
    if not ring.is_contiguous():
        raise ValueError(f"snapshots: expected a contiguous tensor, got strides {ring.stride()}")
    if dtype in DTYPES:
        if scale is not None:
            raise ValueError(f"scale: expected None with snapshots in {dtype}, got a tensor")
        return shape[1:]
    if dtype not in CODES:
        raise ValueError(
            "snapshots: expected a floating dtype, float8_e4m3fn, int8 or uint8 (int4), "
            f"got {dtype}"
        )
    halved = dtype == torch.uint8
    _expect_group(group, halved)
    held = (*shape[1:-1], 2 * shape[-1]) if halved else shape[1:]
    _expect_scale(ring, scale, (*shape[:-1], -(-held[-1] // group)))
    return held


def _expect_group(group: int, halved: bool) -> None:
    if not isinstance(group, int) or not 1 <= group <= MAX_GROUP or (halved and group % 2):
        kind = "an even int" if halved else "an int"
        raise ValueError(f"group: expected {kind} from 1 to {MAX_GROUP}, got {group!r}")


def _expect_scale(ring: Tensor, scale: Tensor | None, shape: tuple[int, ...]) -> None:
    expect_tensors(scale=scale)
    if scale is None:
        raise ValueError(f"scale: expected one with snapshots in {ring.dtype}, got None")
    if scale.dtype != torch.float32 or scale.device != ring.device:
        raise ValueError(
            f"scale: expected float32 on {ring.device}, got {scale.dtype} on {scale.device}"
        )
    if scale.shape != shape or not scale.is_contiguous():
        raise ValueError(
            f"scale: expected a contiguous {list(shape)}, got {list(scale.shape)} with strides "
            f"{scale.stride()}"
        )


def ring_views(ring: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return ring and scale as [K, B, R, ...], codes of e4m3 as bytes."""
    if ring.dtype == E4M3:
        ring = ring.view(torch.uint8)  # neither the native library nor older GPUs know the dtype
    if ring.dim() != 4:
        slots, batch, *middle, columns = ring.shape
        rows = math.prod(middle)
        ring = ring.view(slots, batch, rows, columns)
        if scale is not None:
            scale = scale.view(slots, batch, rows, scale.shape[-1])
    return ring, scale
