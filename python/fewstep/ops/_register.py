"""Registration with torch.library: schema, fake and kernel from Python, and the derivative guard.

Measured on torch 2.13: a registered op without derivative rules returns all-zero tangents under
`torch.func.jvp`, and an output without a graph in reverse mode. Both look plausible in a loss
curve. So every op gets a kernel at the Autograd key that raises when an input carries a tangent or
requires grad, and otherwise redispatches below autograd (docs/adr/0002-forward-mode.md). An op that
declares its derivative (`_autograd.py`) raises only where that derivative can't be taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._autograd import Derivative, DerivativeError, differentiable, has_tangent, tensors_of
from ._autograd import transform as active_transform
from ._select import Implementation, UnsupportedError

NAMESPACE = "fewstep"
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
_PLAIN_KEYS = frozenset(
    ["ADInplaceOrView", "BackendSelect"]
    + [kind + device for kind in ("", "Autograd", "Autocast") for device in ("CPU", "CUDA")]
)
_CPU_KEYS = frozenset(key for key in _PLAIN_KEYS if "CUDA" not in key)
_plain_keys: dict[int, bool] = {}
_cpu_keys: dict[int, bool] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def any_tangent(args: Sequence[Any]) -> bool:
    """Return whether any tensor in `args` carries a tangent at the current level."""
    return any(x.is_floating_point() and has_tangent(x) for x in tensors_of(args))


def refuse_derivatives(op: str, args: Sequence[Any]) -> None:
    """Raise DerivativeError if any tensor in `args` carries a tangent or needs a gradient."""
    for value in tensors_of(args):
        if not value.is_floating_point():
            continue
        if has_tangent(value):
            raise DerivativeError(
                f"fewstep.ops.{op} has no forward-mode rule: an input carries a tangent, which "
                "would be lost. Detach the input, or use an op that takes tangents explicitly"
            )
        if torch.is_grad_enabled() and value.requires_grad:
            raise DerivativeError(
                f"fewstep.ops.{op} has no backward here: an input requires grad, and its gradient "
                "would be lost. Call it under torch.no_grad() or on detached inputs"
            )


def is_plain(args: Sequence[Any], cpu: bool = False) -> bool:
    """Return whether nothing stands between this call and its kernel but torch's dispatcher.

    With `cpu`, whether all of the arguments are tensors with memory on the CPU or None, too.

    The way through it, with two kernels in Python, costs 20 us a call: as much as the arithmetic of
    a small layer. Nobody may want to see or differentiate the op, and the tensors must hold their
    own numbers. Modes of dispatch, transforms and tracing put keys of theirs into the thread's set.

    Few questions to torch, in loops instead of generators: a call finds the caches full of
    matrices, and each function met for the first time then costs microseconds.
    """
    if (
        not _are_plain(torch._C._dispatch_tls_local_include_set())
        or torch._C._len_torch_function_stack()
        or torch.autograd.profiler._is_profiler_enabled
        or forward_ad._current_level >= 0
    ):
        return False
    known, allowed = (_cpu_keys, _CPU_KEYS) if cpu else (_plain_keys, _PLAIN_KEYS)
    for x in args:
        if x is None or not (cpu or isinstance(x, Tensor)):
            continue
        if not (
            type(x) in _PLAIN_TYPES
            and _are_plain(torch._C._dispatch_keys(x), known, allowed)
            and not (x.requires_grad and torch.is_grad_enabled())
        ):
            return False
    return True


def _are_plain(
    keys: Any, known: dict[int, bool] = _plain_keys, allowed: frozenset[str] = _PLAIN_KEYS
) -> bool:
    """Return whether these are keys of a tensor with memory on a CPU or CUDA device, or of no one.

    `known` holds earlier answers by the keys' bits; `allowed` are the keys it may have.

    Views of -x, efficient zeros, and the wrappers of vmap, functionalize and of ended transforms
    are torch.Tensors too, most without memory of their own.
    """
    bits = keys.raw_repr()
    plain = known.get(bits)
    if plain is None:
        names = str(keys).removeprefix("DispatchKeySet(").removesuffix(")").split(", ")
        known[bits] = plain = allowed.issuperset(names)
    return plain


def register(
    op: str,
    schema: str,
    implementations: Sequence[Implementation],
    fake: Callable[..., Any],
    derivative: Derivative | None = None,
) -> Callable[..., Any]:
    """Define `fewstep::<op>` and return what the public function calls.

    `schema` is "(Tensor x, ..., str impl) -> ..."; its last argument names the implementation,
    which the public function has selected. `fake` takes the same arguments. Without `derivative`
    the op raises DerivativeError wherever it is differentiated.
    """

    runs = {candidate.name: candidate.run for candidate in implementations}

    def kernel(*args: Any) -> Any:
        return runs[args[-1]](*args[:-1])

    def at_autograd(keyset: Any, *args: Any) -> Any:
        wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors_of(args))
        if function is None or active_transform() is not None or any_tangent(args):
            refuse_derivatives(op, args)
        elif wants_gradient:
            return function.apply(*args)
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    _library.define(f"{op}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    overload = getattr(getattr(torch.ops, NAMESPACE), op).default
    _library.impl(op, kernel, "CompositeExplicitAutograd")
    _library.impl(op, at_autograd, "Autograd", with_keyset=True)
    torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=_library)
    function = None

    count = len(overload._schema.arguments)
    lists = any(str(x.type).startswith("List") for x in overload._schema.arguments)
    plain = (lambda args: is_plain(tensors_of(args))) if lists else is_plain

    def at_batched(*args: Any) -> Any:
        raise UnsupportedError(
            f"fewstep.ops.{op}: torch.vmap can't batch lists of tensors: put the axis among the "
            "rows of an input, or call an op that takes one problem"
        )

    if lists:  # torch's fallback, a call for each element, has no lists either
        _library.impl(op, at_batched, "FuncTorchBatched")
    call = differentiable(op, overload, count, derivative, (plain, kernel))
    function = call.function
    return call
