"""The codes of a ring's slots (ops/_slots.py) as float32 numbers.

A kernel sees a ring as lines: groups of neighbours that share a factor, or pieces of a row of
floats. KIND is that of `kind_of`.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

FLOAT = tl.constexpr(0)
INT8 = tl.constexpr(1)
E4M3 = tl.constexpr(2)
INT4 = tl.constexpr(3)


def kind_of(ring: Tensor, columns: int) -> int:
    """Return the KIND of a ring [K, B, R, ...] of `columns` values a row."""
    if ring.dtype == torch.uint8:
        return (E4M3 if ring.shape[-1] == columns else INT4).value
    return (INT8 if ring.dtype == torch.int8 else FLOAT).value


def line_length(scale: Tensor | None, group: int, columns: int) -> int:
    """Return how many neighbours a line has: a group, or a piece of a row of floats."""
    return group if scale is not None else min(1024, triton.next_power_of_2(columns))


def lines_together(size: int, whole: bool, slots: int) -> int:
    """Return how many lines of `size` values a program takes: what fits the registers.

    More slots are loads that are under way together; where groups end within a line, or rows at odd
    addresses, each value has an address and a mask of its own.
    """
    values = 512 if not whole else 2048 if slots <= 4 else 1024
    return max(1, values // size)


@triton.jit
def decode_e4m3(raw):
    """Return the numbers of e4m3 bits, by integers: the interpreter and older GPUs have no e4m3."""
    q = raw.to(tl.int32)
    magnitude = q & 0x7F
    small = magnitude.to(tl.float32) * 0.001953125  # 2^-9
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, small, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where((q & 0x80) != 0, -value, value)


@triton.jit
def line_mask(columns, last, used, WHOLE: tl.constexpr):
    """Return which columns to touch: of lines that are used all, or with not WHOLE up to `last`.

    A mask that asks of whole lines alone leaves loads 16 bytes wide.
    """
    mask = used[:, None]
    if not WHOLE:
        mask = mask & (columns < last[:, None])
    return mask


@triton.jit
def load_line(
    ptr,
    at,
    first,
    last,
    used,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    LINES: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Return values [LINES, SIZE] of the columns from `first` on of each line; 0 where masked.

    `at` [LINES] is where column 0 of a line lies, in values; `first` and `last` are even for int4.
    """
    if KIND == INT4:
        pairs = first[:, None] // 2 + tl.arange(0, SIZE // 2)[None, :]
        mask = line_mask(pairs, last // 2, used, WHOLE)
        raw = tl.load(ptr + (at // 2)[:, None] + pairs, mask=mask, other=0).to(tl.int32)
        codes = tl.join(raw & 15, raw >> 4).reshape(LINES, SIZE)
        value = ((codes ^ 8) - 8).to(tl.float32)
    else:
        columns = first[:, None] + tl.arange(0, SIZE)[None, :]
        mask = line_mask(columns, last, used, WHOLE)
        raw = tl.load(ptr + at[:, None] + columns, mask=mask, other=0)
        value = decode_e4m3(raw) if KIND == E4M3 else raw.to(tl.float32)
    return value
