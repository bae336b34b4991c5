"""Gradients of `linear_attention_jvp` through both of its results.

With d_o, dt_o the cotangents of o, t_o, the other names as in `linear_attention_jvp`, den including
eps, and b_o = dt_o . o (over Dv):

    S = [dt_o, -b_o] / den                                  cotangent of [t_num, t_den]
    R = [d_o - (t_den / den) dt_o,                          cotangent of [num, den]
         -(d_o . o + dt_o . t_o - (t_den / den) b_o)] / den
    d_tA = f(q)^T S                         d_A = f(q)^T R + t_f(q)^T S
    d_t_q = [q > 0] S A^T                   d_q = [q > 0] (R A^T + S tA^T)
    d_t_k = [k > 0] [v, 1] d_tA^T           d_k = [k > 0] ([v, 1] d_A^T + [t_v, 0] d_tA^T)
    d_t_v = f(k) d_tA                       d_v = f(k) d_A + t_f(k) d_tA    (first Dv columns)

d_o, dt_o           [B, H, Nq, Dv]; a cotangent or tangent that is None is zero
state, t_state      [B, H, D, Dv + 1], the last two results of `linear_attention_jvp`

Two passes over the tokens; o and t_o are computed again and needn't be kept. Sums are in float32
(float64 for float64). Derivation and layout: docs/ops/linear_attention_jvp_backward.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..reference.linear_attention_jvp import linear_attention_jvp as _forward
from ..reference.linear_attention_jvp_backward import linear_attention_jvp_backward as _reference
from ._autograd import Derivative, composite
from ._expect import expect_number, expect_tensor, expect_tensors
from ._layout import DTYPES, unit_stride
from ._linear_attention import NAMES, new_like_rows, refuse_triton_heads, validate
from ._register import register
from ._rows import acc_dtype, names_in, pack, unpack
from ._select import Implementation, refuse_native, select

__all__ = ["linear_attention_jvp_backward"]


def _new_gradients(q: Tensor, k: Tensor, v: Tensor, asked: int) -> dict[str, Tensor]:
    """Allocate the gradients asked for, in the axis orders of q, k and v."""
    primals = dict(zip(NAMES, (q, k, v, q, k, v), strict=True))
    return {
        name: new_like_rows(primals[name], *primals[name].shape[2:])
        for name in names_in(asked, NAMES)
    }


def _formula(*args: Any) -> tuple[Tensor, ...]:
    """Return what the op returns but for strides, in differentiable torch operators."""
    *inputs, eps, asked = args
    q = inputs[2]
    found = dict(zip(NAMES, _reference(*inputs, eps=eps), strict=True))
    return pack({name: found[name].to(q.dtype) for name in names_in(asked, NAMES)}, NAMES, q)


def _run_reference(*args: Any) -> tuple[Tensor, ...]:
    q, k, v = args[2:5]
    gradients = _new_gradients(q, k, v, args[-1])
    for name, value in zip(NAMES, _formula(*args), strict=True):
        if name in gradients:
            gradients[name].copy_(value)
    return pack(gradients, NAMES, q)


def _run_kernel(launch: Callable[..., None], *args: Any) -> tuple[Tensor, ...]:
    *inputs, state, t_state, eps, asked = args
    q, k, v = inputs[2:5]
    gradients = _new_gradients(q, k, v, asked)
    states = (state.contiguous(), t_state.contiguous())
    launch(*(unit_stride(x) for x in inputs), *states, *map(gradients.get, NAMES), eps)
    return pack(gradients, NAMES, q)


def _run_native(*args: Any) -> tuple[Tensor, ...]:
    return _run_kernel(lambda *views: _native.call("linear_attention_jvp_backward", *views), *args)


def _run_triton(*args: Any) -> tuple[Tensor, ...]:
    from ..kernels.linear_attention_jvp_backward import launch_linear_attention_jvp_backward

    return _run_kernel(launch_linear_attention_jvp_backward, *args)


def _refuse_native(*args: Any, **kwargs: Any) -> str | None:
    return refuse_native("linear_attention_jvp_backward", args, DTYPES)


IMPLEMENTATIONS = (
    Implementation("native", _run_native, _refuse_native),
    Implementation("triton", _run_triton, refuse_triton_heads),
    Implementation("reference", _run_reference, lambda *args, **kwargs: None),
)


def _fake(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, asked, _ = args
    q, k, v = inputs[2:5]
    return pack(_new_gradients(q, k, v, asked), NAMES, q)


_rules = composite(lambda *args: _formula(*args[:-1]))
_op = register(
    "linear_attention_jvp_backward",
    "(Tensor? d_o, Tensor? dt_o, Tensor q, Tensor k, Tensor v, Tensor? t_q, Tensor? t_k,"
    " Tensor? t_v, Tensor state, Tensor t_state, float eps, int wanted, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    IMPLEMENTATIONS,
    _fake,
    Derivative(_rules.setup_context, _rules.backward),
)


def linear_attention_jvp_backward(
    d_o: Tensor | None,
    dt_o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    state: Tensor,
    t_state: Tensor,
    *,
    eps: float = 1e-15,
    wanted: Sequence[str] = NAMES,
    impl: str = "auto",
) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, t_q, t_k and t_v.

    Args:
        d_o: cotangent of o, [B, H, Nq, Dv] in q's dtype; None is zero.
        dt_o: cotangent of t_o, likewise.
        q: the inputs of `linear_attention_jvp`, here and below.
        k: likewise.
        v: likewise.
        t_q: likewise.
        t_k: likewise.
        t_v: likewise.
        state: its third result, with `return_state=True`.
        t_state: its fourth.
        eps: as given to it.
        wanted: names of the inputs whose gradients are asked for; that of a tangent is defined
            also where the tangent is None.
        impl: "auto", "reference", "native" or "triton".

    Returns:
        Six gradients in this order, None where one is not wanted.

    Raises:
        ValueError: a shape, dtype or device does not fit; the message names the argument.
        TypeError: an argument is no tensor, or eps is one.
        UnsupportedError: `impl` can't serve these tensors.
        DerivativeError: an input carries a tangent.
    """
    validate(q, k, v, {"t_q": t_q, "t_k": t_k, "t_v": t_v})
    expect_number("eps", eps)
    expect_tensor("state", state)
    expect_tensor("t_state", t_state)
    expect_tensors(d_o=d_o, dt_o=dt_o)
    wanted = (wanted,) if isinstance(wanted, str) else wanted
    out_shape = (*q.shape[:-1], v.shape[-1])
    state_shape = (*q.shape[:2], q.shape[-1], v.shape[-1] + 1)
    for name, x, shape, dtype in (
        ("d_o", d_o, out_shape, q.dtype),
        ("dt_o", dt_o, out_shape, q.dtype),
        ("state", state, state_shape, acc_dtype(q)),
        ("t_state", t_state, state_shape, acc_dtype(q)),
    ):
        if x is None:
            continue
        if tuple(x.shape) != shape or x.dtype != dtype:
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}"
            )
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
    for name in wanted:
        if name not in NAMES:
            raise ValueError(f"wanted: expected names among {', '.join(NAMES)}, got {name!r}")
    chosen = select("linear_attention_jvp_backward", impl, IMPLEMENTATIONS, q, v)
    asked = sum(1 << NAMES.index(name) for name in set(wanted))
    outputs = _op(d_o, dt_o, q, k, v, t_q, t_k, t_v, state, t_state, eps, asked, chosen)
    return unpack(outputs, asked)


def gate_cases(device: torch.device) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return (args, kwargs, rtol, atol) for the gate on a new machine; see `_gate.check`."""
    generator = torch.Generator().manual_seed(0)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    # One rounding of values below order one; in float32 products are three of TF32 each on a GPU,
    # which leave 2^-21 of terms that partly cancel.
    bounds = {torch.float32: 1e-4, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}
    for dtype, bound in bounds.items():
        for nq, nk, d, dv in ((77, 130, 32, 32), (130, 33, 72, 40)):

            def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
                return torch.randn(shape, generator=generator).to(device, dtype)

            inputs = [draw(2, 2, *shape) for shape in ((nq, d), (nk, d), (nk, dv)) * 2]
            *_, state, t_state = _forward(*inputs)
            cotangents = (draw(2, 2, nq, dv), draw(2, 2, nq, dv))
            cases.append(((*cotangents, *inputs, state, t_state), {}, bound, bound))
    return cases
