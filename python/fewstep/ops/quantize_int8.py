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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_int8 import quantize_int8 as _reference
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["quantize_int8"]

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = (*_KERNEL_DTYPES, torch.float64)


def expect_rows(x: Tensor) -> None:
    """Refuse what is not floating [..., K]."""
    if x.dtype not in _DTYPES:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x: expected [..., K] with at least one axis, got a 0-d tensor")


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=dtype)


def _run_kernel(launch: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, scale = _outputs(x)
    rows, columns = scale.numel(), x.shape[-1]
    if rows:
        flat = (x, q, scale)
        if x.dim() != 2:
            flat = (x.reshape(rows, columns), q.view(rows, columns), scale.view(rows))
        launch(flat[0] if flat[0].stride(1) == 1 else flat[0].contiguous(), *flat[1:])
    return q, scale


def run_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the reference."""
    # Contiguous like every implementation's, whatever the strides of x: `_fake` promises it.
    q, scale = _reference(x)
    return q.contiguous(), scale.contiguous()


def run_native(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the native kernel."""
    return _run_kernel(lambda *views: _native.call("quantize_int8", *views), x)


def run_triton(x: Tensor) -> tuple[Tensor, Tensor]:
    """Run the Triton kernel."""
    from ..kernels.quantize_int8 import launch_quantize_int8

    return _run_kernel(launch_quantize_int8, x)


IMPLEMENTATIONS = (
    Implementation(
        "native", run_native, lambda x: refuse_native("quantize_int8", [x], _KERNEL_DTYPES)
    ),
    Implementation("triton", run_triton, lambda x: refuse_triton([x], _KERNEL_DTYPES)),
    Implementation("reference", run_reference, lambda x: None),
)


def _fake(x: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    return _outputs(x)


_op = register("quantize_int8", "(Tensor x, str impl) -> (Tensor, Tensor)", IMPLEMENTATIONS, _fake)


def quantize_int8(x: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Quantise each row (last axis) of x to int8 with one scale.

    Args:
        x: [..., K], floating.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, scale): int8 [..., K] and float32 [...], with x close to q * scale[..., None].

    Raises:
        ValueError: x has no axis, or its dtype is not floating.
        UnsupportedError: `impl` can't serve this tensor.
        DerivativeError: x carries a tangent or requires grad.
    """
    expect_rows(x)
    return _op(x, select("quantize_int8", impl, IMPLEMENTATIONS, x))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in _KERNEL_DTYPES:
        for shape in ((5, 77, 96), (3, 5001)):
            x = torch.randn(shape, generator=generator).to(device, dtype)
            cases.append(((x,), {}, 0.0, 0.0))
    return cases
