"""What the attention kernels share: tiles, masks and packed sequences.

A tensor that is absent is None, and so is everything made of it: the compiler then drops the code.
What may be None is handed over by itself, not in a tuple: Triton takes no tuple with a None that a
function returned (those of a launch are fine).
Base addresses and strides come in tuples; strides are in units of UNIT elements, because the
compiler only learns of divisibility by 16, and head dims like 72 need to be known as 9 * 8 for
16-byte accesses. Scores are in units of log 2, so that exponentials are to base 2; behind an
additive mask they are as they are, because the unit of log 2 would round -1e9 to another value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
BLOCK_S = tl.constexpr(128)
LARGEST = tl.constexpr(2e38)
HOPPER_SHARED = 229_376  # bytes that the largest tiles for it take


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options for head dims up to `head_dim`.

    `chunk` is how many directions a program takes at most.
    """

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    chunk: int = 1


@dataclass(frozen=True)
class Masks:
    """Which queries and keys meet, and what is added to their scores.

    attn_mask    [B, H, Nq, Nk] view, bool or of q's dtype; stride 0 where it is broadcast
    t_attn_mask  [R, B, H, Nq, Nk] view ([B, H, Nq, Nk] where there is one direction)
    cu_seqlens   int32 [S + 1] each; values are clamped to the tensors
    """

    attn_mask: Tensor | None = None
    t_attn_mask: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    is_causal: bool = False

    @property
    def readable(self) -> tuple[Tensor | None, Tensor | None]:
        """attn_mask as the kernels can load it, and its tangent."""
        mask = self.attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.int8)
        return mask, self.t_attn_mask

    @property
    def additive(self) -> bool:
        """There is a mask that is added to the scores."""
        return self.attn_mask is not None and self.attn_mask.dtype != torch.bool

    @property
    def sequences(self) -> int:
        """S, or 0 without sequences."""
        return 0 if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1


def is_hopper(device: torch.device) -> bool:
    """Return whether the tiles of sm_90 fit; so it is taken where there is no GPU.

    The shared memory decides: of the generations after it some have as much, others less than half.
    """
    if device.type != "cuda":
        return True
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and properties.shared_memory_per_block_optin >= HOPPER_SHARED


def safe_scale(scale: float, *masks: Tensor | None) -> float:
    """Return the scale; not 0 if there are masks, which are divided by it (see `seed`)."""
    return 1e-30 if scale == 0 and any(x is not None for x in masks) else scale


def strides_in_units(tensors: Sequence[Tensor | None]) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Return UNIT and the strides (R, B, H, N) of [R, B, H, N, D] or [B, H, N, D] tensors."""
    strides = [
        (0, 0, 0, 0) if x is None else (0, *x.stride()[:-1])[-4:] for x in tensors
    ]  # fmt: skip
    unit = 8 if all(stride % 8 == 0 for row in strides for stride in row) else 1
    return unit, tuple(tuple(stride // unit for stride in row) for row in strides)


def mask_strides(mask: Tensor | None) -> tuple[int | None, ...]:
    """Return the strides (R, B, H, Nq, Nk); None for Nq where all queries have one row."""
    if mask is None:
        return (0, 0, 0, 0, 0)
    *lead, stride_m, stride_n = (0, *mask.stride())[-5:]
    return (*lead, stride_m or None, stride_n)


@triton.jit
def base_of(ptr, strides, r, b, h, row, UNIT: tl.constexpr):
    """Return the address of row `row` of head h of sample b in direction r."""
    base = ptr
    if ptr is not None:
        offset = r * strides[0] + b * strides[1] + h * strides[2] + row * strides[3]
        base = ptr + offset * UNIT
    return base


@triton.jit
def base_of_mask(ptr, strides, r, b, h):
    """Return the address of a mask for head h of sample b in direction r."""
    base = ptr
    if ptr is not None:
        base = ptr + (r * strides[0] + b * strides[1] + h * strides[2])
    return base


@triton.jit
def bases_of(ptr, strides, r, b, h, row, UNIT: tl.constexpr, COUNT: tl.constexpr):
    """Return a tuple of `base_of` in directions r, r + 1, ..., r + COUNT - 1."""
    bases = ptr
    if ptr is not None:
        bases = ()
        for i in tl.static_range(COUNT):
            bases += (base_of(ptr, strides, r + i, b, h, row, UNIT),)
    return bases


@triton.jit
def bases_of_mask(ptr, strides, r, b, h, COUNT: tl.constexpr):
    """Return a tuple of `base_of_mask` in directions r, r + 1, ..., r + COUNT - 1."""
    bases = ptr
    if ptr is not None:
        bases = ()
        for i in tl.static_range(COUNT):
            bases += (base_of_mask(ptr, strides, r + i, b, h),)
    return bases


@triton.jit
def load_rows(base, stride, offs, n, cols, D: tl.constexpr, MASK_N: tl.constexpr,
              MASK_D: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Return rows `offs` and columns `cols` of a [n, D] matrix; zero outside of it."""
    rows = base
    if base is not None:
        pointers = base + offs[:, None].to(tl.int64) * stride * UNIT + cols[None, :]
        if MASK_N and MASK_D:
            rows = tl.load(pointers, mask=(offs[:, None] < n) & (cols[None, :] < D), other=0.0)
        elif MASK_N:
            rows = tl.load(pointers, mask=offs[:, None] < n, other=0.0)
        elif MASK_D:
            rows = tl.load(pointers, mask=cols[None, :] < D, other=0.0)
        else:
            rows = tl.load(pointers)
    return rows


