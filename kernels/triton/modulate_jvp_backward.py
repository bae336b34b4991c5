"""modulate_jvp_backward in Triton: one program per ROWS_PER_SUM rows of an item by BLOCK_C columns.

    d_y = gate d_out + t_gate dt_out        d_gate = d_out y + dt_out t_y
    d_t_y = gate dt_out                     d_t_gate = dt_out y

d_out, dt_out, y, gate, t_y, t_gate and d_y, d_t_y, d_gate, d_t_gate [B, N, C] with unit stride in
C; gate_sums, t_gate_sums [B, ceil(N / ROWS_PER_SUM), C] fp32: d_gate and d_t_gate added over the
program's rows.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import present, strides_of
from ._rows import load_tile, store_tile

ROWS_PER_SUM = 16
MAX_BLOCK_C = 512
TILE = 1024


@triton.jit
def _modulate_jvp_backward_kernel(
    d_out_ptr,
    dt_out_ptr,
    y_ptr,
    gate_ptr,
    t_y_ptr,
    t_gate_ptr,
    d_y_ptr,
    d_t_y_ptr,
    d_gate_ptr,
    d_t_gate_ptr,
    gate_sums_ptr,
    t_gate_sums_ptr,
    stride_dob,
    stride_don,
    stride_dtob,
    stride_dton,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_tyb,
    stride_tyn,
    stride_tgb,
    stride_tgn,
    stride_dyb,
    stride_dyn,
    stride_dtyb,
    stride_dtyn,
    stride_dgb,
    stride_dgn,
    stride_dtgb,
    stride_dtgn,
    tokens,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_DOUT: tl.constexpr,
    HAS_DTOUT: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TY: tl.constexpr,
    HAS_TGATE: tl.constexpr,
    HAS_DY: tl.constexpr,
    HAS_DTY: tl.constexpr,
    HAS_DGATE: tl.constexpr,
    HAS_DTGATE: tl.constexpr,
    HAS_GATE_SUMS: tl.constexpr,
    HAS_TGATE_SUMS: tl.constexpr,
):
    parts = tl.cdiv(tokens, ROWS)
    item = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    gate_sum = tl.zeros([BLOCK_C], tl.float32)
    t_gate_sum = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, ROWS, BLOCK_R):
        n = (part * ROWS + start + tl.arange(0, BLOCK_R)).to(tl.int64)
        b = item + n * 0
        mask = (n < tokens)[:, None] & (cols < C)[None, :]
        d_out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        dt_out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
        if HAS_DOUT:
            d_out = load_tile(d_out_ptr, stride_dob, stride_don, b, n, cols, mask)
        if HAS_DTOUT:
            dt_out = load_tile(dt_out_ptr, stride_dtob, stride_dton, b, n, cols, mask)
        if HAS_DY or HAS_DTY:
            d_y, d_t_y = d_out, dt_out
            if HAS_GATE:
                gate = load_tile(gate_ptr, stride_gb, stride_gn, b, n, cols, mask)
                d_y, d_t_y = gate * d_out, gate * dt_out
            if HAS_TGATE:
                d_y += load_tile(t_gate_ptr, stride_tgb, stride_tgn, b, n, cols, mask) * dt_out
            if HAS_DY:
                store_tile(d_y_ptr, stride_dyb, stride_dyn, b, n, cols, d_y, mask)
            if HAS_DTY:
                store_tile(d_t_y_ptr, stride_dtyb, stride_dtyn, b, n, cols, d_t_y, mask)
        if HAS_DGATE or HAS_DTGATE or HAS_GATE_SUMS or HAS_TGATE_SUMS:
            y = load_tile(y_ptr, stride_yb, stride_yn, b, n, cols, mask)
            d_gate, d_t_gate = d_out * y, dt_out * y
            if HAS_TY:
                d_gate += dt_out * load_tile(t_y_ptr, stride_tyb, stride_tyn, b, n, cols, mask)
            if HAS_DGATE:
                store_tile(d_gate_ptr, stride_dgb, stride_dgn, b, n, cols, d_gate, mask)
            if HAS_DTGATE:
                store_tile(d_t_gate_ptr, stride_dtgb, stride_dtgn, b, n, cols, d_t_gate, mask)
            gate_sum += tl.sum(d_gate, 0)
            t_gate_sum += tl.sum(d_t_gate, 0)
    out = tl.program_id(0).to(tl.int64) * C + cols
    if HAS_GATE_SUMS:
        tl.store(gate_sums_ptr + out, gate_sum, mask=cols < C)
    if HAS_TGATE_SUMS:
        tl.store(t_gate_sums_ptr + out, t_gate_sum, mask=cols < C)


def launch_modulate_jvp_backward(
    d_out: Tensor | None,
    dt_out: Tensor | None,
    y: Tensor,
    gate: Tensor | None,
    t_y: Tensor | None,
    t_gate: Tensor | None,
    d_y: Tensor | None,
    d_t_y: Tensor | None,
    d_gate: Tensor | None,
    d_t_gate: Tensor | None,
    gate_sums: Tensor | None,
    t_gate_sums: Tensor | None,
) -> None:
    """Fill what is given of the gradients and the sums; shapes as in the module docstring."""
    batch, tokens, columns = y.shape
    if batch * tokens == 0:
        return
    block_c = min(triton.next_power_of_2(columns), MAX_BLOCK_C)
    block_r = min(ROWS_PER_SUM, TILE // block_c)
    tensors = (d_out, dt_out, y, gate, t_y, t_gate, d_y, d_t_y, d_gate, d_t_gate)
    grid = (batch * triton.cdiv(tokens, ROWS_PER_SUM), triton.cdiv(columns, block_c))
    _modulate_jvp_backward_kernel[grid](
        *present(y, *tensors, gate_sums, t_gate_sums),
        *strides_of(2, *tensors),
        tokens,
        C=columns,
        ROWS=ROWS_PER_SUM,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        HAS_DOUT=d_out is not None,
        HAS_DTOUT=dt_out is not None,
        HAS_GATE=gate is not None,
        HAS_TY=t_y is not None,
        HAS_TGATE=t_gate is not None,
        HAS_DY=d_y is not None,
        HAS_DTY=d_t_y is not None,
        HAS_DGATE=d_gate is not None,
        HAS_DTGATE=d_t_gate is not None,
        HAS_GATE_SUMS=gate_sums is not None,
        HAS_TGATE_SUMS=t_gate_sums is not None,
    )
