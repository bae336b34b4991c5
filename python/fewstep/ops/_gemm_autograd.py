"""Derivatives of the low-bit products, in both modes. Symbols: `_gemm.py`.

They take the rounding of x for the identity (straight-through), W, smooth and the scales for
constants:

    d_x = ((d_y W) H) / smooth + (d_y up) down

That is what trains a LoRA over a quantised layer, and the exact tangent of the dequantised one.
Through an activation or to a gate they need y, which is not kept: the product is taken again, in
float32 (gemm_w4a16: in x's dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from ._autograd import Derivative, DerivativeError, loop_vmap, push_forward
from ._epilogue import activate
from ._layout import FLOATS, matrix
from ._prologue import project


class Linear(NamedTuple):
    """The inputs of a product that can have a derivative, or their tangents."""

    x: Tensor | None
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    low: Tensor | None


def _sum_rows(d_y: Tensor, x: Tensor) -> Tensor:
    """Return sum_m d_y_mn x_mk over all rows: [N, K]."""
    return matrix(d_y).mT @ matrix(x).to(d_y.dtype)


def differentiate(names: str, weight: Callable[..., Tensor], op: Callable[[], Any]) -> Derivative:
    """Return the rules of a product.

    `names` are the op's inputs in the order of its schema, the activations first. `weight(*inputs)`
    returns W in float32, `op()` the registered op. Of the other inputs only bias, down, up, low,
    gate and residual have a derivative; the rest refuse one.
    """
    order = ("x", *names.split()[1:])
    known = (*Linear._fields, "gate", "residual")
    constant = [i for i, name in enumerate(order) if name not in known]
    rowwise = ("x", "a_scale", "low", "gate", "residual")

    def refuse(given: Any, x: Tensor) -> None:
        for i in constant if x.dtype in FLOATS else (0, *constant):
            if given[i]:
                raise DerivativeError(
                    f"{names.split()[i]}: expected a constant, got one that requires grad or "
                    "carries a tangent, which would be lost: a quantised operand has no derivative"
                )

    def linear(values: Any) -> Linear:
        given = dict(zip(order, values, strict=False))
        return Linear(*(given.get(name) for name in Linear._fields))

    def whole(ctx: Any, saved: Any) -> list[Any]:
        """Return all inputs, from the saved tensors."""
        return [rest if x is None else x for x, rest in zip(saved, ctx.rest, strict=True)]

    def sums(ctx: Any, saved: Any) -> Tensor:
        """Return y, in float32 where the op can."""
        args = whole(ctx, saved)
        for i, name in enumerate(order):
            if name in ("activation", "gate", "residual"):
                args[i] = None
        args = [torch.float32 if isinstance(x, torch.dtype) else x for x in args]
        return op()(*args).float()

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        refuse(ctx.needs_input_grad, inputs[0])
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors)
        given = dict(zip(order, inputs, strict=False))
        wanted = dict(zip(order, ctx.needs_input_grad, strict=False))
        ctx.activation = given["activation"]
        curved = ctx.activation is not None and any(wanted[name] for name in Linear._fields)
        ctx.needs_y = curved or wanted["gate"]
        # What nobody needs is not kept alive, nor guarded against writes.
        tensors[order.index("residual")] = None
        if not (wanted["up"] or wanted["down"] or ctx.needs_y):
            tensors[0] = None
        if not (wanted["up"] or ctx.needs_y):
            tensors[order.index("low")] = None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.out_dtype = output.shape, output.dtype
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.dtypes = {name: x.dtype for name, x in given.items() if isinstance(x, Tensor)}

    def backward(ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_out is None:
            return (None,)
        saved = ctx.saved_tensors
        needs = dict(zip(order, ctx.needs_input_grad, strict=False))
        gate = dict(zip(order, saved, strict=False))["gate"]
        gradients: dict[str, Tensor] = {"residual": d_out} if needs["residual"] else {}
        d_y = d_out if gate is None else (d_out.float() * gate.float()).to(d_out.dtype)
        if ctx.needs_y:
            v, pull = torch.func.vjp(lambda y: activate(y, ctx.activation), sums(ctx, saved))
            d_y = pull(d_y.float())[0].to(d_out.dtype)
            if needs["gate"]:
                gradients["gate"] = (d_out.float() * v).sum_to_size(gate.shape)
        if any(needs[name] for name in Linear._fields):
            gradients |= linear_gradients(ctx, d_y, needs, saved)
        return tuple(
            gradients[name].to(ctx.dtypes[name]) if name in gradients else None for name in order
        )

    def linear_gradients(
        ctx: Any, d_y: Tensor, needs: dict[str, bool], saved: Any
    ) -> dict[str, Tensor]:
        p, gradients = linear(saved), {}
        d_low = None if p.up is None else d_y @ p.up.to(d_y.dtype)
        if needs["x"]:
            gradients["x"] = d_y @ weight(*whole(ctx, saved)).to(d_y.dtype)
            if d_low is not None and p.down is not None:
                gradients["x"] = gradients["x"] + d_low @ p.down.to(d_y.dtype)
        if needs["bias"]:
            gradients["bias"] = matrix(d_y).sum(0)
        if needs["up"]:
            gradients["up"] = _sum_rows(d_y, project(p.x, p.down, p.low))
        if needs["down"]:
            gradients["down"] = _sum_rows(d_low, p.x)
        if needs["low"]:
            gradients["low"] = d_low
        return gradients

    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Tensor:
        refuse([t is not None for t in tangents], saved[0])
        p, t = linear(saved), linear(tangents)
        terms = []
        if t.x is not None:
            terms.append(F.linear(t.x, weight(*whole(ctx, saved)).to(t.x.dtype)))
        if t.bias is not None:
            terms.append(t.bias)
        if p.up is not None:
            t_low = [t.low] if t.low is not None else []
            if p.down is not None and t.x is not None:
                t_low.append(F.linear(t.x, p.down))
            if t.down is not None:
                t_low.append(F.linear(p.x, t.down))
            terms += [F.linear(low, p.up.to(low.dtype)) for low in t_low]
            if t.up is not None:
                terms.append(F.linear(project(p.x, p.down, p.low).to(t.up.dtype), t.up))
        (gate, *_), (t_gate, t_residual) = (
            [dict(zip(order, x, strict=False))[name] for name in ("gate", "residual")]
            for x in (saved, tangents)
        )
        curved = ctx.activation is not None and terms
        y = sums(ctx, saved) if curved or t_gate is not None else None
        parts = []
        if terms:
            t_v = sum(term.float() for term in terms)
            if y is not None:
                along = [t_v.expand_as(y)]
                (t_v,) = push_forward(lambda y: activate(y, ctx.activation), [y], along)
            parts.append(t_v if gate is None else gate.float() * t_v)
        if t_gate is not None:
            parts.append(t_gate.float() * activate(y, ctx.activation))
        if t_residual is not None:
            parts.append(t_residual.float())
        return sum(parts).expand(ctx.shape).to(ctx.out_dtype)

    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        names = [*order, *["option"] * (len(args) - len(order))]
        if any(
            dim is not None and name not in rowwise
            for dim, name in zip(in_dims, names, strict=True)
        ):
            return loop_vmap(op(), info, in_dims, *args)
        # Rows stand alone: a batch of activations is more rows.
        moved = list(args)
        for i, (x, dim, name) in enumerate(zip(args, in_dims, names, strict=True)):
            if isinstance(x, Tensor) and name in rowwise:
                if dim is not None:
                    x = x.movedim(dim, 0)
                    if name == "gate":  # aligned with the last axes, which rows are in front of
                        ones = args[0].dim() - (in_dims[0] is not None) - (x.dim() - 1)
                        x = x.reshape(x.shape[0], *[1] * ones, *x.shape[1:])
                elif name != "gate":
                    x = x.expand(info.batch_size, *x.shape)
                moved[i] = x
        return op()(*moved), 0

    return Derivative(setup, backward, vmap, jvp)
