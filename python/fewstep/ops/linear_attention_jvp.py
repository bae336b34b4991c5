"""ReLU linear attention and its directional derivative, in two passes over the tokens.

    f(x) = relu(x)                          t_f(x) = [x > 0] t_x
    A  = sum_j f(k_j)^T [v_j, 1]            tA = sum_j t_f(k_j)^T [v_j, 1] + f(k_j)^T [t_v_j, 0]
    [num, den] = f(q) A                     [t_num, t_den] = t_f(q) A + f(q) tA
    o = num / (den + eps)                   t_o = (t_num - o t_den) / (den + eps)

q, t_q              [B, H, Nq, D]           t_x: tangent of x
k, t_k              [B, H, Nk, D]
v, t_v              [B, H, Nk, Dv]
o, t_o              [B, H, Nq, Dv], in q's dtype and axis order (heads inside tokens stay there)
state A, t_state tA [B, H, D, Dv + 1], float32 (float64 for float64); what the backward needs

This is SANA's self-attention as diffusers' SanaLinearAttnProcessor2_0 computes it. float32,
bfloat16, float16; float64 too on the CPU and in the reference. D and Dv multiples of 8 up to 128,
any Nq and Nk. Any strides with unit stride in the last axis, without a copy. Sums are in float32
(float64 for float64). A tangent that is None is zero and its products are not computed.

Derivation, layout and error: docs/ops/linear_attention_jvp.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.linear_attention_jvp import linear_attention_jvp as _reference
from ._autograd import Derivative
from ._expect import expect_number
from ._layout import DTYPES, unit_stride
from ._linear_attention import (
    NAMES,
    new_like_rows,
    new_states,
    refuse_triton_heads,
    validate,
)
from ._register import register
from ._rows import wanted_names
from ._select import Implementation, refuse_native, select
from .linear_attention_jvp_backward import linear_attention_jvp_backward

__all__ = ["linear_attention_jvp"]


def _new_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    o, t_o = (new_like_rows(q, q.shape[2], v.shape[-1]) for _ in range(2))
    return o, t_o, *new_states(q, v)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tangents, eps = rest
    outputs = _new_outputs(q, v)
    for out, value in zip(outputs, _reference(q, k, v, *tangents, eps=eps), strict=True):
        out.copy_(value)
    return outputs


def _run_kernel(
    launch: Callable[..., None], q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *tangents, eps = rest
    outputs = _new_outputs(q, v)
    launch(*(unit_stride(x) for x in (q, k, v, *tangents)), *outputs, eps)
    return outputs


def _run_native(*args: Any) -> tuple[Tensor, ...]:
    return _run_kernel(lambda *views: _native.call("linear_attention_jvp", *views), *args)


def _run_triton(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels.linear_attention_jvp import launch_linear_attention_jvp

    return _run_kernel(launch_linear_attention_jvp, *args)


def _refuse_native(*args: Any, **kwargs: Any) -> str | None:
    return refuse_native("linear_attention_jvp", args, DTYPES)


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native),
    Implementation("triton", _run_triton, refuse_triton_heads),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _new_outputs(q, v)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.eps, ctx.impl = inputs
    ctx.save_for_backward(*tensors, *output[2:])
    ctx.set_materialize_grads(False)


def _through_states(
    d_state: Tensor | None, d_t_state: Tensor | None, saved: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the gradients of k, v, t_k and t_v through the states alone.

    For a double backward, or a loss on the states; those through o are the kernels' business.
    """
    _, k, v, _, t_k, t_v, state, _ = saved
    zeros = torch.zeros_like(state)
    d_state, d_t_state = (zeros if d is None else d for d in (d_state, d_t_state))
    k, v = k.to(state.dtype), v.to(state.dtype)
    t_k, t_v = (0 * x if t is None else t.to(state.dtype) for x, t in ((k, t_k), (v, t_v)))
    positive = k > 0
    f, t_f = k.relu(), torch.where(positive, t_k, 0)
    one = torch.ones_like(v[..., :1])
    ones, zero = torch.cat([v, one], -1), torch.cat([t_v, 0 * one], -1)
    d_t_k = torch.where(positive, ones @ d_t_state.mT, 0)
    d_k = torch.where(positive, ones @ d_state.mT + zero @ d_t_state.mT, 0)
    d_t_v = (f @ d_t_state)[..., :-1]
    d_v = (f @ d_state + t_f @ d_t_state)[..., :-1]
    return d_k, d_v, d_t_k, d_t_v


