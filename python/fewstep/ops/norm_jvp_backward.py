"""Gradients of `norm_jvp` through both of its results.

With d_y, dt_y the cotangents of y, t_y, the other names as in `norm_jvp`, <v> the mean over C:

    d_shift = d_y           d_scale = d_y z + dt_y t_z        d_z  = (1 + scale) d_y + t_scale dt_y
    d_t_shift = dt_y        d_t_scale = dt_y z                d_tz = (1 + scale) dt_y
    d_bias = sum d_z        d_weight = sum d_z n + d_tz t_n
    g = d_z weight          h = d_tz weight
    J v = rstd (v - <v> - n <n v>)                            without <v> for kind "rms"
    d_t_x = J h
    d_x = J g - rstd (n <h t_n> + a d_t_x + <n h> t_n)

d_y, dt_y, x, t_x   [..., C]; a cotangent that is None is zero
stats               [..., 4], the third result of `norm_jvp`

Gradients have the shape and dtype of what they belong to: those of broadcast operands are summed
in float32 (float64 for float64) over what they were broadcast along, in a fixed order. shift and
t_shift are asked for their shapes alone. One pass over memory; derivation and layout:
docs/ops/norm_jvp_backward.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.norm_jvp import norm_jvp as _forward
from ..reference.norm_jvp_backward import norm_jvp_backward as _reference
from ._autograd import Derivative, composite
from ._expect import expect_tensor
from ._layout import DTYPES
from ._norm import NAMES, parameter, refuse_triton_rows, validate
from ._register import register
from ._rows import (
    acc_dtype,
    choose_split,
    expect_like,
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
from ._select import Implementation, refuse_native, select

__all__ = ["norm_jvp_backward"]

# What the kernels sum over tokens, in the order of their bits.
SUMMED = ("weight", "bias", "scale", "shift", "t_scale", "t_shift")
NATIVE_ROWS_PER_SUM = 64  # kNormJvpBackwardRows


def _primals(x: Tensor, t_x: Tensor | None, *operands: Tensor | None) -> dict[str, Tensor | None]:
    return dict(zip(NAMES, (x, t_x, *operands), strict=True))


def _run_kernel(
    launch: Callable[..., None],
    rows_per_sum: int,
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *operands, asked, centred = rest
    primals = _primals(x, t_x, *operands)
    wanted = names_in(asked, NAMES)
    if x.numel() == 0:
        return pack({name: torch.zeros_like(primals[name]) for name in wanted}, NAMES, x)
    cotangents = {"shift": d_y, "t_shift": dt_y}
    modulation = [primals[name] for name in SUMMED[2:] if name in wanted or "shift" not in name]
    split = choose_split(x, [d_y, dt_y, t_x], *modulation)
    batch, tokens, columns = fold(x, split).shape
    summed = [
        name
        for name in SUMMED
        if name in wanted and (name in ("weight", "bias") or is_shared(primals[name], x, split))
    ]
    by_row = {
        name: x.new_empty(x.shape)
        for name in ("x", "t_x", "scale", "t_scale")
        if name in wanted and name not in summed
    }
    sums = None
    if summed:
        parts = -(-tokens // rows_per_sum)
        sums = x.new_empty((batch, parts, len(summed), columns), dtype=acc_dtype(x))
    if summed or by_row:
        weight, bias = (parameter(primals[name], x) for name in ("weight", "bias"))
        scale, t_scale = (fold_broadcast(primals[name], x, split) for name in ("scale", "t_scale"))
        launch(
            *(fold(v, split) for v in (d_y, dt_y, x, t_x, stats)),
            weight,
            bias,
            scale,
            t_scale,
            *(fold(by_row.get(name), split) for name in ("x", "t_x", "scale", "t_scale")),
            sums,
            sum(1 << SUMMED.index(name) for name in summed),
            centred,
        )

    def gradient(name: str) -> Tensor:
        primal = primals[name]
        if name in summed:
            part = sums[:, :, summed.index(name)]
            whole = name in ("weight", "bias")
            return (
                part.sum((0, 1)).to(primal.dtype) if whole else unfold_sums(part, primal, x, split)
            )
        if name in ("x", "t_x"):
            return by_row[name]
        if name in by_row:
            return unfold_rows(by_row[name], primal, x)
        cotangent = cotangents[name]
        if cotangent is None:
            return torch.zeros_like(primal)
        return unfold_rows(cotangent.clone(memory_format=torch.contiguous_format), primal, x)

    return pack({name: gradient(name).contiguous() for name in wanted}, NAMES, x)


def _run_native(*args: Any) -> tuple[Tensor, ...]:
    def launch(*views: Any) -> None:
        _native.call("norm_jvp_backward", *views)

    return _run_kernel(launch, NATIVE_ROWS_PER_SUM, *args)


def _run_triton(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels.norm_jvp_backward import ROWS_PER_SUM, launch_norm_jvp_backward

    return _run_kernel(launch_norm_jvp_backward, ROWS_PER_SUM, *args)


def _formula(
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Return what the op returns, in differentiable torch operators."""
    *operands, asked, centred = rest
    primals = _primals(x, t_x, *operands)
    wanted = names_in(asked, NAMES)
    kind = "layer" if centred else "rms"
    others = dict(zip(NAMES[2:], operands, strict=True))
    found = _reference(d_y, dt_y, x, t_x, stats, **others, wanted=wanted, kind=kind)
    return pack({name: v.to(primals[name].dtype) for name, v in found.items()}, NAMES, x)


