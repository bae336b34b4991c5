"""quantize_fp8 in Triton: a program takes LINES scales and reads their values twice.

x [R, K] ([R, 2 K] for geglu and swiglu) with unit stride in K, q [R, K] uint8 and scale [R, S] fp32
contiguous: S blocks of `size` values in a row, the last one shorter. e4m3 is made of integers, so
the interpreter and GPUs without the dtype round the same. The activation, smoothing and rotation
are done again at the second reading.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._prologue import load_activated, rotate_blocks, smooth_columns

TINY = tl.constexpr(448 * 2.0**-126)


@triton.jit
def round_to_e4m3(x):
    """Return the bits of float32 x in e4m3, to nearest even, at most 448, as int32."""
    bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9, as it is for float32 from 2^14 on.
    shifted = bits.to(tl.float32, bitcast=True) + 16384.0
    small = shifted.to(tl.int32, bitcast=True) - 0x46800000
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(bits < 0x3C800000, small, normal) | sign


@triton.jit
def _load(
    x_ptr,
    smooth_ptr,
    at,
    columns,
    mask,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    x = load_activated(x_ptr, at, columns, mask, ACTIVATION)
    if SMOOTH:
        x = smooth_columns(x, smooth_ptr, at, mask)
    if B > 0:
        x = rotate_blocks(x, LINES * BLOCK, B).reshape(LINES, BLOCK)
    return x


@triton.jit
def _quantize_fp8_kernel(
    x_ptr,
    smooth_ptr,
    q_ptr,
    scale_ptr,
    stride_xr,
    columns,
    size,
    blocks,
    total,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
    SMOOTH: tl.constexpr,
    B: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)  # of all scales
    r, first = i // blocks, (i % blocks) * size
    last = tl.where(i < total, tl.minimum(first + size, columns), 0)
    x_ptr += (r * stride_xr)[:, None]
    q_ptr += (r * columns)[:, None]
    offs = first[:, None] + tl.arange(0, BLOCK)[None, :]
    top = tl.zeros([LINES, BLOCK], tl.float32)
    bad = tl.zeros([LINES, BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        at = start + offs
        mask = at < last[:, None]
        x = _load(x_ptr, smooth_ptr, at, columns, mask, LINES, BLOCK, SMOOTH, B, ACTIVATION)
        # NaN compares false, so it lands in `bad` with the infinities; maxima may drop it.
        finite = tl.abs(x) < float("inf")
        bad |= tl.where(finite, 0, 1)
        top = tl.maximum(top, tl.where(finite, tl.abs(x), 0.0))
    amax = tl.max(top, 1)
    ok = tl.max(bad, 1) == 0
    used = ok & (amax >= TINY)
    # div_rn: the plain division is approximate on GPUs, and all implementations agree to the bit.
    divisor = tl.where(used, tl.div_rn(amax, tl.full([LINES], 448.0, tl.float32)), 1.0)
    tl.store(scale_ptr + i, tl.where(ok, divisor, float("nan")), mask=i < total)
    divisors = tl.broadcast_to(divisor[:, None], [LINES, BLOCK])
    for start in range(0, size, BLOCK):
        at = start + offs
        mask = at < last[:, None]
        x = _load(x_ptr, smooth_ptr, at, columns, mask, LINES, BLOCK, SMOOTH, B, ACTIVATION)
        q = round_to_e4m3(tl.div_rn(tl.where(used[:, None], x, 0.0), divisors))
        tl.store(q_ptr + at, q.to(tl.uint8), mask=mask)


def launch_quantize_fp8(
    x: Tensor,
    smooth: Tensor | None,
    rotate: int,
    activation: str | None,
    q: Tensor,
    scale: Tensor,
    size: int,
) -> None:
    """Fill `q` and `scale`; shapes as in the module docstring, at least one scale."""
    total, block = scale.numel(), min(2048, triton.next_power_of_2(max(size, 16)))
    # A rotation of 256 spans two blocks of 128: neighbouring lines, which are then of one row.
    lines = 16 if block <= 128 else 1
    _quantize_fp8_kernel[(triton.cdiv(total, lines),)](
        x,
        x if smooth is None else smooth,
        q,
        scale,
        x.stride(0),
        q.shape[1],
        size,
        scale.shape[1],
        total,
        LINES=lines,
        BLOCK=block,
        SMOOTH=smooth is not None,
        B=rotate,
        ACTIVATION=activation,
        num_warps=4,
        enable_fp_fusion=False,
    )
