"""Symmetric 8-bit floating quantisation (e4m3) of each row, or of blocks of 128 neighbours in it.

    amax = max_k |x_k|
    scale = amax / 448
    q = round_to_e4m3(x / scale)         to nearest, ties to even, at most 448

x       [..., K]   float32, bfloat16 or float16 (float64 in the reference)
q       [..., K]   float8_e4m3fn
scale   [...]      float32 (float64 for float64), one a row; with blocks [..., ceil(K / 128)], the
                   last block of a row as short as K leaves it

One float32 division a scale, one division and one rounding a value, so every implementation
returns the same bits. The error is 2^-4 of a value at most, or 2^-10 of the scale near zero:
relative to the value, unlike int8's, which suits rows of a few extremes. docs/ops/quantize_fp8.md
compares the two.

A row (block) below 448 * 2^-126 counts as zero: scale 1, q 0. One that holds an infinity or a NaN
gets scale NaN and q 0: whatever it is multiplied into turns NaN and never into plausible numbers.

`smooth` and `rotate` change what is quantised, x'' in the place of x, and with `down` the low-rank
branch's first product comes out of the same pass: `_prologue.py` has formulas and bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_fp8 import quantize_fp8 as _reference
from ._layout import FLOATS, contiguous, matrix, unit_stride
from ._prologue import expect_prologue, project, prologue_cases
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from .quantize_int8 import expect_rows

__all__ = ["quantize_fp8"]

BLOCK = 128


def _outputs(x: Tensor, block: int | None, down: Tensor | None) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (*rows, K) = x.shape
    shape = rows if block is None else [*rows, -(-K // block)]
    low = () if down is None else (x.new_empty((*rows, down.shape[0])),)
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return q, x.new_empty(shape, dtype=dtype), *low


def _run_reference(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    found = _reference(x, block=block, smooth=smooth, rotate=rotate, down=down)
    return tuple(output.contiguous() for output in found)


def _views(q: Tensor, scale: Tensor, block: int | None) -> tuple[int, Tensor, Tensor, int]:
    """Return the rows, q and scale seen as rows, and how many values share a scale."""
    K = q.shape[-1]
    blocks = 1 if block is None else scale.shape[-1]
    rows = scale.numel() // blocks
    # As bytes: neither the native library nor older GPUs know the dtype.
    return rows, q.view(torch.uint8).view(rows, K), scale.view(rows, blocks), block or max(K, 1)


def _run_native(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    q, scale, *low = outputs = _outputs(x, block, down)
    if scale.numel():
        rows, *views = _views(q, scale, block)
        low_rows = low[0].view(rows, low[0].shape[-1]) if low else None
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, contiguous(down)
        _native.call("quantize_fp8", *inputs, *views, low_rows)
    elif low:
        low[0].zero_()  # rows without values have no scale to compute, but sums
    return outputs


def run_triton(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run the Triton kernel; low is torch's own product."""
    from ..kernels.quantize_fp8 import launch_quantize_fp8

    q, scale = _outputs(x, block, None)
    if scale.numel():
        _, *views = _views(q, scale, block)
        launch_quantize_fp8(unit_stride(matrix(x)), contiguous(smooth), rotate, *views)
    return (q, scale) if down is None else (q, scale, project(x, down))


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, **kwargs: refuse_native("quantize_fp8", [x], FLOATS),
    ),
    Implementation("triton", run_triton, lambda x, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda x, **kwargs: None),
)


def _fake(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, block, None)


def _fake_low(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, down: Tensor, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, block, down)


_INPUTS = "Tensor x, int? block, Tensor? smooth, int rotate"
_op = register("quantize_fp8", f"({_INPUTS}, str impl) -> (Tensor, Tensor)", IMPLEMENTATIONS, _fake)
_op_low = register(
    "quantize_fp8_low",
    f"({_INPUTS}, Tensor down, str impl) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake_low,
)


def quantize_fp8(
    x: Tensor,
    *,
    block: int | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Quantise each row (last axis) of x to e4m3 with one scale, or one for each 128 neighbours.

    Args:
        x: [..., K], floating.
        block: None for one scale a row, or 128.
        smooth: floating [K], positive: columns are divided by it first.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated after that.
        down: [R, K] in x's dtype: low, x @ down.T of x as it is given, is returned too.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, scale): float8_e4m3fn [..., K] and float32 [...] or [..., ceil(K / 128)]; x (smoothed
        and rotated) is close to q times its scale. With `down` (q, scale, low), low [..., R] in
        x's dtype.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: x has no axis, its dtype is not floating, the block is unknown, or an argument
            does not fit x.
        UnsupportedError: `impl` can't serve this tensor.
        DerivativeError: a tensor carries a tangent or requires grad.
    """
    expect_rows(x)
    if block not in (None, BLOCK):
        raise ValueError(f"block: expected None or {BLOCK}, got {block!r}")
    expect_prologue("x", x, smooth, rotate, down)
    chosen = select("quantize_fp8", impl, IMPLEMENTATIONS, x)
    if down is None:
        return _op(x, block, smooth, rotate, chosen)
    return _op_low(x, block, smooth, rotate, down, chosen)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in FLOATS:
        for block in (None, BLOCK):
            x = torch.randn((5, 7, 300), generator=generator).to(device, dtype)
            cases.append(((x,), {"block": block}, 0.0, 0.0))
    for block in (None, BLOCK):
        cases += [
            (args, kwargs | {"block": block}, *bounds)
            for args, kwargs, *bounds in prologue_cases(device, 2560)
        ]
    return cases
