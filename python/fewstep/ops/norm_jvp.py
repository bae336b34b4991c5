"""LayerNorm or RMSNorm with its modulation, and the directional derivative of both, in one pass.

    u = x - mean(x)                         t_u = t_x - mean(t_x)            kind "layer"
    u = x                                   t_u = t_x                        kind "rms"
    rstd = (mean(u^2) + eps)^-1/2           a = mean(n t_u)
    n = rstd u                              t_n = rstd (t_u - n a)
    z = n weight + bias                     t_z = t_n weight
    y = z (1 + scale) + shift               t_y = (1 + scale) t_z + t_scale z + t_shift

x, t_x, y, t_y          [..., C], means over C     t_v: tangent of v
weight, bias            [C], constant along the direction
scale, shift, t_...     [..., C], broadcast against x; not expanded in memory
stats                   [..., 4]: mean(x), rstd, mean(t_x), a (means 0 for "rms"), float32 (float64
                        for float64); what the backward needs

This is the adaLN of diffusion transformers (its 1 + scale included), LayerNorm and RMSNorm alone
where there is no modulation, and the norms of queries and keys. float32, bfloat16, float16; float64
too on the CPU and in the reference; sums and all steps in float32 (float64), y and t_y rounded
once. What is None is zero (weight: one) and costs nothing.

Derivation, layout and error: docs/ops/norm_jvp.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.norm_jvp import norm_jvp as _reference
from ._autograd import Derivative
from ._expect import expect_number
from ._layout import DTYPES
from ._norm import NAMES, parameter, refuse_triton_rows, validate
from ._register import register
from ._rows import acc_dtype, choose_split, fold, fold_broadcast, wanted_names
from ._select import Implementation, refuse_native, select
from .norm_jvp_backward import norm_jvp_backward

__all__ = ["norm_jvp"]


def _new_outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    stats = x.new_empty((*x.shape[:-1], 4), dtype=acc_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape), stats


def _run_kernel(
    launch: Callable[..., None],
    x: Tensor,
    t_x: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    *modulation, centred, eps = rest
    y, t_y, stats = _new_outputs(x)
    if x.numel():
        split = choose_split(x, [t_x], *modulation)
        views = [fold(v, split) for v in (y, t_y, stats)]
        operands = [fold_broadcast(v, x, split) for v in modulation]
        parameters = (parameter(v, x) for v in (weight, bias))
        launch(fold(x, split), fold(t_x, split), *parameters, *operands, *views, centred, eps)
    return y, t_y, stats


def _run_native(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _run_kernel(lambda *views: _native.call("norm_jvp", *views), *args)


def _run_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels.norm_jvp import launch_norm_jvp

    return _run_kernel(launch_norm_jvp, *args)


def _run_reference(x: Tensor, t_x: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, scale, shift, t_scale, t_shift, centred, eps = rest
    outputs = _new_outputs(x)
    values = _reference(
        x,
        t_x,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        t_scale=t_scale,
        t_shift=t_shift,
        kind="layer" if centred else "rms",
        eps=eps,
    )
    for out, value in zip(outputs, values, strict=True):
        out.copy_(value)
    return outputs


IMPLEMENTATIONS = (
    Implementation(
        "native", _run_native, lambda *args, **kwargs: refuse_native("norm_jvp", args, DTYPES)
    ),
    Implementation("triton", _run_triton, refuse_triton_rows),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _new_outputs(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, centred, _, impl = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.kind, ctx.impl = "layer" if centred else "rms", impl
    ctx.set_materialize_grads(False)


def _through_stats(
    d_stats: Tensor, x: Tensor, t_x: Tensor | None, stats: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and t_x through stats, which a double backward asks for.

    By x: of mean 1 / C, of rstd -rstd^2 n / C, of a t_n / C. By t_x: of t_mean 1 / C, of a n / C.
    """
    mean, rstd, t_mean, a = stats.split(1, -1)
    d_mean, d_rstd, d_t_mean, d_a = (d_stats / x.shape[-1]).split(1, -1)
    if kind == "rms":  # both means are the constant 0
        d_mean, d_t_mean = torch.zeros_like(d_mean), torch.zeros_like(d_t_mean)
    n = rstd * (x - mean)
    t_n = rstd * ((0 if t_x is None else t_x) - t_mean - n * a)
    return d_mean - d_rstd * rstd**2 * n + d_a * t_n, d_t_mean + d_a * n


