"""Symmetric int8 quantisation of each row, the activation side of a W8A8 product.

    amax = max_k |x_k|
    scale = amax / 127
    q = round(x * (127 / amax))          to nearest, ties to even

x       [..., K]   float32, bfloat16 or float16 (float64 in the reference)
q       [..., K]   int8 in [-127, 127]
scale   [...]      float32 (float64 for float64)

One float32 division, one multiplication and one rounding per step, in this order, so every
implementation returns the same bits. A row below 127 * 2^-126 counts as zero: scale 1, q 0. A row
that holds an infinity or a NaN gets scale NaN and q 0: whatever it is multiplied into turns NaN,
as it would without quantisation, and never into plausible numbers.

`smooth` and `rotate` change what is quantised, x'' in the place of x, and with `down` the low-rank
branch's first product comes out of the same pass: `_prologue.py` has formulas and bounds. Weights
take the same arguments; a weight for smoothed activations is W * smooth, and 1 / smooth does that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_int8 import quantize_int8 as _reference
from ._expect import expect_tensor
from ._layout import DTYPES, FLOATS, contiguous, matrix, unit_stride
from ._prologue import expect_prologue, project, prologue_cases
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["quantize_int8"]


def expect_rows(x: Tensor) -> None:
    """Refuse what is not floating [..., K]."""
    expect_tensor("x", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x: expected [..., K] with at least one axis, got a 0-d tensor")


def _outputs(x: Tensor, down: Tensor | None) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.shape[:-1]
    low = () if down is None else (x.new_empty((*rows, down.shape[0])),)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(rows, dtype=dtype), *low


def run_reference(
    x: Tensor, smooth: Tensor | None = None, rotate: int = 0, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run the reference."""
    # Contiguous like every implementation's, whatever the strides of x: `_fake` promises it.
    found = _reference(x, smooth=smooth, rotate=rotate, down=down)
    return tuple(output.contiguous() for output in found)


def run_native(
    x: Tensor, smooth: Tensor | None = None, rotate: int = 0, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run the native kernel."""
    q, scale, *low = outputs = _outputs(x, down)
    rows = scale.numel()
    if rows:
        low_rows = low[0].view(rows, low[0].shape[-1]) if low else None
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, contiguous(down)
        outs = q.view(rows, q.shape[-1]), scale.view(rows), low_rows
        _native.call("quantize_int8", *inputs, *outs)
    return outputs


def run_triton(
    x: Tensor, smooth: Tensor | None = None, rotate: int = 0, down: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Run the Triton kernel; low is torch's own product."""
    from ..kernels.quantize_int8 import launch_quantize_int8

    q, scale = _outputs(x, None)
    rows = scale.numel()
    if rows:
        views = q.view(rows, q.shape[-1]), scale.view(rows)
        launch_quantize_int8(unit_stride(matrix(x)), contiguous(smooth), rotate, *views)
    return (q, scale) if down is None else (q, scale, project(x, down))


IMPLEMENTATIONS = (
    Implementation(
        "native",
        run_native,
        lambda x, **kwargs: refuse_native("quantize_int8", [x], FLOATS),
    ),
    Implementation("triton", run_triton, lambda x, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", run_reference, lambda x, **kwargs: None),
)


def _fake(x: Tensor, smooth: Tensor | None, rotate: int, impl: str) -> tuple[Tensor, ...]:
    return _outputs(x, None)


def _fake_low(
    x: Tensor, smooth: Tensor | None, rotate: int, down: Tensor, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, down)


_op = register(
    "quantize_int8",
    "(Tensor x, Tensor? smooth, int rotate, str impl) -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)
_op_low = register(
    "quantize_int8_low",
    "(Tensor x, Tensor? smooth, int rotate, Tensor down, str impl) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake_low,
)


def quantize_int8(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Quantise each row (last axis) of x to int8 with one scale.

    Args:
        x: [..., K], floating.
        smooth: floating [K], positive: columns are divided by it first.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated after that.
        down: [R, K] in x's dtype: low, x @ down.T of x as it is given, is returned too.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, scale): int8 [..., K] and float32 [...], with x (smoothed and rotated) close to
        q * scale[..., None]. With `down` (q, scale, low), low [..., R] in x's dtype.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: x has no axis, its dtype is not floating, or an argument does not fit it.
        UnsupportedError: `impl` can't serve this tensor.
        DerivativeError: a tensor carries a tangent or requires grad.
    """
    expect_rows(x)
    if smooth is not None or rotate or down is not None:
        expect_prologue("x", x, smooth, rotate, down)
    chosen = select("quantize_int8", impl, IMPLEMENTATIONS, x)
    if down is None:
        return _op(x, smooth, rotate, chosen)
    return _op_low(x, smooth, rotate, down, chosen)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in FLOATS:
        for shape in ((5, 77, 96), (3, 5001)):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            cases.append(((x,), {}, 0.0, 0.0))
    cases += prologue_cases(device, 5120)
    x, down = (
        torch.randn((n, 1280), generator=generator).to(device, torch.bfloat16) for n in (7, 16)
    )
    # low: half a unit of bfloat16 twice, where sums fall to different sides, and the 2^-24 of each
    # of 1280 terms of order one.
    unit = torch.finfo(torch.bfloat16).eps
    cases.append(((x,), {"rotate": 64, "down": down}, unit, 1280**2 * 2.0**-24))
    return cases
