"""norm_jvp_backward in Triton: one program per ROWS_PER_SUM rows of one item, BLOCK_R at a time.

    d_z = (1 + scale) d_y + t_scale dt_y    d_tz = (1 + scale) dt_y
    g = d_z weight    h = d_tz weight       J v = rstd (v - <v> - n <n v>)
    d_t_x = J h       d_x = J g - rstd (n <h t_n> + a d_t_x + <n h> t_n)
    d_scale = d_y z + dt_y t_z              d_t_scale = dt_y z

x, t_x, d_y, dt_y, scale, t_scale and d_x, d_t_x, d_scale, d_t_scale [B, N, C] with unit stride in
C; weight, bias [C] fp32; stats [B, N, 4] fp32. Whole rows are held in registers, and so are the
sums over the program's rows, sums [B, ceil(N / ROWS_PER_SUM), wanted, C] fp32: of the columns of
d_z n + d_tz t_n, d_z, d_scale, d_y, d_t_scale, dt_y, as the bits of WANTED ask, lowest first.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import present, strides_of
from ._rows import load_tile, store_tile

ROWS_PER_SUM = 16
TILE = 1024  # elements of a tile of rows that are shorter


@triton.jit
def _norm_jvp_backward_kernel(
    d_y_ptr,
    dt_y_ptr,
    x_ptr,
    t_x_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    t_scale_ptr,
    d_x_ptr,
    d_t_x_ptr,
    d_scale_ptr,
    d_t_scale_ptr,
    sums_ptr,
    stride_dyb,
    stride_dyn,
    stride_dtyb,
    stride_dtyn,
    stride_xb,
    stride_xn,
    stride_txb,
    stride_txn,
    stride_sb,
    stride_sn,
    stride_tsb,
    stride_tsn,
    stride_dxb,
    stride_dxn,
    stride_dtxb,
    stride_dtxn,
    stride_dsb,
    stride_dsn,
    stride_dtsb,
    stride_dtsn,
    tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CENTRED: tl.constexpr,
    WANTED: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DTY: tl.constexpr,
    HAS_TX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_TSCALE: tl.constexpr,
    HAS_DX: tl.constexpr,
    HAS_DTX: tl.constexpr,
    HAS_DSCALE: tl.constexpr,
    HAS_DTSCALE: tl.constexpr,
):
    parts = tl.cdiv(tokens, ROWS)
    item = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    cols = tl.arange(0, BLOCK_C)
    weight = tl.full([1, BLOCK_C], 1.0, tl.float32)
    bias = tl.zeros([1, BLOCK_C], tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=cols < C, other=0.0)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
    sum_weight = tl.zeros([BLOCK_C], tl.float32)
    sum_bias = tl.zeros([BLOCK_C], tl.float32)
    sum_scale = tl.zeros([BLOCK_C], tl.float32)
    sum_shift = tl.zeros([BLOCK_C], tl.float32)
    sum_t_scale = tl.zeros([BLOCK_C], tl.float32)
    sum_t_shift = tl.zeros([BLOCK_C], tl.float32)

    for start in range(0, ROWS, BLOCK_R):
        n = (part * ROWS + start + tl.arange(0, BLOCK_R)).to(tl.int64)
        b = item + n * 0
        valid = n < tokens
        mask = valid[:, None] & (cols < C)[None, :]
        stats = stats_ptr + (item * tokens + n) * 4
        mean = tl.load(stats, mask=valid, other=0.0)[:, None]
        rstd = tl.load(stats + 1, mask=valid, other=0.0)[:, None]
        t_mean = tl.load(stats + 2, mask=valid, other=0.0)[:, None]
        a = tl.load(stats + 3, mask=valid, other=0.0)[:, None]

        x = load_tile(x_ptr, stride_xb, stride_xn, b, n, cols, mask)
        unit = tl.where(mask, rstd * (x - mean), 0.0)
        t_unit = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if HAS_TX:
            t_x = load_tile(t_x_ptr, stride_txb, stride_txn, b, n, cols, mask)
            t_unit = tl.where(mask, rstd * (t_x - t_mean - unit * a), 0.0)
        d_y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        dt_y = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if HAS_DY:
            d_y = load_tile(d_y_ptr, stride_dyb, stride_dyn, b, n, cols, mask)
        if HAS_DTY:
            dt_y = load_tile(dt_y_ptr, stride_dtyb, stride_dtyn, b, n, cols, mask)
        d_z, d_tz = d_y, dt_y
        if HAS_SCALE:
            factor = 1.0 + load_tile(scale_ptr, stride_sb, stride_sn, b, n, cols, mask)
            d_z, d_tz = factor * d_y, factor * dt_y
        if HAS_TSCALE:
            d_z += load_tile(t_scale_ptr, stride_tsb, stride_tsn, b, n, cols, mask) * dt_y

        z = unit * weight + bias
        d_scale = d_y * z + dt_y * (t_unit * weight)
        d_t_scale = dt_y * z
        if HAS_DSCALE:
            store_tile(d_scale_ptr, stride_dsb, stride_dsn, b, n, cols, d_scale, mask)
        if HAS_DTSCALE:
            store_tile(d_t_scale_ptr, stride_dtsb, stride_dtsn, b, n, cols, d_t_scale, mask)
        if WANTED & 1:
            sum_weight += tl.sum(d_z * unit + d_tz * t_unit, 0)
        if WANTED & 2:
            sum_bias += tl.sum(d_z, 0)
        if WANTED & 4:
            sum_scale += tl.sum(d_scale, 0)
        if WANTED & 8:
            sum_shift += tl.sum(d_y, 0)
        if WANTED & 16:
            sum_t_scale += tl.sum(d_t_scale, 0)
        if WANTED & 32:
            sum_t_shift += tl.sum(dt_y, 0)

        if HAS_DX or HAS_DTX:
            g, h = d_z * weight, d_tz * weight
            h_unit = tl.sum(h * unit, 1)[:, None] / C
            # The two terms along n of d_x in one.
            along = (tl.sum(g * unit, 1)[:, None] + tl.sum(h * t_unit, 1)[:, None]) / C
            if CENTRED:
                g -= tl.sum(g, 1)[:, None] / C
                h -= tl.sum(h, 1)[:, None] / C
            d_t_x = rstd * (h - unit * h_unit)
            d_x = rstd * (g - unit * along - d_t_x * a - t_unit * h_unit)
            if HAS_DX:
                store_tile(d_x_ptr, stride_dxb, stride_dxn, b, n, cols, d_x, mask)
            if HAS_DTX:
                store_tile(d_t_x_ptr, stride_dtxb, stride_dtxn, b, n, cols, d_t_x, mask)

    count: tl.constexpr = (
        (WANTED & 1)
        + (WANTED >> 1 & 1)
        + (WANTED >> 2 & 1)
        + (WANTED >> 3 & 1)
        + (WANTED >> 4 & 1)
        + (WANTED >> 5 & 1)
    )
    out = sums_ptr + tl.program_id(0).to(tl.int64) * count * C + cols
    if WANTED & 1:
        tl.store(out, sum_weight, mask=cols < C)
        out += C
    if WANTED & 2:
        tl.store(out, sum_bias, mask=cols < C)
        out += C
    if WANTED & 4:
        tl.store(out, sum_scale, mask=cols < C)
        out += C
    if WANTED & 8:
        tl.store(out, sum_shift, mask=cols < C)
        out += C
    if WANTED & 16:
        tl.store(out, sum_t_scale, mask=cols < C)
        out += C
    if WANTED & 32:
        tl.store(out, sum_t_shift, mask=cols < C)


def launch_norm_jvp_backward(
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    t_scale: Tensor | None,
    d_x: Tensor | None,
    d_t_x: Tensor | None,
    d_scale: Tensor | None,
    d_t_scale: Tensor | None,
    sums: Tensor | None,
    columns_wanted: int,
    centred: bool,
) -> None:
    """Fill what is given of d_x, d_t_x, d_scale, d_t_scale and sums."""
    batch, tokens, columns = x.shape
    if batch * tokens == 0:
        return
    block_c = triton.next_power_of_2(columns)
    block_r = min(ROWS_PER_SUM, max(1, TILE // block_c))
    inputs = (weight, bias, scale, t_scale)
    outputs = (d_x, d_t_x, d_scale, d_t_scale)
    _norm_jvp_backward_kernel[(batch * triton.cdiv(tokens, ROWS_PER_SUM),)](
        *present(x, d_y, dt_y, x, t_x, stats, *inputs, *outputs, sums),
        *strides_of(2, d_y, dt_y, x, t_x, scale, t_scale, *outputs),
        tokens,
        C=columns,
        ROWS=ROWS_PER_SUM,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        CENTRED=centred,
        WANTED=columns_wanted,
        HAS_DY=d_y is not None,
        HAS_DTY=dt_y is not None,
        HAS_TX=t_x is not None,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_TSCALE=t_scale is not None,
        HAS_DX=d_x is not None,
        HAS_DTX=d_t_x is not None,
        HAS_DSCALE=d_scale is not None,
        HAS_DTSCALE=d_t_scale is not None,
        num_warps=min(max(block_c // 256, 4), 16),
    )
