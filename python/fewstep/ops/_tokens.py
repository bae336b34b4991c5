"""What `token_gather` and `token_scatter` ask of their arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._expect import expect_tensor
from ._layout import DTYPES, FLOATS

INDICES = (torch.int32, torch.int64)


def native_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes of tokens that the native kernels take on the device of x."""
    return DTYPES if x.device.type == "cpu" else FLOATS


def expect_tokens(name: str, x: Any) -> None:
    """Refuse what is not [B, N, C] of a floating dtype."""
    expect_tensor(name, x)
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() != 3:
        raise ValueError(f"{name}: expected [B, N, C], got {list(x.shape)}")


def expect_index(name: str, index: Any, x: Tensor, length: int | None = None) -> None:
    """Refuse what is not [B, length] (any, for None) of int32 or int64, beside x."""
    expect_tensor(name, index)
    if index.dtype not in INDICES or index.device != x.device:
        raise ValueError(
            f"{name}: expected int32 or int64 on {x.device}, got {index.dtype} on {index.device}"
        )
    batch = x.shape[0]
    if index.dim() != 2 or index.shape[0] != batch or length not in (None, index.shape[1]):
        wanted = "M" if length is None else length
        raise ValueError(f"{name}: expected [{batch}, {wanted}], got {list(index.shape)}")


def expect_per_sample(name: str, v: Tensor | None, x: Tensor) -> None:
    """Refuse what is neither None nor a row for each sample, [B, C], like x."""
    if v is None:
        return
    expect_tensor(name, v)
    shape = (x.shape[0], x.shape[2])
    if v.shape != shape:
        raise ValueError(f"{name}: expected a row a sample, {list(shape)}, got {list(v.shape)}")
    expect_kind(name, v, x)


def expect_kind(name: str, v: Tensor, x: Tensor) -> None:
    """Refuse what is of another dtype or device than x."""
    if v.dtype != x.dtype or v.device != x.device:
        raise ValueError(f"{name}: expected {x.dtype} on {x.device}, got {v.dtype} on {v.device}")
