"""Tiles of rows of a [B, N, C] view: any strides in B and N (0 included), unit stride in C."""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import narrow


@triton.jit
def load_tile(ptr, stride_b, stride_n, b, n, cols, mask):
    """Return [rows, columns] of items b and tokens n in float32, zero outside of the mask."""
    pointers = ptr + (b * stride_b + n * stride_n)[:, None] + cols[None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(ptr, stride_b, stride_n, b, n, cols, value, mask):
    """Store a float32 tile, rounded to the dtype of `ptr`."""
    pointers = ptr + (b * stride_b + n * stride_n)[:, None] + cols[None, :]
    tl.store(pointers, narrow(value, ptr.dtype.element_ty), mask=mask)
