"""How a registered op gets its derivatives, and why it is not done with register_autograd.

`register(..., derivative=Derivative(setup_context, backward))` gives an op a backward. What the op
then answers to, and by which way (docs/adr/0002-forward-mode.md):

    eager, nothing differentiable       the bare op
    eager, anything differentiable      an autograd.Function around the bare op: plain autograd,
                                        torch.func.grad, vjp, vmap, jacrev, duals if `jvp` is given
    traced by torch.compile             the bare op; its kernel at the Autograd key applies the same
                                        Function, and AOTAutograd traces forward and backward
    the bare op under torch.func        DerivativeError, where a derivative would be lost

An op's file needs about ten lines:

    def _setup(ctx, inputs, output):            # inputs as in the schema, impl last
        x, weight, eps, _ = inputs
        ctx.save_for_backward(x, weight)        # and ctx.save_for_forward(...) if there is a jvp
        ctx.eps = eps

    def _backward(ctx, d_y):                    # gradients of the leading inputs; the rest is None
        x, weight = ctx.saved_tensors
        return norm_backward(d_y, x, weight, eps=ctx.eps)

    _op = register("norm", SCHEMA, IMPLEMENTATIONS, _fake, Derivative(_setup, _backward))

`_backward` calls the public function of another op, which may have a derivative of its own: that is
all there is to double backward. An op without a fused backward declares `composite(formula)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


class DerivativeError(RuntimeError):
    """An op was about to lose a derivative: it has no rule for the mode that reached it."""


@dataclass(frozen=True)
class Derivative:
    """The rules of an op, as the methods of torch.autograd.Function of the same names.

    setup_context   (ctx, inputs, output); inputs as the schema lists them
    backward        (ctx, *cotangents) -> gradients of the inputs, in order; missing ones are None.
                    Reads ctx.saved_tensors once: a checkpoint hands them out once
    vmap            (info, in_dims, *inputs) -> (output, out_dims); None: one call per element
    jvp             (ctx, saved, *tangents) -> tangents of the outputs, where saved is what
                    ctx.save_for_forward was given; None: a tangent raises
    """

    setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    backward: Callable[..., Any]
    vmap: Callable[..., tuple[Any, Any]] | None = None
    jvp: Callable[..., Any] | None = None


def has_tangent(x: Tensor) -> bool:
    """Return whether `x` carries a forward-mode tangent at the current level."""
    try:
        return torch._VF._unpack_dual(x, level=0)[1] is not None  # type: ignore[attr-defined]
    except RuntimeError:
        # A tensor of the old vmap (torch.autograd.grad(is_grads_batched=True)) can't be asked. Its
        # elements come to the bare op one by one, and are asked there.
        return False


def tensors_of(args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors among the arguments, those of lists too."""
    found = []
    for x in args:
        if isinstance(x, Tensor):
            found.append(x)
        elif type(x) in (list, tuple):
            found += tensors_of(x)
    return found


