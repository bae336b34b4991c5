"""modulate_jvp in Triton: one program per tile of BLOCK_R rows by BLOCK_C columns.

    out = x + gate y                        t_out = t_x + gate t_y + t_gate y

x, y, gate, t_x, t_y, t_gate, out, t_out [B, N, C] with unit stride in C, stride 0 where gate and
t_gate are broadcast.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import present, strides_of
from ._rows import load_tile, store_tile

MAX_BLOCK_C = 1024
TILE = 2048


@triton.jit
def _modulate_jvp_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    t_x_ptr,
    t_y_ptr,
    t_gate_ptr,
    out_ptr,
    t_out_ptr,
    stride_xb,
    stride_xn,
    stride_yb,
    stride_yn,
    stride_gb,
    stride_gn,
    stride_txb,
    stride_txn,
    stride_tyb,
    stride_tyn,
    stride_tgb,
    stride_tgn,
    stride_ob,
    stride_on,
    stride_tob,
    stride_ton,
    rows,
    tokens,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_TX: tl.constexpr,
    HAS_TY: tl.constexpr,
    HAS_TGATE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b, n = row // tokens, row % tokens
    mask = (row < rows)[:, None] & (cols < C)[None, :]
    x = load_tile(x_ptr, stride_xb, stride_xn, b, n, cols, mask)
    y = load_tile(y_ptr, stride_yb, stride_yn, b, n, cols, mask)
    gate = tl.full([BLOCK_R, BLOCK_C], 1.0, tl.float32)
    if HAS_GATE:
        gate = load_tile(gate_ptr, stride_gb, stride_gn, b, n, cols, mask)
    store_tile(out_ptr, stride_ob, stride_on, b, n, cols, x + gate * y, mask)
    t_out = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    if HAS_TX:
        t_out = load_tile(t_x_ptr, stride_txb, stride_txn, b, n, cols, mask)
    if HAS_TY:
        t_out += gate * load_tile(t_y_ptr, stride_tyb, stride_tyn, b, n, cols, mask)
    if HAS_TGATE:
        t_out += load_tile(t_gate_ptr, stride_tgb, stride_tgn, b, n, cols, mask) * y
    store_tile(t_out_ptr, stride_tob, stride_ton, b, n, cols, t_out, mask)


def launch_modulate_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    t_x: Tensor | None,
    t_y: Tensor | None,
    t_gate: Tensor | None,
    out: Tensor,
    t_out: Tensor,
) -> None:
    """Fill out and t_out; shapes as in the module docstring."""
    batch, tokens, columns = x.shape
    rows = batch * tokens
    if rows == 0:
        return
    block_c = min(triton.next_power_of_2(columns), MAX_BLOCK_C)
    block_r = TILE // block_c
    _modulate_jvp_kernel[(triton.cdiv(rows, block_r), triton.cdiv(columns, block_c))](
        *present(x, x, y, gate, t_x, t_y, t_gate),
        out,
        t_out,
        *strides_of(2, x, y, gate, t_x, t_y, t_gate, out, t_out),
        rows,
        tokens,
        C=columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        HAS_GATE=gate is not None,
        HAS_TX=t_x is not None,
        HAS_TY=t_y is not None,
        HAS_TGATE=t_gate is not None,
    )
