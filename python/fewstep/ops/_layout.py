"""Tensors as kernels take them: their dtypes, and columns side by side in memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.float64)  # what CPU kernels take where the op is not for low bits


def matrix(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K]."""
    # Not reshape(-1, ...): an axis of size 0 leaves -1 open.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def samples(x: Tensor) -> Tensor:
    """View x [B, ..., C] as [B, R, C] with unit stride in C; copies only if no such view exists."""
    if x.dim() < 3:
        x = x.reshape(x.shape[0], 1, math.prod(x.shape[1:])) if x.dim() else x.reshape(1, 1, 1)
    elif x.dim() > 3:
        x = x.flatten(1, -2)
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def unit_stride(x: Tensor | None) -> Tensor | None:
    """Return x with neighbours in its last axis side by side, None for None."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    # A tensor without elements is contiguous whatever its strides are.
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def refuse_rows(name: str, x: Tensor) -> str | None:
    """Return why the copy engine of Hopper GPUs can't read these matrices where they lie, or None.

    It counts in units of 16 bytes, from an address that is one.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:  # what the kernel gets is a copy
        return None
    unit = 16 // x.element_size()
    strides = [n for n, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1]
    if x.storage_offset() % unit or any(n % unit or n < 0 for n in strides):
        return f"{name}: expected rows that start at multiples of 16 bytes"
    if x.shape[-2] > 1 and x.stride(-2) == 0:
        return f"{name}: expected rows of their own, got one row expanded"
    return None


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, None for None."""
    return None if x is None else x.contiguous()
