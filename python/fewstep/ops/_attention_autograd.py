"""Derivatives of attention_jvp: one backward op gives all of them up to the second order.

`gradient` is the map from cotangents to gradients, over R directions:

    (d_q, d_k, d_v, dt_q, dt_k, dt_v) = B(d_o, dt_o, d_lse, d_mu; q, k, v, t_q, t_k, t_v)
    delta0[r] = sum dt_o[r] o - d_mu[r]
    delta1[r] = sum dt_o[r] t_o[r]   (+ sum d_o o - d_lse for r = 0)

d_q, d_k, d_v are summed over r. Without cotangents of t_o and mu the tangents play no part: this is
attention's own backward, and the only cost of a loss that stops the gradient at t_o.

B of the plain backward is the transpose J^T of attention's Jacobian, applied to d = (d_o, d_lse):

    reverse   <c, J^T d> = <J c, d>: its gradient for d is (t_o, mu) along c = (c_q, c_k, c_v), that
              for q, k, v is B with d as the cotangent of t_o and mu, and c as the tangents
    forward   along (t_d, t): J^T t_d + (dJ^T[t]) d, which is B with the cotangents t_d of o and lse
              and d of t_o and mu, and the tangents t

So Hessians and their products with vectors run on the fused kernels, forward over reverse and
reverse over reverse. Derivatives of a B with tangents (third order) differentiate the reference,
which stores Nq x Nk matrices. So does a forward derivative of attention_jvp along tangents of its
own tangents. Where the scores were rounded to 8 bits (`score_dtype`) the rounding counts as the
identity: B takes exact scores, beside the o, t_o, lse and mu of the rounded ones; only the first
forward derivative of a forward is rounded as it is.

o, t_o, lse, mu and lse_rest (what rounding took from lse; None without an additive
mask) are values that B is handed to save work: its derivatives are those of B as a function of the
cotangents, primals and tangents, and no gradient goes into the former.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference.attention_jvp import attention_jvp as _reference
from ._attention import Masking, stat_dtype
from ._autograd import (
    Derivative,
    DerivativeError,
    differentiable,
    loop_vmap,
    pull_back,
    push_forward,
)
from ._select import UnsupportedError, select

_PRIMALS, _TANGENTS = 0b000111, 0b111000
_INPUTS = ("q", "k", "v", "t_q", "t_k", "t_v", "attn_mask", "t_attn_mask", "cu_q", "cu_k")
_COTANGENTS = ("d_o", "dt_o", "d_lse", "d_mu")
_OUTPUTS = ("o", "t_o", "lse", "mu", "lse_rest")


def refuse_mask_gradient(*masks: Tensor | None) -> None:
    """Raise DerivativeError if a gradient of a mask would be lost: no kernel computes it."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in masks):
        raise _no_mask_gradient()


def _no_mask_gradient() -> DerivativeError:
    return DerivativeError(
        "fewstep.ops.attention_jvp has no gradient for attn_mask or t_attn_mask, which requires "
        "grad. fewstep.scaled_dot_product_attention computes it, with Nq x Nk matrices"
    )


def _with_impl(function: Any, impl: str, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Call an op with the implementation that served the forward, or with `auto` if it can't."""
    try:
        return function(*args, **kwargs, impl=impl)
    except UnsupportedError:
        return function(*args, **kwargs, impl="auto")


def _masking(tensors: Sequence[Tensor | None], is_causal: bool, scale: float) -> dict[str, Any]:
    """Return the keywords of the two public functions; `tensors` as the ops take them."""
    mask, t_mask, cu_q, cu_k = tensors
    return {
        "attn_mask": mask,
        "t_attn_mask": t_mask,
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "is_causal": is_causal,
        "scale": scale,
    }


def _along(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], masking: dict[str, Any], impl: str
) -> tuple[Tensor, ...]:
    """Return (o, t_o, lse, mu) for one direction without an axis of directions."""
    from .attention_jvp import attention_jvp

    return _with_impl(attention_jvp, impl, *primals, *tangents, return_stats=True, **masking)


def _delta(lse: Tensor, *terms: Tensor | None) -> Tensor:
    """Return the sum of the terms that are there, in the dtype and shape of lse."""
    present = [x for x in terms if x is not None]
    return sum(present[1:], present[0]) if present else torch.zeros_like(lse)


def _row_sums(a: Tensor | None, b: Tensor) -> Tensor | None:
    return None if a is None else (a.to(stat_dtype(b)) * b.to(stat_dtype(b))).sum(-1)