def transform() -> Any:
    """Return the innermost torch.func transform around the caller, or None."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return None if interpreter is None else interpreter.key()


def is_differentiated(args: Sequence[Any]) -> bool:
    """Return whether a call with `args` is one that someone may differentiate or batch."""
    active = transform()
    if active is not None:
        # functionalize has no rule for Functions; below it the bare op comes to its own kernel.
        return active != torch._C._functorch.TransformType.Functionalize
    tensors = tensors_of(args)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return forward_ad._current_level >= 0 and any(map(has_tangent, tensors))


def differentiable(
    name: str,
    forward: Callable[..., Any],
    count: int,
    derivative: Derivative | None,
    shortcut: tuple[Callable[[Sequence[Any]], bool], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """Return `forward`, a function of `count` arguments, with the derivatives declared.

    `shortcut` is (applies, run): run(*args) computes the same wherever applies(args), which asks
    that nothing is differentiated or traced. The attribute `function` of the result is the
    autograd.Function that it goes through where something is differentiated, None without
    `derivative`: `forward` has to raise then.
    """
    function = None
    applies, run = shortcut or (lambda args: False, forward)

    def call(*args: Any) -> Any:
        # While torch.compile traces, a Function with a jvp rule would be refused or inlined. The
        # bare op stays whole; its kernel at the Autograd key brings the Function to AOTAutograd.
        if torch.compiler.is_compiling():
            return forward(*args)
        if applies(args):
            return run(*args)
        if function is None or not is_differentiated(args):
            return forward(*args)
        return function.apply(*args)

    if derivative is not None:
        function = _new_function(name, forward, count, call, derivative)
    call.function, call.derivative = function, derivative  # type: ignore[attr-defined]
    return call


def _new_function(
    name: str, forward: Callable[..., Any], count: int, call: Callable[..., Any], rules: Derivative
) -> Any:
    below = forward

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return below(*args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            rules.setup_context(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
            gradients = rules.backward(ctx, *cotangents)
            if not isinstance(gradients, tuple):
                gradients = (gradients,)
            return (*gradients, *[None] * (count - len(gradients)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            if rules.jvp is None:
                raise DerivativeError(
                    f"fewstep.ops.{name} has no forward-mode rule: an input carries a tangent, "
                    "which would be lost. Detach the input, or use an op that takes tangents "
                    "explicitly"
                )
            # torch turns forward mode off around this call, for outer levels too, whose tangents
            # would silently be zero (nested torch.func.jvp, torch 2.13); on again, the saved inputs
            # carry this level's tangent, which has to come off.
            with forward_ad._set_fwd_grad_enabled(True):
                saved = [
                    x if x is None else forward_ad.unpack_dual(x).primal for x in ctx.saved_tensors
                ]
                return rules.jvp(ctx, saved, *tangents)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
            if rules.vmap is not None:
                return rules.vmap(info, in_dims, *args)
            return loop_vmap(call, info, in_dims, *args)

    _Function.__name__ = _Function.__qualname__ = name.title().replace("_", "")
    return _Function


def loop_vmap(
    call: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any
) -> tuple[Any, Any]:
    """Batch `call` by calling it once per element: the vmap rule of last resort."""
    if info.batch_size == 0:
        raise ValueError("vmap: expected a batch of at least one element, got 0")
    results = [
        call(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(x) for x in zip(*results, strict=True)), (0,) * len(results[0])


def pull_back(
    formula: Callable[..., Any],
    args: Sequence[Any],
    cotangents: Sequence[Tensor | None],
    wanted: Sequence[int],
) -> list[Any]:
    """Return the gradients of `formula(*args)` for the arguments at `wanted`; None elsewhere."""
    function, values = _in_arguments(formula, args, wanted)
    outputs, pull = torch.func.vjp(function, *values)
    found = pull(
        tuple(
            torch.zeros_like(o) if c is None else c
            for o, c in zip(outputs, cotangents, strict=True)
        )
    )
    gradients: list[Any] = [None] * len(args)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def push_forward(
    formula: Callable[..., Any], args: Sequence[Any], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """Return the tangents of the outputs of `formula(*args)` along `tangents`, one per argument.

    The pullback u -> J^T u is linear, so its own pullback is t -> J t. torch.func.jvp can't be
    entered inside a level of dual numbers, which is where this may be called.
    """
    wanted = [i for i, t in enumerate(tangents) if t is not None]
    function, values = _in_arguments(formula, args, wanted)
    outputs, pull = torch.func.vjp(function, *values)
    _, push = torch.func.vjp(pull, tuple(torch.zeros_like(o) for o in outputs))
    return push(tuple(t for t in tangents if t is not None))[0]


def _in_arguments(
    formula: Callable[..., Any], args: Sequence[Any], wanted: Sequence[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """Return the formula as a function of the arguments at `wanted`, and the values of those."""

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = list(args)
        for i, value in zip(wanted, values, strict=True):
            arguments[i] = value
        outputs = formula(*arguments)
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)

    return function, [args[i] for i in wanted]


def composite(formula: Callable[..., Any]) -> Derivative:
    """Return rules that differentiate `formula`, which computes the op with torch's own operators.

    `formula` takes the op's arguments and returns its outputs in shape and dtype. It is evaluated
    again for each derivative, and is differentiable to any order. For ops without a fused form.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        del output
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.rest = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.set_materialize_grads(False)

    def arguments(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
        return [rest if x is None else x for x, rest in zip(saved, ctx.rest, strict=True)]

    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        return tuple(pull_back(formula, arguments(ctx, ctx.saved_tensors), cotangents, wanted))

    def jvp(ctx: Any, saved: Sequence[Tensor | None], *tangents: Tensor | None) -> Any:
        found = push_forward(formula, arguments(ctx, saved), tangents)
        return found if len(found) > 1 else found[0]

    return Derivative(setup_context, backward, None, jvp)
