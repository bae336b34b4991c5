"""What linear_attention_jvp and its backward share: tiles of tokens, products, dual states.

A state is [D, Dv + 1] fp32 in memory, contiguous: a matrix and, as its last column, a vector.
Head dims are padded to powers of two in registers only: loads and stores are masked.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import dot, narrow, pad_head_dim

TOKENS = 256  # of one program


@triton.jit
def find_chunk(batch, heads):
    """Return (head of all, chunk of it, sample, head of the sample) that the program works on."""
    head = (tl.program_id(0) % (batch * heads)).to(tl.int64)
    chunk = (tl.program_id(0) // (batch * heads)).to(tl.int64)
    return head, chunk, head // heads, head % heads


@triton.jit
def product(a, b, acc):
    """Return acc + a @ b; float32 operands as three TF32 products on a GPU (about 2^-21)."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    return dot(a, b, acc)


@triton.jit
def load_rows(base, stride, offs, n, cols, width: tl.constexpr):
    """Return rows `offs` of a [n, width] matrix in its dtype, zero outside of it."""
    mask = (offs < n)[:, None] & (cols < width)[None, :]
    return tl.load(base + offs.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def features(x, t_x):
    """Return [x > 0] t_x in float32; relu itself where t_x is x. NaN in x passes, as in torch."""
    return tl.where(x.to(tl.float32) <= 0, 0.0, t_x.to(tl.float32))


@triton.jit
def store_rows(base, stride, offs, n, cols, width: tl.constexpr, value):
    """Store float32 rows, rounded to the dtype of `base`."""
    mask = (offs < n)[:, None] & (cols < width)[None, :]
    pointers = base + offs.to(tl.int64)[:, None] * stride + cols[None, :]
    tl.store(pointers, narrow(value, base.dtype.element_ty), mask=mask)


@triton.jit
def load_state(ptr, D: tl.constexpr, DV: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr):
    """Return the matrix [D_PAD, DV_PAD] and the vector [D_PAD] of a state."""
    rows, cols = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    mask = (rows < D)[:, None] & (cols < DV)[None, :]
    matrix = tl.load(ptr + rows[:, None] * (DV + 1) + cols[None, :], mask=mask, other=0.0)
    return matrix, tl.load(ptr + rows * (DV + 1) + DV, mask=rows < D, other=0.0)


@triton.jit
def store_state(
    ptr,
    matrix,
    vector,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
):
    rows, cols = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    mask = (rows < D)[:, None] & (cols < DV)[None, :]
    tl.store(ptr + rows[:, None] * (DV + 1) + cols[None, :], matrix, mask=mask)
    tl.store(ptr + rows * (DV + 1) + DV, vector, mask=rows < D)


def tiles(d: int, dv: int, block: int = 64) -> dict[str, int]:
    """Return the sizes and launch options for head dims d and dv.

    Tiles of `block` tokens, or 16 with wide heads: what keeps registers from spilling, compiled
    with Triton 3.9 for sm_90. The times are not measured on a GPU yet.
    """
    d_pad, dv_pad = pad_head_dim(d), pad_head_dim(dv)
    narrow = d_pad * dv_pad <= 32 * 32
    sizes = {"TOKENS": TOKENS, "BLOCK": block if narrow else 16, "D": d, "DV": dv}
    sizes |= {"D_PAD": d_pad, "DV_PAD": dv_pad}
    return sizes | {"num_warps": 4 if narrow else 8, "num_stages": 2}


def new_partials(q: Tensor, v: Tensor, tokens: int) -> Tensor:
    """Allocate [chunks, 2, B, H, D, Dv + 1] for the states of chunks of TOKENS tokens."""
    shape = (triton.cdiv(tokens, TOKENS), 2, *q.shape[:2], q.shape[-1], v.shape[-1] + 1)
    return q.new_empty(shape, dtype=torch.float32)