def _empty_or(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _gradient(*args: Any) -> tuple[Tensor, ...]:
    """Return six gradients; those without a bit in `needs` are empty."""
    from .attention_jvp_backward import NAMES, attention_jvp_backward

    d_o, dt_o, d_lse, d_mu, *rest, is_causal, scale, needs, impl = args
    primals, tangents, masks = rest[:3], rest[3:6], rest[6:10]
    o, t_o, lse, mu, lse_rest = rest[10:]
    names = [name for i, name in enumerate(NAMES) if needs >> i & 1]

    def run(r: int | None, delta0: Any, delta1: Any, d_o: Any, dt_o: Any) -> tuple[Tensor, ...]:
        *t, t_mask, mu_r = (
            None if r is None or x is None else x[r] for x in (*tangents, masks[1], mu)
        )
        masking = _masking((masks[0], t_mask, *masks[2:]), is_causal, scale)
        return _with_impl(
            attention_jvp_backward, impl, d_o, dt_o, delta0, delta1, *primals, *t, lse, mu_r,
            lse_rest=lse_rest, needs=tuple(names), **masking,
        )  # fmt: skip

    delta1 = _delta(lse, _row_sums(d_o, o), None if d_lse is None else -d_lse)
    directions = next((x.shape[0] for x in (dt_o, d_mu) if x is not None), None)
    if directions is None:
        return run(None, None, delta1, d_o, None)
    results = []
    for r in range(directions):
        dt, minus_d_mu = (None if dt_o is None else dt_o[r]), (None if d_mu is None else -d_mu[r])
        delta0 = _delta(lse, _row_sums(dt, o), minus_d_mu)
        delta = _delta(lse, _row_sums(dt, t_o[r]), delta1 if r == 0 else None)
        results.append(run(r, delta0, delta, d_o if r == 0 else None, dt))
    # By `needs`, not by what is empty: so are the gradients of a tensor without elements.
    columns = list(zip(*results, strict=True))
    summed = [x[0] if len(x) == 1 else sum(x[1:], x[0]) for x in columns[:3]]
    stacked = [_stack(x) if needs >> i & 1 else x[0] for i, x in enumerate(columns[3:], start=3)]
    return *summed, *stacked


def _stack(x: Sequence[Tensor]) -> Tensor:
    return x[0].unsqueeze(0) if len(x) == 1 else torch.stack(x)


def _formula(*args: Any) -> tuple[Tensor, ...]:
    """Return what the forward op returns, by torch's operators."""
    *tensors, is_causal, scale = args
    q = tensors[0]
    o, t_o, lse, mu = _reference(*tensors[:6], **_masking(tensors[6:], is_causal, scale))
    return o.to(q.dtype), t_o.to(q.dtype), lse, mu


def _gradient_formula(*args: Any) -> tuple[Tensor, ...]:
    """Return what `_gradient` returns, by torch's operators."""
    *cotangents_and_inputs, is_causal, scale, needs = args
    cotangents, inputs = cotangents_and_inputs[:4], cotangents_and_inputs[4:]
    wanted = [i for i in range(6) if needs >> i & 1]
    found = pull_back(_formula, (*inputs, is_causal, scale), cotangents, wanted)
    return tuple(_empty_or(x, inputs[0]) for x in found[:6])


def _setup_gradient(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, is_causal, scale, needs, impl = inputs
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.settings = is_causal, scale, needs, impl
    ctx.mark_non_differentiable(*(x for i, x in enumerate(output) if not needs >> i & 1))
    ctx.set_materialize_grads(False)


def _is_plain(dt_o: Tensor | None, d_mu: Tensor | None) -> bool:
    return dt_o is None and d_mu is None


def _gradient_backward(ctx: Any, *c: Tensor | None) -> tuple[Any, ...]:
    is_causal, scale, needs, impl = ctx.settings
    saved = ctx.saved_tensors
    d_o, dt_o, d_lse, d_mu, *inputs = saved[:14]
    if any(ctx.needs_input_grad[10:12]):
        raise _no_mask_gradient()
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:10]) if need]
    if not _is_plain(dt_o, d_mu):
        arguments = (d_o, dt_o, d_lse, d_mu, *inputs, is_causal, scale, needs)
        return tuple(pull_back(_gradient_formula, arguments, c, wanted)[:10])
    primals, masks = inputs[:3], (inputs[6], None, *inputs[8:])
    o, t_o, lse, mu = _along(primals, c[:3], _masking(masks, is_causal, scale), impl)
    gradients: list[Any] = [t_o, None, mu, None, *[None] * 6]
    bits = sum(1 << i for i in range(3) if ctx.needs_input_grad[4 + i])
    if bits:
        tangents = (None if x is None else x.unsqueeze(0) for x in c[:3])
        gradients[4:7] = gradient(
            None, _lead_or_none(d_o), None, _lead_or_none(d_lse), *primals, *tangents, *masks,
            o, t_o[None], lse, mu[None], saved[18], is_causal, scale, bits, impl,
        )[:3]  # fmt: skip
    return tuple(x if i in wanted else None for i, x in enumerate(gradients))


