"""norm_quantize_int8 in Triton: one program per BLOCK_R whole rows, held in registers.

    z = (norm(x) weight + bias) (1 + scale) + shift         rounded to x's dtype
    q, q_scale as by quantize_int8 of z with smooth and rotate

x, scale, shift [B, N, C] with unit stride in C, stride 0 where they are broadcast; weight, bias [C]
fp32; smooth [C] floating; q [B, N, C] int8 and q_scale [B, N] fp32 contiguous.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present, strides_of
from ._norm import normalise
from ._prologue import rotate_blocks, smooth_columns
from ._rows import load_tile
from .quantize_int8 import round_to_int8, row_scales

TILE = 2048  # elements of a tile of rows that are shorter


@triton.jit
def _norm_quantize_int8_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    smooth_ptr,
    q_ptr,
    q_scale_ptr,
    stride_xb,
    stride_xn,
    stride_sb,
    stride_sn,
    stride_hb,
    stride_hn,
    rows,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_C)
    b, n = row // tokens, row % tokens
    mask = (row < rows)[:, None] & (cols < C)[None, :]

    x = load_tile(x_ptr, stride_xb, stride_xn, b, n, cols, mask)
    _, _, z = normalise(x, mask, eps, C, CENTRED)
    if HAS_WEIGHT:
        z = z * tl.load(weight_ptr + cols, mask=cols < C, other=0.0)[None, :]
    if HAS_BIAS:
        z = z + tl.load(bias_ptr + cols, mask=cols < C, other=0.0)[None, :]
    if HAS_SCALE:
        z = z * (1.0 + load_tile(scale_ptr, stride_sb, stride_sn, b, n, cols, mask))
    if HAS_SHIFT:
        z = z + load_tile(shift_ptr, stride_hb, stride_hn, b, n, cols, mask)
    z = narrow(z, x_ptr.dtype.element_ty).to(tl.float32)
    if SMOOTH:
        z = smooth_columns(z, smooth_ptr, cols[None, :], (cols < C)[None, :])
    if B > 0:  # divides C and so BLOCK_C: a block's values are of one row
        z = rotate_blocks(z, BLOCK_R * BLOCK_C, B).reshape(BLOCK_R, BLOCK_C)

    magnitude = tl.abs(z)
    # NaN compares false, so it counts with the infinities; maxima may drop it.
    bad = tl.where(magnitude < float("inf"), 0, 1)
    z = tl.where(bad == 0, z, 0.0)
    inverse, q_scale = row_scales(tl.max(tl.abs(z), 1), tl.max(bad, 1) == 0)
    q = q_ptr + (row * C)[:, None] + cols[None, :]
    tl.store(q, round_to_int8(z * inverse[:, None]), mask=mask)
    tl.store(q_scale_ptr + row, q_scale, mask=row < rows)


def launch_norm_quantize_int8(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    smooth: Tensor | None,
    rotate: int,
    q: Tensor,
    q_scale: Tensor,
    centred: bool,
    eps: float,
) -> None:
    """Fill q and q_scale; shapes as in the module docstring."""
    batch, tokens, columns = x.shape
    rows = batch * tokens
    block_c = triton.next_power_of_2(columns)
    block_r = max(1, TILE // block_c)
    # No contraction: a quotient must be rounded before ROUND is added to it.
    _norm_quantize_int8_kernel[(triton.cdiv(rows, block_r),)](
        x,
        *present(x, weight, bias, scale, shift, smooth),
        q,
        q_scale,
        *strides_of(2, x, scale, shift),
        rows,
        tokens,
        eps,
        C=columns,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
        CENTRED=centred,
        HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None,
        HAS_SCALE=scale is not None,
        HAS_SHIFT=shift is not None,
        SMOOTH=smooth is not None,
        B=rotate,
        num_warps=min(max(block_c // 512, 4), 16),
        enable_fp_fusion=False,
    )
