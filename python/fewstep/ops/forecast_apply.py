"""A forecast from snapshots: their weighted sum, and what it is added to, in one pass.

    y = base + sum_k w_k * value_k        in the order of k, base last

snapshots  [K, B, ..., C]   floats, or codes with `scale` and `group` (`_slots.py`); K <= 8
weights    [K], [B, K], or with `step` [T, K]; float32 (float64 with float64 snapshots)
step       int64, one element: the row of `weights` that counts; NaN outside the table
base       [B, ..., C], any floating dtype, or None
y          [B, ..., C] in out_dtype

Every linear forecaster of feature caching is a choice of weights over stored snapshots: reuse,
Taylor, Newton, Hermite, Adams, the roots of DMD, fitted ones (docs/ops/forecast_apply.md). Sums are
taken in float32, and all implementations take them in this order. A snapshot whose weight is
exactly 0 is not read: a slot that nothing was stored in yet may hold anything.

The weights and the step stay on the device, so one captured CUDA graph serves all steps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.forecast_apply import forecast_apply as _reference
from ._expect import expect_tensor, expect_tensors
from ._layout import DTYPES, FLOATS, samples
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton, select
from ._slots import CODES, expect_ring, ring_dtypes, ring_views

__all__ = ["forecast_apply"]


def _output(snapshots: Tensor, out_dtype: torch.dtype) -> Tensor:
    shape = snapshots.shape[1:]
    if snapshots.dtype == torch.uint8:
        shape = (*shape[:-1], 2 * shape[-1])
    return snapshots.new_empty(shape, dtype=out_dtype)


def _run_reference(
    snapshots: Tensor,
    weights: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    step: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    y = _reference(snapshots, weights, base=base, scale=scale, group=group, step=step)
    return y.to(out_dtype).contiguous()


def _run_kernel(
    launch: Any,
    snapshots: Tensor,
    weights: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    step: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    y = _output(snapshots, out_dtype)
    if y.numel():
        ring, scale = ring_views(snapshots, scale)
        out = y if y.dim() == 3 else y.view(y.shape[0], math.prod(y.shape[1:-1]), y.shape[-1])
        rows = base if base is None else samples(base)
        at = step if step is None or step.dim() == 1 else step.view(1)
        launch(ring, weights.contiguous(), rows, scale, at, group, out)
    return y


def _call_native(*args: Any) -> None:
    _native.call("forecast_apply", *args)


def _run_native(*args: Any) -> Tensor:
    return _run_kernel(_call_native, *args)


def _run_triton(*args: Any) -> Tensor:
    from ..kernels.forecast_apply import launch_forecast_apply

    return _run_kernel(launch_forecast_apply, *args)


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda x, *args, **kwargs: refuse_native("forecast_apply", [x], ring_dtypes(x)),
    ),
    Implementation(
        "triton", _run_triton, lambda x, *args, **kwargs: refuse_triton([x], (*FLOATS, *CODES))
    ),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    snapshots: Tensor,
    weights: Tensor,
    base: Tensor | None,
    scale: Tensor | None,
    group: int,
    step: Tensor | None,
    out_dtype: torch.dtype,
    impl: str,
) -> Tensor:
    return _output(snapshots, out_dtype)


_op = register(
    "forecast_apply",
    "(Tensor snapshots, Tensor weights, Tensor? base, Tensor? scale, int group, Tensor? step,"
    " ScalarType out_dtype, str impl) -> Tensor",
    IMPLEMENTATIONS,
    _fake,
)


def _expect_weights(weights: Tensor, step: Tensor | None, x: Tensor, batch: int) -> None:
    expect_tensor("weights", weights)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if weights.dtype != dtype or weights.device != x.device:
        raise ValueError(
            f"weights: expected {dtype} on {x.device}, got {weights.dtype} on {weights.device}"
        )
    shape, slots = weights.shape, x.shape[0]
    if step is not None:
        if len(shape) != 2 or shape[0] == 0 or shape[1] != slots:
            raise ValueError(f"weights: expected a table [T, {slots}] with step, got {list(shape)}")
        _expect_step(step, x)
    elif shape != (slots,) and shape != (batch, slots):
        raise ValueError(f"weights: expected [{slots}] or {[batch, slots]}, got {list(shape)}")


def _expect_step(step: Tensor, x: Tensor) -> None:
    expect_tensor("step", step)
    if step.dtype != torch.int64 or step.device != x.device or step.numel() != 1:
        raise ValueError(
            f"step: expected one element of int64 on {x.device}, got {list(step.shape)} of "
            f"{step.dtype} on {step.device}"
        )


def _expect_base(base: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    expect_tensors(base=base)
    if base.shape != shape:
        raise ValueError(
            f"base: expected the shape of a snapshot, {list(shape)}, got {list(base.shape)}"
        )
    if base.device != x.device:
        raise ValueError(f"base: expected the device of snapshots, {x.device}, got {base.device}")
    _expect_float("base", base.dtype, x)


def _expect_float(name: str, dtype: torch.dtype, x: Tensor) -> None:
    if dtype not in (FLOATS if x.dtype != torch.float64 else (torch.float64,)):
        expected = "float64" if x.dtype == torch.float64 else "float32, bfloat16 or float16"
        raise ValueError(f"{name}: expected {expected} with snapshots in {x.dtype}, got {dtype}")


def forecast_apply(
    snapshots: Tensor,
    weights: Tensor,
    *,
    base: Tensor | None = None,
    scale: Tensor | None = None,
    group: int = 128,
    step: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return base plus the weighted sum of the snapshots.

    Args:
        snapshots: [K, B, ..., C], contiguous, K from 1 to 8: floating, or float8_e4m3fn, int8 or
            int4 (uint8, two a byte) codes.
        weights: [K], a row a sample [B, K], or with `step` a table [T, K].
        base: [B, ..., C], floating; any strides.
        scale: of codes, float32 [K, B, ..., ceil(C / group)], contiguous.
        group: how many neighbours along C share a factor; even for int4.
        step: int64 tensor of one element on the device: which row of the table counts. It is read
            there, without a host sync; outside of the table y is NaN.
        out_dtype: of y; by default that of base, then of floating snapshots, then float32.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        y [B, ..., C].

    Raises:
        TypeError: an argument is no tensor.
        ValueError: a shape, dtype, device or the layout of an argument does not fit.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    shape = expect_ring(snapshots, scale, group)
    _expect_weights(weights, step, snapshots, shape[0])
    if base is not None:
        _expect_base(base, snapshots, shape)
    if out_dtype is not None:
        _expect_float("out_dtype", out_dtype, snapshots)
    elif base is not None:
        out_dtype = base.dtype
    else:
        out_dtype = snapshots.dtype if snapshots.dtype in DTYPES else torch.float32
    chosen = select("forecast_apply", impl, IMPLEMENTATIONS, snapshots)
    return _op(snapshots, weights, base, scale, group, step, out_dtype, chosen)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    table = torch.randn((5, 5), generator=generator)
    table[:, 2] = 0
    step = torch.tensor([3], device=device)
    for dtype in (*FLOATS, *CODES):
        for shape, group in (((2, 7, 264), 8), ((3, 5, 3, 66), 32)):
            ring = torch.randn((5, *shape), generator=generator)
            scale = None
            if dtype in CODES:
                ring = (ring.clamp(-4, 4) * 31).round()
                scale = torch.rand((5, *shape[:-1], -(-shape[-1] // group)), generator=generator)
            if dtype == torch.uint8:
                ring = ring[..., ::2] + 128
            weights = table if shape[-1] == 264 else table[: shape[0]]
            options: dict[str, Any] = {
                "base": torch.randn(shape, generator=generator).to(device, torch.bfloat16),
                "scale": None if scale is None else scale.to(device),
                "group": group,
                "step": step if weights is table else None,
                "out_dtype": torch.float32,
            }
            # Of six terms with codes of up to 124 some cancel; sums are of the order of 100.
            args = ring.to(dtype).to(device), weights.to(device)
            cases.append((args, options, 1e-5, 1e-5 if scale is None else 1e-3))
    return cases
