"""token_gather in Triton: one program per BLOCK_R chosen rows, whole.

x [B, N, C] with unit stride in C; index [B, M] int32 or int64 contiguous; scale, shift [B, C] with
unit stride in C; y [B, M, C] contiguous. Row r of all B M is row r % M of sample r // M.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present, strides_of
from ._norm import normalise
from ._rows import load_tile

TILE = 2048  # elements of a tile of rows that are shorter


@triton.jit
def _token_gather_kernel(
    x_ptr,
    index_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_hb,
    tokens,
    chosen,
    rows,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    NORMED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    b, n = row // chosen, tl.load(index_ptr + row, mask=row < rows, other=0).to(tl.int64)
    known = (n >= 0) & (n < tokens)
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    there = mask & known[:, None]
    out = y_ptr + (row * C)[:, None] + cols[None, :]
    if NORMED:
        x = load_tile(x_ptr, stride_xb, stride_xn, b, n, cols, there)
        _, _, y = normalise(x, there, eps, C, True)
        if HAS_SCALE:
            y = y * (1.0 + load_tile(scale_ptr, stride_sb, 0, b, n, cols, mask))
        if HAS_SHIFT:
            y = y + load_tile(shift_ptr, stride_hb, 0, b, n, cols, mask)
        y = tl.where(known[:, None], y, float("nan"))
        tl.store(out, narrow(y, y_ptr.dtype.element_ty), mask=mask)
    else:
        pointers = x_ptr + (b * stride_xb + n * stride_xn)[:, None] + cols[None, :]
        tl.store(out, tl.load(pointers, mask=there, other=float("nan")), mask=mask)


def launch_token_gather(
    x: Tensor,
    index: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    y: Tensor,
    normed: bool,
    eps: float,
) -> None:
    """Fill `y`, which is not empty; shapes as in the module docstring."""
    batch, chosen, columns = y.shape
    rows = batch * chosen
    block_c = triton.next_power_of_2(columns)
    block_r = max(1, TILE // block_c)
    _token_gather_kernel[(triton.cdiv(rows, block_r),)](
        x,
        index,
        *present(x, scale, shift),
        y,
        *strides_of(2, x),
        *strides_of(1, scale, shift),
        x.shape[1],
        chosen,
        rows,
        eps,
        C=columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        NORMED=normed,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        num_warps=min(max(block_c // 512, 4), 16),
    )