def _run_reference(*args: Any) -> tuple[Tensor, ...]:
    # Clones: the gradient of shift may be the very cotangent.
    return tuple(v.clone(memory_format=torch.contiguous_format) for v in _formula(*args))


IMPLEMENTATIONS = (
    Implementation(
        "native",
        _run_native,
        lambda *args, **kwargs: refuse_native("norm_jvp_backward", args, DTYPES),
    ),
    Implementation("triton", _run_triton, refuse_triton_rows),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *operands, asked, _, _ = rest
    primals = _primals(x, t_x, *operands)
    found = {name: primals[name].new_empty(primals[name].shape) for name in names_in(asked, NAMES)}
    return pack(found, NAMES, x)


_rules = composite(lambda *args: _formula(*args[:-1]))
_op = register(
    "norm_jvp_backward",
    "(Tensor? d_y, Tensor? dt_y, Tensor x, Tensor? t_x, Tensor stats, Tensor? weight, Tensor? bias,"
    " Tensor? scale, Tensor? shift, Tensor? t_scale, Tensor? t_shift, int wanted, bool centred,"
    " str impl) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_rules.setup_context, _rules.backward),
)


def norm_jvp_backward(
    d_y: Tensor | None,
    dt_y: Tensor | None,
    x: Tensor,
    t_x: Tensor | None,
    stats: Tensor,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    wanted: Sequence[str] | None = None,
    kind: str = "layer",
    impl: str = "auto",
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, t_x, weight, bias, scale, shift, t_scale and t_shift.

    Args:
        d_y: cotangent of y, [..., C] in x's dtype; None is zero.
        dt_y: cotangent of t_y, likewise.
        x: the inputs of `norm_jvp`, here and below.
        t_x: likewise.
        stats: its third result, with `return_stats=True`.
        weight: likewise.
        bias: likewise.
        scale: likewise.
        shift: likewise; only its shape and dtype are read.
        t_scale: likewise.
        t_shift: likewise; only its shape and dtype are read.
        wanted: names of the inputs whose gradients are asked for; None is all that are given.
        kind: as given to `norm_jvp`.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Eight gradients in this order, None where one is not wanted.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent.
    """
    operands = (weight, bias, scale, shift, t_scale, t_shift)
    primals = _primals(x, t_x, *operands)
    validate(x, primals, kind)
    for name, v in {"d_y": d_y, "dt_y": dt_y}.items():
        expect_like(name, v, "x", x)
    expect_tensor("stats", stats)
    if tuple(stats.shape) != (*x.shape[:-1], 4) or stats.dtype != acc_dtype(x):
        raise ValueError(
            f"stats: expected {acc_dtype(x)} {[*x.shape[:-1], 4]} as norm_jvp returns, got "
            f"{stats.dtype} {list(stats.shape)}"
        )
    if stats.device != x.device:
        raise ValueError(f"stats: expected the device of x, {x.device}, got {stats.device}")
    asked = expect_wanted(wanted, primals)
    chosen = select("norm_jvp_backward", impl, IMPLEMENTATIONS, x)
    outputs = _op(d_y, dt_y, x, t_x, stats, *operands, asked, kind == "layer", chosen)
    return unpack(outputs, asked)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # Rows: one rounding of values of order one to a hundred. Sums over up to 99 rows: float32 sums
    # in another order, below that.
    bounds = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for b, n, c, kind in ((2, 77, 72, "rms"), (3, 33, 1152, "layer")):

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            names = ("scale", "shift", "t_scale", "t_shift")
            options: dict[str, Any] = {name: draw(b, 1, c) for name in names}
            options |= {"weight": draw(c), "bias": draw(c), "kind": kind}
            x, t_x = draw(b, n, c), draw(b, n, c)
            *_, stats = _forward(x, t_x, kind=kind)
            args = (draw(b, n, c), draw(b, n, c), x, t_x, stats)
            cases.append((args, options, bound, 10 * bound))
    return cases
