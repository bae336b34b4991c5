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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.quantize_fp8 import quantize_fp8 as _reference
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from .quantize_int8 import expect_rows

__all__ = ["quantize_fp8"]

BLOCK = 128
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _outputs(x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    (*rows, K) = x.shape
    shape = rows if block is None else [*rows, -(-K // block)]
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(shape, dtype=dtype)


def _run_kernel(launch: Any, x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    q, scale = _outputs(x, block)
    if scale.numel():
        K = x.shape[-1]
        blocks = 1 if block is None else scale.shape[-1]
        rows = scale.numel() // blocks
        flat = x.reshape(rows, K)
        # As bytes: neither the native library nor older GPUs know the dtype.
        launch(
            flat if flat.stride(1) == 1 else flat.contiguous(),
            q.view(torch.uint8).view(rows, K),
            scale.view(rows, blocks),
            block or max(K, 1),
        )
    return q, scale


def _run_reference(x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    q, scale = _reference(x, block=block)
    return q.contiguous(), scale.contiguous()


def _run_native(x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    return _run_kernel(lambda *args: _native.call("quantize_fp8", *args), x, block)


def _run_triton(x: Tensor, block: int | None) -> tuple[Tensor, Tensor]:
    from ..kernels.quantize_fp8 import launch_quantize_fp8

    return _run_kernel(launch_quantize_fp8, x, block)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, **kwargs: refuse_native("quantize_fp8", [x], _KERNEL_DTYPES),
    ),
    Implementation("triton", _run_triton, lambda x, **kwargs: refuse_triton([x], _KERNEL_DTYPES)),
    Implementation("reference", _run_reference, lambda x, **kwargs: None),
)


def _fake(x: Tensor, block: int | None, impl: str) -> tuple[Tensor, Tensor]:
    return _outputs(x, block)


_op = register(
    "quantize_fp8", "(Tensor x, int? block, str impl) -> (Tensor, Tensor)", IMPLEMENTATIONS, _fake
)


def quantize_fp8(
    x: Tensor, *, block: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Quantise each row (last axis) of x to e4m3 with one scale, or one for each 128 neighbours.

    Args:
        x: [..., K], floating.
        block: None for one scale a row, or 128.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (q, scale): float8_e4m3fn [..., K] and float32 [...] or [..., ceil(K / 128)]; x is close to
        q times its scale.

    Raises:
        ValueError: x has no axis, its dtype is not floating, or the block is unknown.
        UnsupportedError: `impl` can't serve this tensor.
        DerivativeError: x carries a tangent or requires grad.
    """
    expect_rows(x)
    if block not in (None, BLOCK):
        raise ValueError(f"block: expected None or {BLOCK}, got {block!r}")
    return _op(x, block, select("quantize_fp8", impl, IMPLEMENTATIONS, x))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; bits must agree."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in _KERNEL_DTYPES:
        for block in (None, BLOCK):
            x = torch.randn((5, 7, 300), generator=generator).to(device, dtype)
            cases.append(((x,), {"block": block}, 0.0, 0.0))
    return cases
