"""What the low-bit products share: operands as matrices, the low-rank branch, derivatives, checks.

    y_mn = sum_k x_mk W_nk + bias_n + sum_r low_mr up_nr           low = x down^T

x     [..., M, K]   floating; or, with integers a and a scale per row, x = a * a_scale
W     [N, K]        what the op's docstring makes of w and w_scale
bias  [N]           floating
up    [N, R]        floating: with it there is a low-rank branch, and one of
down  [R, K]        x's dtype: low is then torch's own product, in x's dtype, or
low   [..., M, R]   floating: computed before, as where x is given as integers

The branch holds what quantising a weight would lose of its largest directions (SVDQuant, arXiv
2411.05007), or a LoRA. Its products are added in float32: in gemm_w8a8 and gemm_w4a8 one by one to
what the bias leaves, in gemm_w4a16 to partial sums of the product. With the op's own bound e,
before the rounding to out_dtype,

    |y - exact| <= e + (R + 6) 2^-24 (|exact| + sum_r |low_mr up_nr|).

Derivatives take the rounding of x for the identity (straight-through), W and the scales for
constants: d_x = d_y W + (d_y up) down. That is what trains a LoRA over a quantised layer, and the
exact tangent of the dequantised one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from .. import _native
from ._autograd import Derivative, DerivativeError, loop_vmap
from ._derived import is_stale
from ._register import register
from ._select import Implementation, refuse_native, refuse_triton
from .quantize_int8 import run_triton as quantize_triton

MAX_K = 1 << 17
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INPUTS = (torch.int8, *FLOATS)
SCHEMA = (
    "(Tensor a, Tensor? a_scale, Tensor w, Tensor w_scale, Tensor? bias, Tensor? packed,"
    " Tensor? down, Tensor? up, Tensor? low, ScalarType out_dtype, str impl) -> Tensor"
)


class Operands(NamedTuple):
    """What an implementation of a product with 8-bit activations gets, in the schema's order."""

    a: Tensor
    a_scale: Tensor | None
    w: Tensor
    w_scale: Tensor
    bias: Tensor | None
    packed: Tensor | None
    down: Tensor | None
    up: Tensor | None
    low: Tensor | None
    out_dtype: torch.dtype

    def new_output(self) -> Tensor:
        """Return an output [..., M, N]."""
        return self.a.new_empty((*self.a.shape[:-1], self.w.shape[0]), dtype=self.out_dtype)

    def flat(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Return a as [M, K], a_scale as [M], and a new output with a view of it as [M, N]."""
        a, a_scale, out = self.a, self.a_scale, self.new_output()
        if len(a.shape) == 2:  # saves calls, which are dear once the caches are full of matrices
            return unit_stride(a), contiguous(a_scale), out, out
        if a_scale is not None:
            a_scale = a_scale.reshape(-1).contiguous()
        return unit_stride(matrix(a)), a_scale, out, matrix(out)

    def branch(self) -> tuple[Tensor | None, Tensor | None]:
        """Return low as [M, R] and up, both contiguous, or (None, None) without a branch."""
        if self.up is None:
            return None, None
        return matrix(project(self.a, self.down, self.low)).contiguous(), self.up.contiguous()


def project(x: Tensor, down: Tensor | None, low: Tensor | None) -> Tensor:
    """Return low [..., M, R]: the one given, or x down^T in x's dtype."""
    if low is not None:
        return low
    assert down is not None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return F.linear(x, down)
    return F.linear(x, down)


def matrix(x: Tensor) -> Tensor:
    """Return x [..., K] as [M, K]."""
    # Not reshape(-1, ...): an axis of size 0 leaves -1 open.
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_stride(x: Tensor) -> Tensor:
    """Return x with neighbours in its last axis side by side."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return x contiguous, None for None."""
    return None if x is None else x.contiguous()


def expect(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Refuse a tensor of another shape, dtype or device than the first operand asks for."""
    if x is None:
        return
    if x.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(x.shape)}")
    if x.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name}: expected {wanted}, got {x.dtype}")
    if x.device != device:
        raise ValueError(
            f"{name}: expected the device of the activations, {device}, got {x.device}"
        )


def expect_branch(
    x: Tensor, N: int, down: Tensor | None, up: Tensor | None, low: Tensor | None
) -> None:
    """Refuse a low-rank branch that is not whole or does not fit."""
    if up is None:
        for name, given in (("down", down), ("low", low)):
            if given is not None:
                raise ValueError(f"{name}: expected none without up, got {list(given.shape)}")
        return
    if up.dim() != 2:
        raise ValueError(f"up: expected [N, R], got {list(up.shape)}")
    if (down is None) == (low is None):
        raise ValueError(
            f"down, low: expected one of them with up, got {'none' if low is None else 'both'}"
        )
    R, device = up.shape[1], x.device
    expect("up", up, (N, R), FLOATS, device)
    expect("low", low, (*x.shape[:-1], R), FLOATS, device)
    if down is not None and not x.is_floating_point():
        raise ValueError(f"down: expected low instead, because a is {x.dtype}, got down")
    expect("down", down, (R, x.shape[-1]), (x.dtype,), device)


def expect_operands(
    p: Operands, weight_shape: tuple[int, ...], packed_shape: tuple[int, ...]
) -> None:
    """Check everything but w itself: its op does."""
    a, a_scale, w, _, bias, packed, down, up, low, out_dtype = p
    if not a.shape or a.dtype not in (FLOATS if a_scale is None else (torch.int8,)):
        wanted = "floating" if a_scale is None else "torch.int8"
        raise ValueError(f"a: expected {wanted} [..., M, K], got {a.dtype} {list(a.shape)}")
    (*rows, K), N, device = a.shape, w.shape[0], a.device
    expect("w", w, weight_shape, (w.dtype,), device)
    expect("a_scale", a_scale, tuple(rows), (torch.float32,), device)
    expect("bias", bias, (N,), FLOATS, device)
    expect("packed", packed, packed_shape, (torch.uint8,), device)
    expect_branch(a, N, down, up, low)
    if K >= MAX_K:
        raise ValueError(f"a: expected K below {MAX_K} for exact int32 sums, got {K}")
    if out_dtype not in FLOATS:
        raise ValueError(f"out_dtype: expected float32, bfloat16 or float16, got {out_dtype}")


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
    returns W in float32, `op()` the registered op. Of the other inputs only bias, down, up and low
    have a derivative; the rest refuse one.
    """
    order = ("x", *names.split()[1:])
    constant = [i for i, name in enumerate(order) if name not in Linear._fields]
    rowwise = ("x", "a_scale", "low")

    def refuse(given: Any) -> None:
        for i in constant:
            if given[i]:
                raise DerivativeError(
                    f"{order[i]}: expected a constant, got one that requires grad or carries a "
                    "tangent, which would be lost: a quantised operand has no derivative"
                )

    def linear(values: Any) -> Linear:
        given = dict(zip(order, values, strict=False))
        return Linear(*(given.get(name) for name in Linear._fields))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        refuse(ctx.needs_input_grad)
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(*tensors)
        # Only the branch's own gradients need x: else a frozen layer would keep it alive.
        wanted = dict(zip(order, ctx.needs_input_grad, strict=False))
        if not (wanted["up"] or wanted["down"]):
            tensors[0] = None
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.out_dtype = output.shape, output.dtype
        given = zip(order, inputs, strict=False)
        ctx.dtypes = {name: x.dtype for name, x in given if isinstance(x, Tensor)}

    def backward(ctx: Any, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
        if d_y is None:
            return (None,)
        saved = ctx.saved_tensors
        p, needs = linear(saved), dict(zip(order, ctx.needs_input_grad, strict=False))
        gradients: dict[str, Tensor] = {}
        d_low = None if p.up is None else d_y @ p.up.to(d_y.dtype)
        if needs["x"]:
            gradients["x"] = d_y @ weight(*saved).to(d_y.dtype)
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
        return tuple(
            gradients[name].to(ctx.dtypes[name]) if name in gradients else None for name in order
        )

    def jvp(ctx: Any, saved: Any, *tangents: Any) -> Tensor:
        refuse([t is not None for t in tangents])
        p, t = linear(saved), linear(tangents)
        terms = []
        if t.x is not None:
            terms.append(F.linear(t.x, weight(*saved).to(t.x.dtype)))
        if t.bias is not None:
            terms.append(t.bias.expand(ctx.shape))
        if p.up is not None:
            t_low = [t.low] if t.low is not None else []
            if p.down is not None and t.x is not None:
                t_low.append(F.linear(t.x, p.down))
            if t.down is not None:
                t_low.append(F.linear(p.x, t.down))
            terms += [F.linear(low, p.up.to(low.dtype)) for low in t_low]
            if t.up is not None:
                terms.append(F.linear(project(p.x, p.down, p.low).to(t.up.dtype), t.up))
        return sum(term.float() for term in terms).to(ctx.out_dtype)

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
                batched = dim is not None
                moved[i] = x.movedim(dim, 0) if batched else x.expand(info.batch_size, *x.shape)
        return op()(*moved), 0

    return Derivative(setup, backward, vmap, jvp)


def register_int8_product(
    name: str,
    *,
    reference: Callable[..., Tensor],
    pack: Callable[[Operands], Tensor],
    launcher: Callable[[], Callable[..., None]],
    weight: Callable[[Operands], Tensor],
) -> tuple[tuple[Implementation, ...], Callable[..., Tensor]]:
    """Return the implementations of a product with 8-bit activations, and the registered op.

    Args:
        name: of the op and of its native kernel.
        reference: the formula, with the public function's arguments.
        pack: the weight as the CPU kernel reads it, where the call brings none.
        launcher: imports and returns the Triton kernel's launch function.
        weight: W in float32, for the derivatives.
    """

    def run_reference(*args: Any) -> Tensor:
        p = Operands(*args)
        branch = {"down": p.down, "up": p.up, "low": p.low}
        return reference(
            p.a, p.a_scale, p.w, p.w_scale, bias=p.bias, **branch, out_dtype=p.out_dtype
        )

    def run_native(*args: Any) -> Tensor:
        p = Operands(*args)
        a, a_scale, out, rows = p.flat()
        known = p.packed is not None and not is_stale(p.packed, p.w, p.w_scale)
        packed = p.packed.contiguous() if known else pack(p)
        bias, w_scale = contiguous(p.bias), p.w_scale.contiguous()
        _native.call(name, a, a_scale, packed, w_scale, bias, *p.branch(), rows)
        return out

    def run_triton(*args: Any) -> Tensor:
        p = Operands(*args)
        branch = p.branch()
        if p.a_scale is None:
            a, a_scale = quantize_triton(p.a)
            p = p._replace(a=a, a_scale=a_scale)
        a, a_scale, out, rows = p.flat()
        if out.numel():
            w, w_scale, bias = p.w.contiguous(), p.w_scale.contiguous(), contiguous(p.bias)
            launcher()(a, a_scale, w, w_scale, bias, *branch, rows)
        return out

    def fake(*args: Any) -> Tensor:
        return Operands(*args[:-1]).new_output()

    def weight_of(*inputs: Any) -> Tensor:
        return weight(Operands._make(inputs[: len(Operands._fields)]))

    ways = (
        Implementation("native", run_native, lambda a, *_, **__: refuse_native(name, [a], INPUTS)),
        Implementation("triton", run_triton, lambda a, *_, **__: refuse_triton([a], INPUTS)),
        Implementation("reference", run_reference, lambda *_, **__: None),
    )
    names = " ".join(Operands._fields[:-1])
    op = register(name, SCHEMA, ways, fake, differentiate(names, weight_of, lambda: op))
    return ways, op


def gate_layers(
    device: torch.device, weight: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]]
) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return gate cases as layers call: many rows of floating x, a 16-bit branch, 16-bit outputs.

    `weight(N, K, generator)` returns values and scales that make outputs of order one.
    """
    generator = torch.Generator().manual_seed(1)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    M, N, K, R = 600, 96, 192, 16
    for dtype in FLOATS[1:]:
        w, w_scale = (x.to(device) for x in weight(N, K, generator))

        def draw(*shape: int, size: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (size * torch.randn(shape, generator=generator)).to(device, dtype)

        branch = {"down": draw(R, K, size=K**-0.5), "up": draw(N, R, size=R**-0.5)}
        # Half a unit of the output twice, where sums fall to different sides, and half a unit of
        # each of R products of order R^-1/2: at most 5 of their deviations.
        unit = torch.finfo(dtype).eps
        case = (draw(M, K), None, w, w_scale), {"bias": draw(N), **branch}, unit, 5 * unit
        cases.append(case)
    return cases
