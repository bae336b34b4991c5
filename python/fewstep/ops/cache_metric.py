"""Relative L1 change of two hidden states in one pass, and the residual to store.

    r = x - y
    metric = sum |r - previous| / sum |previous|     with `previous`
    metric = sum |r| / sum |y|                       without;  0 / 0 = 0

x, y, previous  [B, ...], one shape and dtype (float32, bfloat16, float16; float64 on the CPU)
metric          scalar, or [B] with `per_sample`; float32 (float64 for float64), on x's device
r               as x

This is the decision of first-block caching (ParaAttention; diffusers' FirstBlockCache computes it
in three passes and a host sync): x is the output of the first block, y its input, `previous` the
residual of the last step that ran in full. Sums are taken in float32 within chunks of 16,384
elements and in float64 across them, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.cache_metric import cache_metric as _reference
from ._layout import DTYPES, FLOATS, samples
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["cache_metric"]

CHUNK = 16384


def _run_reference(
    x: Tensor, y: Tensor, previous: Tensor | None, return_residual: bool, per_sample: bool
) -> tuple[Tensor, Tensor]:
    metric, residual = _reference(x, y, previous=previous, per_sample=per_sample)
    # Contiguous like every implementation's, whatever the strides of x: `_fake` promises it.
    kept = residual.to(x.dtype).contiguous() if return_residual else x.new_empty(0)
    return metric, kept


def _run_kernel(
    launch: Any,
    x: Tensor,
    y: Tensor,
    previous: Tensor | None,
    return_residual: bool,
    per_sample: bool,
) -> tuple[Tensor, Tensor]:
    x3, y3 = samples(x), samples(y)
    batch, elements = x3.shape[0], x3.shape[1] * x3.shape[2]
    residual = x.new_empty(x.shape) if return_residual else None
    partials = x.new_empty((batch, -(-elements // CHUNK), 2), dtype=torch.float64)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    metric = x.new_empty(batch if per_sample else 1, dtype=dtype)
    launch(
        x3,
        y3,
        None if previous is None else samples(previous),
        None if residual is None else residual.view(x3.shape),
        partials,
        metric,
    )
    empty = x.new_empty(0)
    return metric if per_sample else metric[0], empty if residual is None else residual


def _run_native(*args: Any) -> tuple[Tensor, Tensor]:
    return _run_kernel(lambda *views: _native.call("cache_metric", *views), *args)


def _run_triton(*args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.cache_metric import launch_cache_metric

    return _run_kernel(launch_cache_metric, *args)


def _native_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    return DTYPES if x.device.type == "cpu" else FLOATS


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *args, **kwargs: refuse_native("cache_metric", [x], _native_dtypes(x)),
    ),
    Implementation("triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([x], FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    x: Tensor,
    y: Tensor,
    previous: Tensor | None,
    return_residual: bool,
    per_sample: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    metric = x.new_empty((x.shape[0],) if per_sample else (), dtype=dtype)
    return metric, x.new_empty(x.shape if return_residual else (0,))


_op = register(
    "cache_metric",
    "(Tensor x, Tensor y, Tensor? previous, bool return_residual, bool per_sample, str impl)"
    " -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
)


def _validate(x: Tensor, y: Tensor, previous: Tensor | None, per_sample: bool) -> None:
    if x.dtype not in DTYPES:
        raise ValueError(f"x: expected a floating dtype, got {x.dtype}")
    if per_sample and x.dim() == 0:
        raise ValueError("x: expected a batch axis with per_sample=True, got a 0-d tensor")
    for name, other in (("y", y), ("previous", previous)):
        if other is None:
            continue
        if other.shape != x.shape:
            raise ValueError(f"{name}: expected the shape of x, {x.shape}, got {other.shape}")
        if other.dtype != x.dtype:
            raise ValueError(f"{name}: expected the dtype of x, {x.dtype}, got {other.dtype}")
        if other.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {other.device}")


def cache_metric(
    x: Tensor,
    y: Tensor,
    *,
    previous: Tensor | None = None,
    return_residual: bool = False,
    per_sample: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the relative L1 change, and the residual x - y with `return_residual`.

    Args:
        x: new hidden state [B, ...].
        y: the state to compare with or to subtract, same shape, dtype and device.
        previous: an earlier residual; the change of the residual is measured then.
        return_residual: also return x - y in x's dtype.
        per_sample: one metric per entry of the first axis instead of one scalar.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        metric, or (metric, residual). The metric stays on x's device: no host sync.

    Raises:
        ValueError: shapes, dtypes or devices differ, or a dtype is not floating.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    _validate(x, y, previous, per_sample)
    chosen = select("cache_metric", impl, IMPLEMENTATIONS, x, y)
    metric, residual = _op(x, y, previous, return_residual, per_sample, chosen)
    return (metric, residual) if return_residual else metric


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    for dtype in FLOATS:
        for shape in ((1, 77, 96), (3, 513, 65)):
            x, y, p = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
            # Sums of 16k float32 terms: 1e-5 relative; the residual is rounded the same way.
            options = {"previous": p, "return_residual": True, "per_sample": True}
            cases.append(((x, y), options, 1e-5, 1e-6))
    return cases
