"""snapshot_store in Triton: a program takes LINES lines of a sample, each a group.

x, base [B, R, C] with unit stride in C; ring [K, B, R, C] ([K, B, R, C / 2] of int4) and scale
[K, B, R, G] contiguous; gram [B, K]. A line stays in registers between its maximum, its rounding
and its products with the same line of each slot; partial products are added in a second kernel, in
a fixed order. Floats are lines of 1,024 neighbours, without a scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present
from ._slots import (
    E4M3,
    FLOAT,
    INT8,
    decode_e4m3,
    kind_of,
    line_length,
    line_mask,
    lines_together,
    load_line,
)
from .quantize_fp8 import round_to_e4m3
from .quantize_int8 import round_to_int8


@triton.jit
def _encode(r, ok, KIND: tl.constexpr, LINES: tl.constexpr, SIZE: tl.constexpr):
    """Return (codes as numbers, scale) of lines [LINES, SIZE]."""
    finite = tl.min((tl.abs(r) < float("inf")).to(tl.int32), 1) == 1
    amax = tl.max(tl.where(tl.abs(r) < float("inf"), tl.abs(r), 0.0), 1)
    top = tl.full([LINES], 127.0 if KIND == INT8 else (448.0 if KIND == E4M3 else 7.0), tl.float32)
    used = ok & finite & (amax >= top * 1.1754943508222875e-38)  # 2^-126
    divisor = tl.where(used, amax, top)
    # div_rn: the plain division is approximate on GPUs, and all implementations agree to the bit.
    inverse = tl.where(used, tl.div_rn(top, divisor), 0.0)
    scale = tl.where(used, tl.div_rn(divisor, top), tl.where(finite, 0.0, float("nan")))
    return tl.where(used[:, None], r, 0.0) * inverse[:, None], scale


@triton.jit
def _snapshot_store_kernel(
    x_ptr,
    base_ptr,
    ring_ptr,
    scale_ptr,
    slot_ptr,
    partials_ptr,
    slot,
    stride_xb,
    stride_xr,
    stride_bb,
    stride_br,
    batch,
    rows,
    columns,
    per_row,
    programs,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_GRAM: tl.constexpr,
    LINES: tl.constexpr,
    SIZE: tl.constexpr,
):
    # One axis of programs: the others hold 65,535, fewer than a batch may.
    b = (tl.program_id(0) // programs).to(tl.int64)
    i = (tl.program_id(0) % programs).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, part = i // per_row, i % per_row
    first, inside = part * GROUP, i < rows * per_row
    last = tl.minimum(first + GROUP, columns)
    if HAS_SLOT:
        slot = tl.load(slot_ptr)
    # A tensor, whether the slot is one or a constant of the kernel.
    slots = tl.zeros([LINES], tl.int64) + slot
    known = (slots >= 0) & (slots < K)
    offs = first[:, None] + tl.arange(0, SIZE)[None, :]
    mask = line_mask(offs, last, inside, WHOLE)
    r = tl.load(x_ptr + (b * stride_xb + row * stride_xr)[:, None] + offs, mask=mask, other=0.0)
    r = r.to(tl.float32)
    if HAS_BASE:
        base = base_ptr + (b * stride_bb + row * stride_br)[:, None] + offs
        r -= tl.load(base, mask=mask, other=0.0).to(tl.float32)

    line = b * rows + row
    slot_lines = tl.full([], batch, tl.int64) * rows
    stored = tl.where(known, slots, 0) * slot_lines + line
    keep = inside & known
    out = line_mask(offs, last, keep, WHOLE)
    at = ring_ptr + (stored * columns)[:, None] + offs
    scale = tl.full([LINES], 1.0, tl.float32)
    if KIND == FLOAT:
        rounded = narrow(r, ring_ptr.dtype.element_ty)
        tl.store(at, rounded, mask=out)
        value = tl.where(mask, rounded.to(tl.float32), 0.0)
    else:
        steps, scale = _encode(r, inside, KIND, LINES, SIZE)
        tl.store(scale_ptr + stored * per_row + part, scale, mask=keep)
        if KIND == E4M3:
            codes = round_to_e4m3(steps)
            tl.store(at, codes.to(tl.uint8), mask=out)
            value = decode_e4m3(codes)
        else:
            codes = round_to_int8(steps)
            value = codes.to(tl.float32)
            if KIND == INT8:
                tl.store(at, codes, mask=out)
            else:
                low, high = tl.split((codes.to(tl.int32) & 15).reshape(LINES, SIZE // 2, 2))
                pairs = first[:, None] // 2 + tl.arange(0, SIZE // 2)[None, :]
                half = ring_ptr + (stored * columns // 2)[:, None] + pairs
                packed = (low | (high << 4)).to(tl.uint8)
                tl.store(half, packed, mask=line_mask(pairs, last // 2, keep, WHOLE))
        value = tl.where(mask, value * scale[:, None], 0.0)

    if HAS_GRAM:
        for k in tl.static_range(K):
            other = k * slot_lines + line
            u = load_line(ring_ptr, other * columns, first, last, inside, SIZE, KIND, LINES, WHOLE)
            if KIND != FLOAT:
                factor = tl.load(scale_ptr + other * per_row + part, mask=inside, other=0.0)
                u = tl.where(mask, u * factor[:, None], 0.0)
            # What is being written is not read: who comes first is not said.
            u = tl.where((slots == k)[:, None], value, u)
            total = tl.sum(tl.sum(value * u, 1), 0)
            tl.store(partials_ptr + tl.program_id(0).to(tl.int64) * K + k, total.to(tl.float64))


@triton.jit
def _snapshot_store_finish_kernel(
    partials_ptr,
    gram_ptr,
    slot_ptr,
    slot,
    programs,
    K: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, k = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    if HAS_SLOT:
        slot = tl.load(slot_ptr)
    slots = tl.zeros([BLOCK], tl.int64) + slot
    sums = tl.where((slots >= 0) & (slots < K), 0.0, float("nan")).to(tl.float64)
    for start in range(0, programs, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        at = partials_ptr + (b * programs + offs) * K + k
        sums += tl.load(at, mask=offs < programs, other=0.0)
    tl.store(gram_ptr + b * K + k, tl.sum(sums, 0).to(tl.float32))


def launch_snapshot_store(
    x: Tensor,
    base: Tensor | None,
    ring: Tensor,
    scale: Tensor | None,
    slot: int,
    slot_at: Tensor | None,
    group: int,
    gram: Tensor | None,
) -> None:
    """Store x - base and fill `gram` if given; shapes as in the module docstring."""
    slots, (batch, rows, columns) = ring.shape[0], x.shape
    length = line_length(scale, group, max(columns, 1))
    size = max(16, triton.next_power_of_2(length))
    per_row = triton.cdiv(columns, length)
    whole = columns % length == 0 and size == length
    per_program = lines_together(size, whole, slots)
    programs = triton.cdiv(rows * per_row, per_program)
    partials = None
    if gram is not None:
        partials = x.new_empty((batch * programs, slots), dtype=torch.float64)
    if x.numel():
        _snapshot_store_kernel[(batch * programs,)](
            x,
            *present(x, base),
            ring,
            *present(x, scale, slot_at, partials),
            slot,
            *x.stride()[:2],
            *((0, 0) if base is None else base.stride()[:2]),
            batch,
            rows,
            columns,
            per_row,
            programs,
            K=slots,
            KIND=kind_of(ring, columns),
            GROUP=length,
            WHOLE=whole,
            HAS_BASE=base is not None,
            HAS_SLOT=slot_at is not None,
            HAS_GRAM=gram is not None,
            LINES=per_program,
            SIZE=size,
            num_warps=4,
            # No fusion: a step must be rounded before what rounds it to an integer is added.
            enable_fp_fusion=False,
        )
    if gram is not None and batch:
        _snapshot_store_finish_kernel[(batch * slots,)](
            partials,
            gram,
            *present(x, slot_at),
            slot,
            programs,
            K=slots,
            HAS_SLOT=slot_at is not None,
            BLOCK=256,
        )
