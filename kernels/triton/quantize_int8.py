"""quantize_int8 in Triton: one program per row, which reads it twice (the second time from cache).

x [R, K] ([R, 2 K] for geglu and swiglu) with unit stride in K, q [R, K] int8 and scale [R] fp32
contiguous. The row is walked in blocks; each block's running maximum stays in registers. The
activation, smoothing and rotation are done again at the second reading: a row need not fit into
registers.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._prologue import load_activated, rotate_blocks, smooth_columns

TINY = tl.constexpr(127 * 2.0**-126)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even


@triton.jit
def row_scales(amax, finite):
    """Return (inverse, scale) of rows with these finite maxima, where all of the row is finite."""
    used = finite & (amax >= TINY)
    # div_rn: the plain division is approximate on GPUs, and all implementations agree to the bit.
    top = tl.full(amax.shape, 127.0, tl.float32)
    divisor = tl.where(used, amax, 127.0)
    inverse = tl.where(used, tl.div_rn(top, divisor), 0.0)
    scale = tl.where(used, tl.div_rn(amax, top), 1.0)
    return inverse, tl.where(finite, scale, float("nan"))


@triton.jit
def round_to_int8(steps):
    """Round to nearest, ties to even; compile without contraction of the product before it."""
    return ((steps + ROUND) - ROUND).to(tl.int8)


@triton.jit
def _load(
    x_ptr,
    smooth_ptr,
    at,
    columns,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    x = load_activated(x_ptr, at, columns, at < columns, ACTIVATION)
    if SMOOTH:
        x = smooth_columns(x, smooth_ptr, at, at < columns)
    if B > 0:
        x = rotate_blocks(x, BLOCK, B)
    return x


@triton.jit
def _quantize_int8_kernel(
    x_ptr,
    smooth_ptr,
    q_ptr,
    scale_ptr,
    stride_xr,
    columns,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    x_ptr += r * stride_xr
    q_ptr += r * columns
    offs = tl.arange(0, BLOCK)
    top = tl.zeros([BLOCK], tl.float32)
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, columns, BLOCK):
        x = _load(x_ptr, smooth_ptr, start + offs, columns, BLOCK, SMOOTH, B, ACTIVATION)
        magnitude = tl.abs(x)
        # NaN compares false, so it lands in `bad` with the infinities; maxima may drop it.
        finite = magnitude < float("inf")
        bad |= tl.where(finite, 0, 1)
        top = tl.maximum(top, tl.where(finite, magnitude, 0.0))
    amax = tl.max(top, 0)
    inverse, scale = row_scales(amax, tl.max(bad, 0) == 0)
    tl.store(scale_ptr + r, scale)
    for start in range(0, columns, BLOCK):
        x = _load(x_ptr, smooth_ptr, start + offs, columns, BLOCK, SMOOTH, B, ACTIVATION)
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        tl.store(q_ptr + start + offs, round_to_int8(x * inverse), mask=start + offs < columns)


def launch_quantize_int8(
    x: Tensor,
    smooth: Tensor | None,
    rotate: int,
    activation: str | None,
    q: Tensor,
    scale: Tensor,
) -> None:
    """Fill `q` and `scale`; shapes as in the module docstring, at least one row."""
    rows, columns = q.shape
    block = min(4096, triton.next_power_of_2(max(columns, 16)))
    # No fusion: x * inverse must be rounded before ROUND is added, as everywhere else.
    _quantize_int8_kernel[(rows,)](
        x,
        x if smooth is None else smooth,
        q,
        scale,
        x.stride(0),
        columns,
        BLOCK=block,
        SMOOTH=smooth is not None,
        B=rotate,
        ACTIVATION=activation,
        num_warps=max(4, block // 512),  # 16 values a thread: with 32, smoothing spills on sm_90
        enable_fp_fusion=False,
    )
