"""Gated residual and its directional derivative, in one pass.

    out = x + gate y                        t_out = t_x + gate t_y + t_gate y

x, y, t_x, t_y, out, t_out  [..., C]        t_v: tangent of v
gate, t_gate                [..., C], broadcast against x; not expanded in memory; None is one

This is what ends a branch of a diffusion transformer's block: y is the output of attention or of
the feed-forward layer, gate comes from the timestep. float32, bfloat16, float16; float64 too on the
CPU and in the reference; computed in float32 (float64) and rounded once. A tangent that is None is
zero and costs nothing. Layout and error: docs/ops/modulate_jvp.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.modulate_jvp import modulate_jvp as _reference
from ._autograd import Derivative
from ._layout import DTYPES, FLOATS
from ._register import register
from ._rows import (
    choose_split,
    expect_broadcast,
    expect_like,
    expect_primal,
    expect_rows,
    fold,
    fold_broadcast,
    wanted_names,
)
from ._select import Implementation, refuse_native, refuse_triton, select
from .modulate_jvp_backward import modulate_jvp_backward

__all__ = ["modulate_jvp"]


def _run_kernel(launch: Callable[..., None], *inputs: Any) -> tuple[Tensor, Tensor]:
    x, y, gate, t_x, t_y, t_gate = inputs
    out, t_out = x.new_empty(x.shape), x.new_empty(x.shape)
    if x.numel():
        split = choose_split(x, [y, t_x, t_y], gate, t_gate)
        gate, t_gate = (fold_broadcast(v, x, split) for v in (gate, t_gate))
        x, y, t_x, t_y, *outputs = (fold(v, split) for v in (x, y, t_x, t_y, out, t_out))
        launch(x, y, gate, t_x, t_y, t_gate, *outputs)
    return out, t_out


def _run_native(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _run_kernel(lambda *views: _native.call("modulate_jvp", *views), *inputs)


def _run_triton(*inputs: Any) -> tuple[Tensor, Tensor]:
    from ..kernels.modulate_jvp import launch_modulate_jvp

    return _run_kernel(launch_modulate_jvp, *inputs)


def _run_reference(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    out, t_out = (x.new_empty(x.shape).copy_(value) for value in _reference(x, *others))
    return out, t_out


IMPLEMENTATIONS = (
    Implementation(
        "native", _run_native, lambda *args, **kwargs: refuse_native("modulate_jvp", args, DTYPES)
    ),
    Implementation("triton", _run_triton, lambda *args, **kwargs: refuse_triton(args, FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, y, gate, _, t_y, t_gate, ctx.impl = inputs
    # A residual without gate passes cotangents through and needs no tensor.
    ctx.save_for_backward(*([] if gate is None else [y, gate, t_y, t_gate]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, dt_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None and dt_out is None:
        return (None,)  # reached through other branches of the graph
    saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    d_x, d_t_x = d_out if needs[0] else None, dt_out if needs[3] else None
    if not saved:
        return d_x, d_out if needs[1] else None, None, d_t_x, dt_out if needs[4] else None, None
    y, gate, t_y, t_gate = saved
    wanted = [v for v in wanted_names(_NAMES, ctx, dt_out) if v not in ("x", "t_x")]
    d_y, d_gate, d_t_y, d_t_gate = modulate_jvp_backward(
        d_out, dt_out, y, gate, t_y, t_gate, wanted=wanted, impl=ctx.impl
    )
    return d_x, d_y, d_gate, d_t_x, d_t_y, d_t_gate


_NAMES = ("x", "y", "gate", "t_x", "t_y", "t_gate")
_op = register(
    "modulate_jvp",
    "(Tensor x, Tensor y, Tensor? gate, Tensor? t_x, Tensor? t_y, Tensor? t_gate, str impl)"
    " -> (Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_setup, _backward),
)


def modulate_jvp(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    t_x: Tensor | None = None,
    t_y: Tensor | None = None,
    t_gate: Tensor | None = None,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return (out, t_out): x + gate * y and its derivative along the tangents.

    Args:
        x: [..., C], floating.
        y: x's shape, dtype and device.
        gate: broadcasts against x, as [C], [B, 1, C] or [B, N, C]; x's dtype; None is one.
        t_x: tangent of x, like x; None is zero and costs nothing.
        t_y: tangent of y, likewise.
        t_gate: tangent of gate, any shape that gate may have.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (out, t_out) in x's shape. out has the same bits whatever the tangents are. Both are
        differentiable in reverse mode, to any order in eager mode.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent: pass it as t_x, t_y or t_gate.
    """
    expect_rows("x", x)
    for name, v in {"y": y, "t_x": t_x, "t_y": t_y}.items():
        expect_like(name, v, "x", x)
    expect_broadcast("gate", gate, "x", x)
    expect_broadcast("t_gate", t_gate, "x", x)
    expect_primal("t_gate", t_gate, gate)
    chosen = select("modulate_jvp", impl, IMPLEMENTATIONS, x)
    out, t_out = _op(x, y, gate, t_x, t_y, t_gate, chosen)
    return out, t_out


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of sums of up to three products of order one; with fused multiply-adds or
    # without, which may push it to either side.
    bounds = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for b, n, c in ((2, 77, 72), (3, 33, 1152)):
            whole, shared = (b, n, c), (b, 1, c)
            args = tuple(
                torch.randn(shape, generator=generator).to(device, dtype)
                for shape in (whole, whole, shared, whole, whole, shared)
            )
            cases.append((args, {}, bound, bound))
            cases.append(((*args[:2], None, *args[3:5], None), {}, bound, bound))
    return cases