@triton.jit
def store_rows(
    ptr, strides, b, h, begin, offs, n, cols, D: tl.constexpr, UNIT: tl.constexpr, x
):  # fmt: skip
    """Store x as rows `offs` of head h of sample b, unless there is nowhere to."""
    if ptr is not None:
        base = base_of(ptr, strides, 0, b, h, begin, UNIT)
        pointers = base + offs[:, None].to(tl.int64) * strides[3] * UNIT + cols[None, :]
        mask = (offs[:, None] < n) & (cols[None, :] < D)
        tl.store(pointers, narrow(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_stat(ptr, first, offs, n):
    """Return a statistic of some queries, 0 past the last; None for none."""
    stat = ptr
    if ptr is not None:
        stat = tl.load(ptr + first + offs, mask=offs < n, other=0.0)
    return stat


@triton.jit
def seed(
    base, strides, queries, keys, nq, nk, scale, OUTSIDE: tl.constexpr, SHAPE: tl.constexpr
):  # fmt: skip
    """Return what scores start from, M / scale; `queries` and `keys` are indices of a tile.

    A mask enters as the accumulator of the first product, before the scale. Added to the product it
    drags the layout of its load along: row statistics are then computed twice, in two layouts, and
    hundreds of bytes a thread are spilled (Triton 3.9). Finite values that the division would make
    infinite are LARGEST instead: finfo.min must not turn into -inf. OUTSIDE stands past the ends.
    """
    tile = tl.zeros(SHAPE, tl.float32)
    if base is not None:
        pointers = base + keys.to(tl.int64) * strides[4]
        inside = keys < nk
        if strides[3] is not None:
            pointers += queries.to(tl.int64) * strides[3]
            inside = inside & (queries < nq)
        if base.dtype.element_ty == tl.int8:
            mask = tl.load(pointers, mask=inside, other=0)
            tile += tl.where(mask != 0, 0.0, -float("inf")) / scale
        else:
            mask = tl.load(pointers, mask=inside, other=OUTSIDE).to(tl.float32)
            bound = LARGEST * tl.minimum(tl.abs(scale), 1.0)
            mask = tl.where((mask < -bound) & (mask > -float("inf")), -bound, mask)
            mask = tl.where((mask > bound) & (mask < float("inf")), bound, mask)
            tile += mask / scale
    return tile


@triton.jit
def visible_keys(base, strides, nk):
    """Return (first, end) of the keys that a query can meet: without the padding at both ends.

    Only of a mask with one row for all queries; the others would have to be read as a whole.
    """
    first, end = 0, nk
    if base is not None and strides[3] is None:
        last, tail = 0, 0
        for start in range(0, nk, BLOCK_S):
            keys = start + tl.arange(0, BLOCK_S)
            pointers = base + keys.to(tl.int64) * strides[4]
            if base.dtype.element_ty == tl.int8:
                seen = tl.load(pointers, mask=keys < nk, other=0) != 0
            else:
                seen = tl.load(pointers, mask=keys < nk, other=-float("inf")) != -float("inf")
            last = tl.maximum(last, tl.max(tl.where(seen, keys + 1, 0), 0))
            tail = tl.maximum(tail, tl.max(tl.where(seen, nk - keys, 0), 0))
        first, end = nk - tail, last
    return first, end


@triton.jit
def power(x, ADDITIVE: tl.constexpr):
    """Return exp x of scores: behind an additive mask they are not in units of log 2."""
    if ADDITIVE:
        x *= LOG2E
    return tl.exp2(x)


@triton.jit
def hide(s, queries, keys, nk, CAUSAL: tl.constexpr, EVEN_N: tl.constexpr):
    """Return scores with -inf past the diagonal and past the last key."""
    if CAUSAL:
        s = tl.where(keys <= queries, s, -float("inf"))
    if not EVEN_N:
        s = tl.where(keys < nk, s, -float("inf"))
    return s


@triton.jit
def _bounds(cu_ptr, s, n):
    begin = tl.minimum(tl.maximum(tl.load(cu_ptr + s), 0), n)
    end = tl.minimum(tl.maximum(tl.load(cu_ptr + s + 1), begin), n)
    return begin, end - begin


@triton.jit
def tile_count(cu_ptr, sequences, n, BLOCK: tl.constexpr):
    """Return how many programs a head has; with sequences some of them find nothing to do."""
    tiles = tl.cdiv(n, BLOCK)
    if cu_ptr is not None:
        tiles = n // BLOCK + sequences
    return tiles


@triton.jit
def find_tile(tile, cu_ptr, other_cu_ptr, sequences, n, other_n, BLOCK: tl.constexpr):
    """Return (first row within the sequence, its begin and length; the same of the other side).

    Sequence s owns the programs from cu[s] // BLOCK + s on: never fewer than it has tiles, and
    known without adding up the lengths of those before it.
    """
    begin, other_begin = 0, 0
    if cu_ptr is not None:
        found = 0
        for first in range(0, sequences, BLOCK_S):
            s = first + tl.arange(0, BLOCK_S)
            begins = tl.load(cu_ptr + s, mask=s < sequences, other=0)
            found += tl.sum(((begins // BLOCK + s <= tile) & (s < sequences)).to(tl.int32), 0)
        s = tl.maximum(found - 1, 0)
        tile -= tl.load(cu_ptr + s) // BLOCK + s
        begin, n = _bounds(cu_ptr, s, n)
        other_begin, other_n = _bounds(other_cu_ptr, s, other_n)
        n = tl.where(tile >= 0, n, 0)
        tile = tl.maximum(tile, 0)
    return tile * BLOCK, begin, n, other_begin, other_n