def _backward(
    ctx: Any, d_y: Tensor | None, dt_y: Tensor | None, d_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    if d_y is None and dt_y is None and d_stats is None:
        return (None,)  # reached through other branches of the graph
    x, t_x, *operands, stats = ctx.saved_tensors
    wanted = wanted_names(NAMES, ctx, dt_y, d_stats)
    options = dict(zip(NAMES[2:], operands, strict=True))
    gradients = norm_jvp_backward(
        d_y, dt_y, x, t_x, stats, **options, wanted=wanted, kind=ctx.kind, impl=ctx.impl
    )
    if d_stats is None:
        return gradients
    more = _through_stats(d_stats, x, t_x, stats, ctx.kind)
    both = zip(gradients[:2], more, strict=True)
    added = [None if g is None else g + extra.to(g.dtype) for g, extra in both]
    return (*added, *gradients[2:])


_op = register(
    "norm_jvp",
    "(Tensor x, Tensor? t_x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift,"
    " Tensor? t_scale, Tensor? t_shift, bool centred, float eps, str impl)"
    " -> (Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_setup, _backward),
)


def norm_jvp(
    x: Tensor,
    t_x: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    t_scale: Tensor | None = None,
    t_shift: Tensor | None = None,
    kind: str = "layer",
    eps: float = 1e-6,
    return_stats: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return (y, t_y): the modulated norm of x and its derivative along the tangents.

    Args:
        x: [..., C], floating.
        t_x: tangent of x, its shape, dtype and device; None is zero and costs nothing.
        weight: [C], x's dtype or float32; None is one.
        bias: [C], likewise; None is zero.
        scale: broadcasts against x, as [C], [B, 1, C] or [B, N, C]; x's dtype; 1 is added to it.
        shift: likewise.
        t_scale: tangent of scale, any shape that scale may have.
        t_shift: tangent of shift, likewise.
        kind: "layer" (subtracts the mean) or "rms".
        eps: added to the mean square.
        return_stats: also return stats [..., 4], which the backward takes.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (y, t_y), or (y, t_y, stats). y has the same bits whatever the tangents are. All are
        differentiable in reverse mode, to any order in eager mode.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor, or eps is one.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent: pass it as t_x, t_scale or t_shift.
    """
    inputs = (x, t_x, weight, bias, scale, shift, t_scale, t_shift)
    validate(x, dict(zip(NAMES, inputs, strict=True)), kind)
    expect_number("eps", eps)
    chosen = select("norm_jvp", impl, IMPLEMENTATIONS, x)
    outputs = _op(*inputs, kind == "layer", eps, chosen)
    return tuple(outputs) if return_stats else tuple(outputs[:2])


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding to the storage type, half a unit of the value, which may fall to either side
    # where float32 sums differ in their last bits; values are of order one to ten.
    bounds = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for b, n, c, kind in ((2, 77, 72, "rms"), (3, 33, 1152, "layer"), (1, 5, 3000, "layer")):

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            names = ("scale", "shift", "t_scale", "t_shift")
            modulation = {name: draw(b, 1, c) for name in names} | {"bias": draw(c)}
            for options in ({"weight": draw(c)}, modulation):
                args = (draw(b, n, c), draw(b, n, c))
                options |= {"kind": kind, "return_stats": True}
                cases.append((args, options, bound, bound))
    return cases
