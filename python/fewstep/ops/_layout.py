"""Tensors as kernels take them: matrices whose rows have their columns side by side."""

from __future__ import annotations

import math

from torch import Tensor


def matrix(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K]."""
    # Not reshape(-1, ...): an axis of size 0 leaves -1 open.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_stride(x: Tensor) -> Tensor:
    """Return x with neighbours in its last axis side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, None for None."""
    return None if x is None else x.contiguous()
