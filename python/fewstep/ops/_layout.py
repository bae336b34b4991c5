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


def unit_stride(x: Tensor | None) -> Tensor | None:
    """Return x with neighbours in its last axis side by side, None for None."""
    if x is None or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    # A tensor without elements is contiguous whatever its strides are.
    return x.contiguous() if x.numel() else x.new_empty(x.shape)


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, None for None."""
    return None if x is None else x.contiguous()
