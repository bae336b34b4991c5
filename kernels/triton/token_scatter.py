"""token_scatter in Triton: one program per BLOCK_R tokens and BLOCK_C columns.

value [B, M, C], base and y [B, N, C], gate [B, C], all with unit stride in C; position [B, N] int32
or int64 contiguous. Without base y is it. Row r of all B N is token r % N of sample r // N.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present, strides_of
from ._rows import load_tile

TILE, MAX_COLUMNS = 2048, 1024


@triton.jit
def _token_scatter_kernel(
    value_ptr,
    position_ptr,
    base_ptr,
    gate_ptr,
    y_ptr,
    stride_vb,
    stride_vn,
    stride_bb,
    stride_bn,
    stride_gb,
    stride_yb,
    stride_yn,
    tokens,
    chosen,
    rows,
    columns,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IN_PLACE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    parts = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // parts).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % parts * BLOCK_C + tl.arange(0, BLOCK_C)
    b, n = row // tokens, row % tokens
    p = tl.load(position_ptr + row, mask=row < rows, other=-1).to(tl.int64)
    mask = (row < rows)[:, None] & (cols < columns)[None, :]
    moves = mask & (p >= 0)[:, None]
    there = moves & (p < chosen)[:, None]
    base = base_ptr + (b * stride_bb + n * stride_bn)[:, None] + cols[None, :]
    pointers = value_ptr + (b * stride_vb + p * stride_vn)[:, None] + cols[None, :]
    y = tl.load(pointers, mask=there, other=float("nan"))
    if HAS_GATE or RESIDUAL:
        y = y.to(tl.float32)
        if HAS_GATE:
            y = load_tile(gate_ptr, stride_gb, 0, b, n, cols, there) * y
        if RESIDUAL:
            y = tl.load(base, mask=there, other=0.0).to(tl.float32) + y
        y = narrow(y, y_ptr.dtype.element_ty)
    out = y_ptr + (b * stride_yb + n * stride_yn)[:, None] + cols[None, :]
    if IN_PLACE:
        tl.store(out, y, mask=moves)
    else:
        kept = tl.load(base, mask=mask & (p < 0)[:, None], other=0.0)
        tl.store(out, tl.where((p < 0)[:, None], kept, y), mask=mask)


def launch_token_scatter(
    value: Tensor,
    position: Tensor,
    base: Tensor | None,
    gate: Tensor | None,
    y: Tensor,
    residual: bool,
) -> None:
    """Fill `y`, which is not empty; shapes as in the module docstring."""
    batch, tokens, columns = y.shape
    rows = batch * tokens
    block_c = min(triton.next_power_of_2(columns), MAX_COLUMNS)
    block_r = max(1, TILE // block_c)
    kept = y if base is None else base
    _token_scatter_kernel[(triton.cdiv(rows, block_r) * triton.cdiv(columns, block_c),)](
        value,
        position,
        kept,
        *present(y, gate),
        y,
        *strides_of(2, value, kept),
        *strides_of(1, gate),
        *strides_of(2, y),
        tokens,
        value.shape[1],
        rows,
        columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        IN_PLACE=base is None,
        HAS_GATE=gate is not None,
        RESIDUAL=residual,
        num_warps=4,
    )
