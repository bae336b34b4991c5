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
from ._autograd import Derivative, composite
from ._layout import DTYPES, FLOATS
from ._register import register
from ._rows import (
    acc_dtype,
    choose_split,
    expect_broadcast,
    expect_like,
    expect_primal,
    expect_rows,
    expect_wanted,
    fold,
    fold_broadcast,
    is_shared,
    names_in,
    pack,
    unfold_rows,
    unfold_sums,
    unpack,
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
) -> tuple[Tensor, ...]:
    *inputs, asked = rest
    primals = dict(zip(NAMES, inputs, strict=True))
    y, gate, t_y, t_gate = inputs
    wanted = names_in(asked, NAMES)
    if y.numel() == 0 or not wanted:
        return pack({name: torch.zeros_like(primals[name]) for name in wanted}, NAMES, y)
    split = choose_split(y, [d_out, dt_out, t_y], gate, t_gate)
    batch, tokens, columns = fold(y, split).shape
    parts = -(-tokens // rows_per_sum)
    rows: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    for name in wanted:
        if name in ("gate", "t_gate") and is_shared(primals[name], y, split):
            sums[name] = y.new_empty((batch, parts, columns), dtype=acc_dtype(y))
        else:
            rows[name] = y.new_empty(y.shape)
    launch(
        fold(d_out, split),
        fold(dt_out, split),
        fold(y, split),
        fold_broadcast(gate, y, split),
        fold(t_y, split),
        fold_broadcast(t_gate, y, split),
        *(fold(rows.get(name), split) for name in ("y", "t_y", "gate", "t_gate")),
        *(sums.get(name) for name in ("gate", "t_gate")),
    )

    def gradient(name: str) -> Tensor:
        if name in sums:
            return unfold_sums(sums[name], primals[name], y, split)
        return unfold_rows(rows[name], primals[name], y)

    return pack({name: gradient(name).contiguous() for name in wanted}, NAMES, y)


def _run_native(*args: Any) -> tuple[Tensor, ...]:
    def launch(*views: Any) -> None:
        _native.call("modulate_jvp_backward", *views)

    return _run_kernel(launch, NATIVE_ROWS_PER_SUM, *args)


def _run_triton(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels.modulate_jvp_backward import ROWS_PER_SUM, launch_modulate_jvp_backward

    return _run_kernel(launch_modulate_jvp_backward, ROWS_PER_SUM, *args)


def _formula(d_out: Tensor | None, dt_out: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """Return what the op returns, in differentiable torch operators."""
    *inputs, asked = rest
    primals = dict(zip(NAMES, inputs, strict=True))
    found = _reference(d_out, dt_out, *inputs, wanted=names_in(asked, NAMES))
    packed = {name: v.to(primals[name].dtype) for name, v in found.items()}
    return pack(packed, NAMES, primals["y"])


def _run_reference(*args: Any) -> tuple[Tensor, ...]:
    # Clones: with no gate the gradient of t_y is the very cotangent.
    return tuple(v.clone(memory_format=torch.contiguous_format) for v in _formula(*args))


def _refuse_native(*args: Any, **kwargs: Any) -> str | None:
    return refuse_native("modulate_jvp_backward", args, DTYPES)


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native),
    Implementation("triton", _run_triton, lambda *args, **kwargs: refuse_triton(args, FLOATS)),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(d_out: Tensor | None, dt_out: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, asked, _ = rest
    primals = dict(zip(NAMES, inputs, strict=True))
    found = {name: primals[name].new_empty(primals[name].shape) for name in names_in(asked, NAMES)}
    return pack(found, NAMES, primals["y"])


_rules = composite(lambda *args: _formula(*args[:-1]))
_op = register(
    "modulate_jvp_backward",
    "(Tensor? d_out, Tensor? dt_out, Tensor y, Tensor? gate, Tensor? t_y, Tensor? t_gate,"
    " int wanted, str impl) -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_rules.setup_context, _rules.backward),
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
) -> tuple[Tensor | None, ...]:
    """Return the gradients of y, gate, t_y and t_gate; those of x and t_x are the cotangents.

    Args:
        d_out: cotangent of out, like y; None is zero.
        dt_out: cotangent of t_out, likewise.
        y: the inputs of `modulate_jvp`, here and below.
        gate: likewise.
        t_y: likewise.
        t_gate: likewise.
        wanted: names among y, gate, t_y and t_gate; None is all that are given.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Four gradients in this order, None where one is not wanted.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent.
    """
    expect_rows("y", y)
    for name, v in {"d_out": d_out, "dt_out": dt_out, "t_y": t_y}.items():
        expect_like(name, v, "y", y)
    expect_broadcast("gate", gate, "y", y)
    expect_broadcast("t_gate", t_gate, "y", y)
    expect_primal("t_gate", t_gate, gate)
    primals = dict(zip(NAMES, (y, gate, t_y, t_gate), strict=True))
    asked = expect_wanted(wanted, primals)
    chosen = select("modulate_jvp_backward", impl, IMPLEMENTATIONS, y)
    return unpack(_op(d_out, dt_out, y, gate, t_y, t_gate, asked, chosen), asked)


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
