"""norm_jvp in Triton: one program per BLOCK_R whole rows, held in registers; one pass over memory.

    n = rstd (x - mean)                     t_n = rstd (t_x - t_mean - n a)
    z = n weight + bias                     t_z = t_n weight
    y = z (1 + scale) + shift               t_y = (1 + scale) t_z + t_scale z + t_shift

x, t_x, scale, shift, t_scale, t_shift, y, t_y [B, N, C] with unit stride in C, stride 0 where they
are broadcast; weight, bias [C] fp32; stats [B, N, 4] fp32: mean, rstd, t_mean, a.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import present, strides_of
from ._norm import normalise
from ._rows import load_tile, store_tile

TILE = 2048  # elements of a tile of rows that are shorter


@triton.jit
def _norm_jvp_kernel(
    x_ptr,
    t_x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    t_scale_ptr,
    t_shift_ptr,
    y_ptr,
    t_y_ptr,
    stats_ptr,
    stride_xb,
    stride_xn,
    stride_txb,
    stride_txn,
    stride_sb,
    stride_sn,
    stride_hb,
    stride_hn,
    stride_tsb,
    stride_tsn,
    stride_thb,
    stride_thn,
    stride_yb,
    stride_yn,
    stride_tyb,
    stride_tyn,
    rows,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_TX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_TSCALE: tl.constexpr,
    HAS_TSHIFT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    b, n = row // tokens, row % tokens
    mask = (row < rows)[:, None] & (cols < C)[None, :]

    x = load_tile(x_ptr, stride_xb, stride_xn, b, n, cols, mask)
    mean, rstd, unit = normalise(x, mask, eps, C, CENTRED)
    z = unit
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0)[None, :]
        z = z * weight
    if HAS_BIAS:
        z = z + tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
    y = z
    if HAS_SCALE:
        factor = 1.0 + load_tile(scale_ptr, stride_sb, stride_sn, b, n, cols, mask)
        y = y * factor
    if HAS_SHIFT:
        y = y + load_tile(shift_ptr, stride_hb, stride_hn, b, n, cols, mask)
    store_tile(y_ptr, stride_yb, stride_yn, b, n, cols, y, mask)

    t_mean = tl.zeros([BLOCK_R], tl.float32)
    a = tl.zeros([BLOCK_R], tl.float32)
    t_y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if HAS_TX:
        t_x = load_tile(t_x_ptr, stride_txb, stride_txn, b, n, cols, mask)
        if CENTRED:
            t_mean = tl.sum(t_x, 1) / C
            t_x = tl.where(mask, t_x - t_mean[:, None], 0.0)
        a = tl.sum(unit * t_x, 1) / C
        t_y = rstd[:, None] * (t_x - unit * a[:, None])
        if HAS_WEIGHT:
            t_y = t_y * weight
        if HAS_SCALE:
            t_y = t_y * factor
    if HAS_TSCALE:
        t_y += load_tile(t_scale_ptr, stride_tsb, stride_tsn, b, n, cols, mask) * z
    if HAS_TSHIFT:
        t_y += load_tile(t_shift_ptr, stride_thb, stride_thn, b, n, cols, mask)
    store_tile(t_y_ptr, stride_tyb, stride_tyn, b, n, cols, t_y, mask)

    stats = stats_ptr + row * 4
    tl.store(stats, mean, mask=row < rows)
    tl.store(stats + 1, rstd, mask=row < rows)
    tl.store(stats + 2, t_mean, mask=row < rows)
    tl.store(stats + 3, a, mask=row < rows)


def launch_norm_jvp(
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    t_scale: Tensor | None,
    t_shift: Tensor | None,
    y: Tensor,
    t_y: Tensor,
    stats: Tensor,
    centred: bool,
    eps: float,
) -> None:
    """Fill y, t_y and stats; shapes as in the module docstring."""
    batch, tokens, columns = x.shape
    rows = batch * tokens
    if rows == 0:
        return
    block_c = triton.next_power_of_2(columns)
    block_r = max(1, TILE // block_c)
    _norm_jvp_kernel[(triton.cdiv(rows, block_r),)](
        *present(x, x, t_x, weight, bias, scale, shift, t_scale, t_shift),
        y,
        t_y,
        stats,
        *strides_of(2, x, t_x, scale, shift, t_scale, t_shift, y, t_y),
        rows,
        tokens,
        eps,
        C=columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        CENTRED=centred,
        HAS_TX=t_x is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        HAS_TSCALE=t_scale is not None,
        HAS_TSHIFT=t_shift is not None,
        num_warps=min(max(block_c // 512, 4), 16),
    )