def _lead_or_none(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.unsqueeze(0)


def _gradient_jvp(ctx: Any, saved: Sequence[Tensor | None], *t: Tensor | None) -> tuple[Any, ...]:
    is_causal, scale, needs, impl = ctx.settings
    d_o, dt_o, d_lse, d_mu, *inputs = saved[:14]
    t = tuple(None if x is None or x._is_zerotensor() else x for x in t[:14])
    if not _is_plain(dt_o, d_mu):
        arguments = (d_o, dt_o, d_lse, d_mu, *inputs, is_causal, scale, needs)
        found = push_forward(_gradient_formula, arguments, (*t, None, None, None))
        return tuple(x if needs >> i & 1 else None for i, x in enumerate(found))
    o, lse, rest = saved[14], saved[16], saved[18]
    primals, masks = inputs[:3], (inputs[6], t[10], *inputs[8:])
    t_primals = t[4:7]
    if all(x is None for x in (*t_primals, t[10])):
        d_q, d_k, d_v, *_ = gradient(
            t[0], None, t[2], None, *primals, None, None, None, *masks, o, None, lse, None,
            rest, is_causal, scale, needs, impl,
        )  # fmt: skip
    else:
        o, t_o, lse, mu = _along(primals, t_primals, _masking(masks, is_causal, scale), impl)
        d_q, d_k, d_v, *_ = gradient(
            t[0], _lead_or_none(d_o), t[2], _lead_or_none(d_lse), *primals,
            *map(_lead_or_none, t_primals), masks[0], _lead_or_none(masks[1]), *masks[2:],
            o, t_o[None], lse, mu[None], rest, is_causal, scale, needs, impl,
        )  # fmt: skip
    return *(x if needs >> i & 1 else None for i, x in enumerate((d_q, d_k, d_v))), None, None, None


def _fold(x: Tensor | None, dim: int | None, size: int, axis: int) -> Tensor | None:
    """Return x with the batched axis `dim` merged into `axis`, as its slower part."""
    if x is None:
        return None
    if dim is None:
        x = x.unsqueeze(axis).expand(*x.shape[:axis], size, *x.shape[axis:])
    else:
        x = x.movedim(dim, axis)
    # Where the two axes are one only in a copy, what other axes repeat isn't copied with them.
    once = x
    for i in range(x.dim()):
        if i not in (axis, axis + 1) and x.stride(i) == 0 and x.shape[i] > 1:
            once = once.narrow(i, 0, 1)
    folded = once.flatten(axis, axis + 1)
    shape = list(x.shape)
    shape[axis : axis + 2] = [shape[axis] * shape[axis + 1]]
    return folded.expand(shape)


def _unfold(x: Tensor, size: int, axis: int) -> Tensor:
    return x.unflatten(axis, (size, -1))


# Where B, the axis of batches, is in each tensor: tensors with directions have it second.
_AXES = {
    **dict.fromkeys(("q", "k", "v", "attn_mask", "d_o", "d_lse", "o", "lse", "lse_rest"), 0),
    **dict.fromkeys(("t_q", "t_k", "t_v", "t_attn_mask", "dt_o", "d_mu", "t_o", "mu"), 1),
}


def _fold_batch(
    names: Sequence[str], info: Any, in_dims: Sequence[Any], args: Sequence[Any]
) -> Any:
    tensors = [
        _fold(x, dim, info.batch_size, _AXES[name]) if name in _AXES else x
        for name, x, dim in zip(names, args, in_dims, strict=False)
    ]
    return (*tensors, *args[len(names) :])


def _gradient_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    names = (*_COTANGENTS, *_INPUTS, *_OUTPUTS)
    if args[names.index("cu_q")] is not None:
        return loop_vmap(gradient, info, in_dims, *args)
    outputs = gradient(*_fold_batch(names, info, in_dims, args))
    size, needs = info.batch_size, args[-2]
    axes = [(0 if i < 3 else 1) if needs >> i & 1 else None for i in range(len(outputs))]
    unfolded = [
        x if axis is None else _unfold(x, size, axis) for x, axis in zip(outputs, axes, strict=True)
    ]
    return tuple(unfolded), tuple(axes)


def _attention(*args: Any) -> tuple[Tensor, ...]:
    """Call the forward op on other tensors than those that `impl` was chosen for."""
    from .attention_jvp import IMPLEMENTATIONS, _op

    *tensors, is_causal, scale, score_dtype, impl = args
    asked = (IMPLEMENTATIONS, *tensors[:6], Masking(*tensors[6:], is_causal))
    kinds = {"scale": scale, "score_dtype": score_dtype}
    try:
        impl = select("attention_jvp", impl, *asked, **kinds)
    except UnsupportedError:
        impl = select("attention_jvp", "auto", *asked, **kinds)
    return _op(*tensors, is_causal, scale, score_dtype, impl)


def _attention_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    size = info.batch_size
    batched = {name for name, dim in zip(_INPUTS, in_dims, strict=False) if dim is not None}
    if batched <= {"t_q", "t_k", "t_v", "t_attn_mask"}:
        # The primals are shared: what is batched are directions.
        tensors = [
            _fold(x, dim, size, 0) if name.startswith("t_") else x
            for name, x, dim in zip(_INPUTS, args, in_dims, strict=False)
        ]
        o, t_o, lse, mu, rest = _attention(*tensors, *args[len(_INPUTS) :])
        unfolded = (o, _unfold(t_o, size, 0), lse, _unfold(mu, size, 0), rest)
        return unfolded, (None, 0, None, 0, None)
    if args[_INPUTS.index("cu_q")] is not None:
        return loop_vmap(_attention, info, in_dims, *args)
    *outputs, rest = _attention(*_fold_batch(_INPUTS, info, in_dims, args))
    axes = (0, 1, 0, 1)
    unfolded = (x.unflatten(i, (size, -1)) for x, i in zip(outputs, axes, strict=True))
    if rest.dim() == 1:
        return (*unfolded, rest), (*axes, None)
    return (*unfolded, rest.unflatten(0, (size, -1))), (*axes, 0)


gradient = differentiable(
    "attention_jvp_gradient",
    _gradient,
    23,
    Derivative(_setup_gradient, _gradient_backward, _gradient_vmap, _gradient_jvp),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, is_causal, scale, score_dtype, impl = inputs
    *outputs, rest = output
    # Without an additive mask there is none.
    ctx.save_for_backward(*tensors, *outputs, rest if rest.dim() > 1 else None)
    ctx.save_for_forward(*tensors)
    ctx.mark_non_differentiable(rest)
    ctx.settings = is_causal, scale, score_dtype, impl
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
    is_causal, scale, _, impl = ctx.settings
    saved = list(ctx.saved_tensors)  # asked once: a checkpoint hands them out once
    tensors, outputs = saved[:10], saved[10:]
    if any(ctx.needs_input_grad[6:8]):
        raise _no_mask_gradient()
    needs = sum(1 << i for i in range(6) if ctx.needs_input_grad[i])
    d_o, dt_o, d_lse, d_mu = cotangents[:4]
    if outputs[1].shape[0] == 0:  # no tangents: t_o and mu have no element, nor their cotangents
        dt_o = d_mu = None
    if _is_plain(dt_o, d_mu):
        needs &= _PRIMALS
        tensors[3:6], tensors[7], outputs[1], outputs[3] = [None] * 3, None, None, None
    if not needs:
        return (None,)
    found = gradient(d_o, dt_o, d_lse, d_mu, *tensors, *outputs, is_causal, scale, needs, impl)
    return tuple(x if needs >> i & 1 else None for i, x in enumerate(found))


def _jvp(ctx: Any, saved: Sequence[Tensor | None], *tangents: Tensor | None) -> tuple[Any, ...]:
    is_causal, scale, score_dtype, impl = ctx.settings
    t = tuple(None if x is None or x._is_zerotensor() else x for x in tangents[:10])
    has_directions = any(x is not None for x in (*saved[3:6], saved[7]))
    if has_directions:
        return (*push_forward(_formula, (*saved, is_causal, scale), (*t, None, None)), None)
    masks = (saved[6], t[6], *saved[8:])
    options = _masking(masks, is_causal, scale) | {"score_dtype": score_dtype}
    _, t_o, lse, mu = _along(saved[:3], t[:3], options, impl)
    return t_o, t_o.new_empty((0, *t_o.shape)), mu, lse.new_empty((0, *lse.shape)), None


RULES = Derivative(_setup, _backward, _attention_vmap, _jvp)
"""What attention_jvp declares."""
