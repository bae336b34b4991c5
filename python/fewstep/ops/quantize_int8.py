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

`activation`, `smooth` and `rotate` change what is quantised, x'' in the place of x, and with `down`
the low-rank branch's first product comes out of the same pass: `_prologue.py` has formulas and
bounds. Weights take smooth and rotate too; a weight for smoothed activations is W * smooth, and
1 / smooth does that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_int8 import quantize_int8 as _reference
from ._epilogue import width
from ._expect import expect_tensor
from ._layout import DTYPES, FLOATS, contiguous, matrix, refuse_rows, unit_stride
from ._prologue import activation_cases, expect_prologue, prologue_cases, quantise_apart
from ._register import register
from ._select import KERNEL_NOT_RUN_YET, Implementation, refuse_native, refuse_triton, select

__all__ = ["quantize_int8"]

MAX_CUDA_COLUMNS = 24576  # a row is held in registers
MAX_LOW_RANK = 64  # what a GPU's warps hold of low


def expect_rows(x: Tensor) -> None:
    """Refuse what is not floating [..., K]."""
    expect_tensor("x", x)
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x: expected [..., K] with at least one axis, got a 0-d tensor")


def refuse_native_rows(op: str, x: Tensor, activation: str | None = None) -> str | None:
    """Return why the native kernel `op` can't take these rows."""
    reason = refuse_native(op, [x], FLOATS)
    K = width(x.shape[-1], activation)
    if reason is None and x.device.type == "cuda" and K > MAX_CUDA_COLUMNS:
        return f"expected at most {MAX_CUDA_COLUMNS} columns on a GPU, got {K}"
    return reason


def has_low(x: Tensor, smooth: Tensor | None, down: Tensor) -> bool:
    """Return whether the native kernel makes low itself; on a GPU it needs 16 rows in one place.

    csrc/include/fewstep/cuda/quantize_low.cuh has the layout that is counted here.
    """
    if x.device.type != "cuda":
        return True
    R, K = down.shape
    if x.dtype not in FLOATS[1:] or not 0 < R <= MAX_LOW_RANK or K == 0 or K % 16:
        return False
    if any(refuse_rows("", rows) for rows in (matrix(x), down.contiguous())):
        return False
    properties = torch.cuda.get_device_properties(x.device)
    needed = low_shared_bytes(K, R, smooth is not None)
    return needed <= getattr(properties, "shared_memory_per_block_optin", 0)


def low_shared_bytes(K: int, R: int, is_smoothed: bool) -> int:
    """Return the shared memory of a block that makes low, as `low_shared_bytes` in C++ does."""
    area = max(2048 * -(-R // 8), 256 * -(-K // 64) if is_smoothed else 0)
    return area + 16 * (128 * -(-K // 64) + 64)


def _outputs(x: Tensor, down: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.shape[:-1]
    low = () if down is None else (x.new_empty((*rows, down.shape[0])),)
    q = x.new_empty((*rows, width(x.shape[-1], activation)), dtype=torch.int8)
    return q, x.new_empty(rows, dtype=dtype), *low


def run_reference(
    x: Tensor,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    """Run the reference."""
    # Contiguous like every implementation's, whatever the strides of x: `_fake` promises it.
    found = _reference(x, smooth=smooth, rotate=rotate, down=down, activation=activation or None)
    return tuple(output.contiguous() for output in found)


def run_native(
    x: Tensor,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    """Run the native kernel."""
    if down is not None and not has_low(x, smooth, down):
        return quantise_apart(lambda x: run_native(x, smooth, rotate), x, activation, down)
    q, scale, *low = outputs = _outputs(x, down, activation)
    rows = scale.numel()
    if rows:
        low_rows = low[0].view(rows, low[0].shape[-1]) if low else None
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, contiguous(down), activation
        outs = q.view(rows, q.shape[-1]), scale.view(rows), low_rows
        _native.call("quantize_int8", *inputs, *outs)
    return outputs


def run_triton(
    x: Tensor,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, ...]:
    """Run the Triton kernel; low is torch's own product."""
    from ..kernels.quantize_int8 import launch_quantize_int8

    if down is not None:
        return quantise_apart(lambda x: run_triton(x, smooth, rotate), x, activation, down)
    q, scale = _outputs(x, None, activation)
    rows = scale.numel()
    if rows:
        inputs = unit_stride(matrix(x)), contiguous(smooth), rotate, activation or None
        launch_quantize_int8(*inputs, q.view(rows, q.shape[-1]), scale.view(rows))
    return q, scale


IMPLEMENTATIONS = (
    Implementation(
        "native",
        run_native,
        lambda x, activation=None, **kwargs: refuse_native_rows("quantize_int8", x, activation),
        held_back=KERNEL_NOT_RUN_YET,
    ),
    Implementation("triton", run_triton, lambda x, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", run_reference, lambda x, **kwargs: None),
)


def without_low(ways: Sequence[Implementation], at: int) -> tuple[Implementation, ...]:
    """Return implementations whose argument `at`, down, is None."""

    def bind(run: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: run(*args[:at], None, *args[at:])

    return tuple(replace(way, run=bind(way.run)) for way in ways)


def _fake(
    x: Tensor, smooth: Tensor | None, rotate: int, activation: str, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, None, activation)


def _fake_low(
    x: Tensor, smooth: Tensor | None, rotate: int, down: Tensor, activation: str, impl: str
) -> tuple[Tensor, ...]:
    return _outputs(x, down, activation)


_INPUTS = "Tensor x, Tensor? smooth, int rotate"
_op = register(
    "quantize_int8",
    f"({_INPUTS}, str activation, str impl) -> (Tensor, Tensor)",
    without_low(IMPLEMENTATIONS, 3),
    _fake,
)
_op_low = register(
    "quantize_int8_low",
    f"({_INPUTS}, Tensor down, str activation, str impl) -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake_low,
)


def quantize_int8(
    x: Tensor,
    *,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
    activation: str | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Quantise each row (last axis) of x to int8 with one scale.

    Args:
        x: [..., K], floating; [..., 2 K] with "geglu" or "swiglu".
        smooth: floating [K], positive: columns are divided by it first.
        rotate: 0, or 16, 32, 64, 128 or 256: every so many neighbours are rotated after that.
        down: [R, K] in x's dtype: low, x @ down.T of x (activated, not smoothed), is returned too.
        activation: None, "gelu", "gelu_tanh", "silu", "geglu" or "swiglu": comes before all else.
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
    if smooth is not None or rotate or down is not None or activation is not None:
        expect_prologue("x", x, smooth, rotate, down, activation)
    chosen = select("quantize_int8", impl, IMPLEMENTATIONS, x, activation=activation)
    if down is None:
        return _op(x, smooth, rotate, activation or "", chosen)
    return _op_low(x, smooth, rotate, down, activation or "", chosen)


def gate_cases(device: torch.device) -> list[tuple[Any, ...]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree.

    With an activation (args, kwargs, bound), in norm.
    """
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[Any, ...]] = []
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
    return cases + activation_cases(device, 2560)
