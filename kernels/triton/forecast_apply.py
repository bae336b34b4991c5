"""forecast_apply in Triton: a program takes LINES lines, each of neighbours that share a factor.

ring [K, B, R, C] ([K, B, R, C / 2] of int4) and scale [K, B, R, G] contiguous; weights [rows, K] or
[K] fp32; base [B, R, C] with unit stride in C; y [B, R, C] contiguous. Line i of all B R G is group
i % G of row i // G. Where a group is as long as a line, bounds are asked of whole lines alone, and
loads are of 16 bytes.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present
from ._slots import FLOAT, kind_of, line_length, line_mask, lines_together, load_line


@triton.jit
def _forecast_apply_kernel(
    ring_ptr,
    weights_ptr,
    base_ptr,
    scale_ptr,
    step_ptr,
    y_ptr,
    stride_bb,
    stride_br,
    stride_w,
    table,
    rows,
    columns,
    lines,
    total,
    K: tl.constexpr,
    KIND: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,
    HAS_BASE: tl.constexpr,
    HAS_STEP: tl.constexpr,
    LINES: tl.constexpr,
    SIZE: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, first = i // lines, (i % lines) * GROUP
    b = row // rows
    last = tl.minimum(first + GROUP, columns)
    weights = tl.broadcast_to(weights_ptr, [LINES])
    inside = i < total
    if HAS_STEP:
        at_step = tl.load(step_ptr)
        known = (at_step >= 0) & (at_step < table)
        weights += tl.where(known, at_step, 0) * K
    else:
        weights += b * stride_w
    y = tl.zeros([LINES, SIZE], tl.float32)
    for k in tl.static_range(K):
        w = tl.load(weights + k, mask=inside, other=0.0)
        if HAS_STEP:
            w = tl.where(known, w, float("nan"))
        used = w != 0.0
        line = k * (total // lines) + row
        at = line * columns
        use = used & inside
        value = load_line(ring_ptr, at, first, last, use, SIZE, KIND, LINES, WHOLE)
        if KIND != FLOAT:
            w *= tl.load(scale_ptr + line * lines + i % lines, mask=use, other=0.0)
        y += w[:, None] * value
    offs = first[:, None] + tl.arange(0, SIZE)[None, :]
    mask = line_mask(offs, last, inside, WHOLE)
    if HAS_BASE:
        at = b * stride_bb + (row % rows) * stride_br
        y += tl.load(base_ptr + at[:, None] + offs, mask=mask, other=0.0).to(tl.float32)
    out = y_ptr + (row * columns)[:, None] + offs
    tl.store(out, narrow(y, y_ptr.dtype.element_ty), mask=mask)


def launch_forecast_apply(
    ring: Tensor,
    weights: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    step: Tensor | None,
    group: int,
    y: Tensor,
) -> None:
    """Fill `y`, which is not empty; shapes as in the module docstring."""
    slots, (batch, rows, columns) = ring.shape[0], y.shape
    length = line_length(scale, group, columns)
    size = max(16, triton.next_power_of_2(length))
    lines = triton.cdiv(columns, length)
    whole = columns % length == 0 and size == length
    per_program = lines_together(size, whole, slots)
    total = batch * rows * lines
    _forecast_apply_kernel[(triton.cdiv(total, per_program),)](
        ring,
        weights,
        *present(y, base, scale, step),
        y,
        *((0, 0) if base is None else base.stride()[:2]),
        slots if weights.dim() == 2 and step is None else 0,
        weights.shape[0],
        rows,
        columns,
        lines,
        total,
        K=slots,
        KIND=kind_of(ring, columns),
        GROUP=length,
        WHOLE=whole,
        HAS_BASE=base is not None,
        HAS_STEP=step is not None,
        LINES=per_program,
        SIZE=size,
        num_warps=4,
    )
