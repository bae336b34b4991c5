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

`activation`, `smooth` and `rotate` change what is quantised, x'' in the place of x, and with `down`
the low-rank branch's first product comes out of the same pass: `_prologue.py` has formulas and
bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_fp8 import quantize_fp8 as _reference
from ._epilogue import width
from ._layout import FLOATS, contiguous, matrix, unit_stride
from ._prologue import activation_cases, expect_prologue, prologue_cases, quantise_apart
from ._register import register
from ._select import KERNEL_NOT_RUN_YET, Implementation, refuse_triton, select
from .quantize_int8 import expect_rows, has_low, refuse_native_rows, without_low

__all__ = ["quantize_fp8"]

BLOCK = 128


def _outputs(
    x: Tensor, block: int | None, down: Tensor | None, activation: str
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, K = x.shape[:-1], width(x.shape[-1], activation)
    shape = rows if block is None else (*rows, -(-K // block))
    low = () if down is None else (x.new_empty((*rows, down.shape[0])),)
    q = x.new_empty((*rows, K), dtype=torch.float8_e4m3fn)
    return q, x.new_empty(shape, dtype=dtype), *low


def _run_reference(
    x: Tensor,
    block: int | None,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    named = {"smooth": smooth, "rotate": rotate, "down": down, "activation": activation or None}
    return tuple(output.contiguous() for output in _reference(x, block=block, **named))


def _views(q: Tensor, scale: Tensor, block: int | None) -> tuple[int, Tensor, Tensor, int]:
    """Return the rows, q and scale seen as rows, and how many values share a scale."""
    K = q.shape[-1]
    blocks = 1 if block is None else scale.shape[-1]
    rows = scale.numel() // blocks
    # As bytes: neither the native library nor older GPUs know the dtype.
    return rows, q.view(torch.uint8).view(rows, K), scale.view(rows, blocks), block or max(K, 1)


def _run_native(
    x: Tensor,
    block: int | None,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    if down is not None and not has_low(x, smooth, down):
        return quantise_apart(lambda x: _run_native(x, block, smooth, rotate), x, activation, down)
    q, scale, *low = outputs = _outputs(x, block, down, activation)
    if scale.numel():
        rows, *views = _views(q, scale, block)
        low_rows = low[0].view(rows, low[0].shape[-1]) if low else None
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, contiguous(down), activation
        _native.call("quantize_fp8", *inputs, *views, low_rows)
    elif low:
        low[0].zero_()  # rows without values have no scale to compute, but sums
    return outputs


def run_triton(
    x: Tensor,
    block: int | None,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    """Run the Triton kernel; low is torch's own product."""
    from ..kernels.quantize_fp8 import launch_quantize_fp8

    if down is not None:
        return quantise_apart(lambda x: run_triton(x, block, smooth, rotate), x, activation, down)
    q, scale = _outputs(x, block, None, activation)
    if scale.numel():
        _, *views = _views(q, scale, block)
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, activation or None
        launch_quantize_fp8(*inputs, *views)
    return q, scale


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, activation=None, **kwargs: refuse_native_rows("quantize_fp8", x, activation),
        held_back=KERNEL_NOT_RUN_YET,
    ),
    Implementation("triton", run_triton, lambda x, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda x, **kwargs: None),
)


def _fake(
    x: Tensor, block: int | None, smooth: Tensor | None, rotate: int, activation: str, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, block, None, activation)


def _fake_low(
    x: Tensor,
    block: int | None,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor,
    activation: str,
    impl: str,
) -> tuple[Tensor, ...]:
    return _outputs(x, block, down, activation)


_INPUTS = "Tensor x, int? block, Tensor? smooth, int rotate"
_op = register(
    "quantize_fp8",
    f"({_INPUTS}, str activation, str impl) -> (Tensor, Tensor)",
    without_low(IMPLEMENTATIONS, 4),
    _fake,
)
_op_low = register(
    "quantize_fp8_low",
    f"({_INPUTS}, Tensor down, str activation, str impl) -> (Tensor, Tensor, Tensor)",
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
    activation: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Quantise each row (last axis) of x to e4m3 with one scale, or one for each 128 neighbours.

    Args:
        x: [..., K], floating; [..., 2 K] with "geglu" or "swiglu".
        block: None for one scale a row, or 128.
        smooth: floating [K], positive: columns are divided by it first.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated after that.
        down: [R, K] in x's dtype: low, x @ down.T of x (activated, not smoothed), is returned too.
        activation: None, "gelu", "gelu_tanh", "silu", "geglu" or "swiglu": comes before all else.
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
    expect_prologue("x", x, smooth, rotate, down, activation)
    chosen = select("quantize_fp8", impl, IMPLEMENTATIONS, x, activation=activation)
    if down is None:
        return _op(x, block, smooth, rotate, activation or "", chosen)
    return _op_low(x, block, smooth, rotate, down, activation or "", chosen)


def gate_cases(device: torch.device) -> list[tuple[Any, ...]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree.

    With an activation (args, kwargs, bound), in norm.
    """
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[Any, ...]] = []
    for dtype in FLOATS:
        for block in (None, BLOCK):
            x = torch.randn((5, 7, 300), generator=generator).to(device, dtype)
            cases.append(((x,), {"block": block}, 0.0, 0.0))
    for block in (None, BLOCK):
        cases += [
            (args, kwargs | {"block": block}, *bounds)
            for args, kwargs, *bounds in prologue_cases(device, 2560)
        ]
    return cases + activation_cases(device, 2560)