def _backward(
    ctx: Any,
    d_o: Tensor | None,
    dt_o: Tensor | None,
    d_state: Tensor | None,
    d_t_state: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if d_o is None and dt_o is None and d_state is None and d_t_state is None:
        return (None,)  # reached through other branches of the graph
    saved = ctx.saved_tensors
    wanted = wanted_names(NAMES, ctx, dt_o, d_state, d_t_state)
    gradients = linear_attention_jvp_backward(
        d_o, dt_o, *saved, eps=ctx.eps, wanted=wanted, impl=ctx.impl
    )
    if d_state is None and d_t_state is None:
        return gradients
    d_q, d_k, d_v, d_t_q, d_t_k, d_t_v = gradients
    more = _through_states(d_state, d_t_state, saved)
    both = zip((d_k, d_v, d_t_k, d_t_v), more, strict=True)
    d_k, d_v, d_t_k, d_t_v = (None if g is None else g + extra.to(g.dtype) for g, extra in both)
    return d_q, d_k, d_v, d_t_q, d_t_k, d_t_v


_op = register(
    "linear_attention_jvp",
    "(Tensor q, Tensor k, Tensor v, Tensor? t_q, Tensor? t_k, Tensor? t_v, float eps, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_setup, _backward),
)


def linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    eps: float = 1e-15,
    return_state: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Return (o, t_o): ReLU linear attention of q, k, v and its derivative along the tangents.

    Args:
        q: queries [B, H, Nq, D].
        k: keys [B, H, Nk, D].
        v: values [B, H, Nk, Dv].
        t_q: tangent of q, its shape, dtype and device; None is zero and costs nothing.
        t_k: tangent of k, likewise.
        t_v: tangent of v, likewise.
        eps: added to the denominator.
        return_state: also return state and t_state, which the backward takes.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        (o, t_o), or (o, t_o, state, t_state). o has the same bits whatever the tangents are. All
        are differentiable in reverse mode, to any order in eager mode.

    Raises:
        ValueError: shapes, dtypes or devices differ, or a head dim is not offered.
        TypeError: an argument is no tensor, or eps is one.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent: pass it as t_q, t_k or t_v.
    """
    validate(q, k, v, {"t_q": t_q, "t_k": t_k, "t_v": t_v})
    expect_number("eps", eps)
    chosen = select("linear_attention_jvp", impl, IMPLEMENTATIONS, q, v)
    outputs = _op(q, k, v, t_q, t_k, t_v, eps, chosen)
    return tuple(outputs) if return_state else tuple(outputs[:2])


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of values of order one; products with the state are three of TF32 for one of
    # float32 on a GPU, 2^-21 each, and state elements are sums of up to 700 terms of order one.
    bounds = {torch.float32: 2e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for nq, nk, d, dv in ((77, 130, 32, 32), (33, 700, 112, 112), (130, 33, 72, 40)):
            shapes = [(2, 2, nq, d), (2, 2, nk, d), (2, 2, nk, dv)] * 2
            # No element of q and k within 0.1 of relu's kink, across which a derivative jumps.
            args = tuple(
                (x + 0.1 * x.sign()).to(device, dtype)
                for x in (torch.randn(shape, generator=generator) for shape in shapes)
            )
            cases.append((args, {"return_state": True}, bound, 10 * bound))
            cases.append(((*args[:4], None, None), {}, bound, bound))
    return cases
