"""Gradients of `modulate_jvp` through both of its results.

    d_x = d_out             d_y = gate d_out + t_gate dt_out      d_gate = d_out y + dt_out t_y
    d_t_x = dt_out          d_t_y = gate dt_out                   d_t_gate = dt_out y

d_out, dt_out, y, t_y       [..., C]; a cotangent or tangent that is None is zero
gate, t_gate                [..., C], broadcast against y; gate None is one

The gradients of x and t_x are the cotangents themselves and need no op. Those of gate and t_gate
have their shapes: they are summed in float32 (float64 for float64) over what was broadcast, in a
fixed order. One pass over memory; layout and error: docs/ops/modulate_jvp_backward.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.modulate_jvp_backward import modulate_jvp_backward as _reference
from ._register import register
from ._rows import (
    DTYPES,
    KERNEL_DTYPES,
    acc_dtype,
    expect_broadcast,
    expect_like,
    expect_primal,
    expect_rows,
    fold,
    fold_broadcast,
    is_shared,
    unfold_rows,
    unfold_sums,
)
from ._select import Implementation, refuse_native, refuse_triton, select

__all__ = ["modulate_jvp_backward"]

NAMES = ("y", "gate", "t_y", "t_gate")
NATIVE_ROWS_PER_SUM = 64  # kModulateJvpBackwardRows


def _run_kernel(
    launch: Callable[..., None],
    rows_per_sum: int,
    d_out: Tensor | None,
    dt_out: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    *inputs, asked = rest
    primals = dict(zip(NAMES, inputs, strict=True))
    y, gate, t_y, t_gate = inputs
    wanted = [name for name, ask in zip(NAMES, asked, strict=True) if ask]
    if y.numel() == 0 or not wanted:
        return [torch.zeros_like(primals[name]) for name in wanted]
    batch, tokens, columns = fold(y).shape
    parts = -(-tokens // rows_per_sum)
    rows: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for name in wanted:
        if name in ("gate", "t_gate") and is_shared(primals[name], y):
            sums[name] = y.new_empty((batch, parts, columns), dtype=acc_dtype(y))
        else:
            rows[name] = y.new_empty(y.shape)
    launch(
        fold(d_out),
        fold(dt_out),
        fold(y),
        fold_broadcast(gate, y),
        fold(t_y),
        fold_broadcast(t_gate, y),
        *(fold(rows.get(name)) for name in ("y", "t_y", "gate", "t_gate")),
        *(sums.get(name) for name in ("gate", "t_gate")),
    )

    def gradient(name: str) -> Tensor:
        if name in sums:
            return unfold_sums(sums[name], primals[name], y)
        return unfold_rows(fold(rows[name]), primals[name], y)

    return [gradient(name).contiguous() for name in wanted]


def _run_native(*args: Any) -> list[Tensor]:
    def launch(*views: Any) -> None:
        _native.call("modulate_jvp_backward", *views)

    return _run_kernel(launch, NATIVE_ROWS_PER_SUM, *args)


def _run_triton(*args: Any) -> list[Tensor]:
    from ..kernels.modulate_jvp_backward import ROWS_PER_SUM, launch_modulate_jvp_backward

    return _run_kernel(launch_modulate_jvp_backward, ROWS_PER_SUM, *args)


def _run_reference(d_out: Tensor | None, dt_out: Tensor | None, *rest: Any) -> list[Tensor]:
    *inputs, asked = rest
    primals = dict(zip(NAMES, inputs, strict=True))
    wanted = [name for name, ask in zip(NAMES, asked, strict=True) if ask]
    gradients = _reference(d_out, dt_out, *inputs, wanted=wanted)
    return [primals[name].new_empty(primals[name].shape).copy_(gradients[name]) for name in wanted]


def _refuse_native(y: Tensor, *args: Any, **kwargs: Any) -> str | None:
    return refuse_native("modulate_jvp_backward", [y], DTYPES)


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native),
    Implementation(
        "triton", _run_triton, lambda y, *args, **kwargs: refuse_triton([y], KERNEL_DTYPES)
    ),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(d_out: Tensor | None, dt_out: Tensor | None, *rest: Any) -> list[Tensor]:
    *inputs, asked, _ = rest
    return [v.new_empty(v.shape) for v, ask in zip(inputs, asked, strict=True) if ask]


op = register(
    "modulate_jvp_backward",
    "(Tensor? d_out, Tensor? dt_out, Tensor y, Tensor? gate, Tensor? t_y, Tensor? t_gate,"
    " bool[] wanted, str impl) -> Tensor[]",
    IMPLEMENTATIONS,
    _fake,
)


def modulate_jvp_backward(
    d_out: Tensor | None,
    dt_out: Tensor | None,
    y: Tensor,
    gate: Tensor | None = None,
    t_y: Tensor | None = None,
    t_gate: Tensor | None = None,
    *,
    wanted: Sequence[str] | None = None,
    impl: str = "auto",
) -> dict[str, Tensor]:
    """Return the gradients of `modulate_jvp` as {name: gradient}, those of x and t_x aside.

    Args:
        d_out: cotangent of out, like y; None is zero.
        dt_out: cotangent of t_out, likewise.
        y: the inputs of `modulate_jvp`, here and below.
        gate: likewise.
        t_y: likewise.
        t_gate: likewise.
        wanted: names among y, gate, t_y and t_gate; None is all that are given.
        impl: "auto", "reference", "native" or "triton".

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent or requires grad.
    """
    expect_rows("y", y)
    for name, v in {"d_out": d_out, "dt_out": dt_out, "t_y": t_y}.items():
        expect_like(name, v, "y", y)
    expect_broadcast("gate", gate, "y", y)
    expect_broadcast("t_gate", t_gate, "y", y)
    expect_primal("t_gate", t_gate, gate)
    primals = dict(zip(NAMES, (y, gate, t_y, t_gate), strict=True))
    if wanted is None:
        wanted = [name for name, v in primals.items() if v is not None]
    for name in wanted:
        if primals.get(name) is None:
            raise ValueError(
                f"wanted: expected names of given tensors among {', '.join(NAMES)}, got {name!r}"
            )
    chosen = select("modulate_jvp_backward", impl, IMPLEMENTATIONS, y)
    asked = [name in wanted for name in NAMES]
    gradients = op(d_out, dt_out, y, gate, t_y, t_gate, asked, chosen)
    return dict(zip([name for name in NAMES if name in wanted], gradients, strict=True))


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of two products of order one, or of sums over up to 77 rows of them.
    bounds = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for b, n, c in ((2, 77, 72), (3, 33, 1152)):
            whole, shared = (b, n, c), (b, 1, c)
            args = tuple(
                torch.randn(shape, generator=generator).to(device, dtype)
                for shape in (whole, whole, whole, shared, whole, shared)
            )
            cases.append((args, {}, bound, bound))
            cases.append(((*args[:3], None, args[4], None), {}, bound, bound))
    return cases
