"""Non-reentrant checkpointing of a block that is being differentiated in forward mode.

torch runs the block again during backward, to get the tensors that it didn't keep. By then the
level of torch.func.jvp (or of dual numbers) has ended and its tangents with it: torch raises, as
fewer tensors are saved the second time. Inside `forward_mode` the second run is therefore told the
primals and the tangents, and takes the derivative anew:

    first run    block(dual of p, t)                     inside the level, as always
    second run   torch.func.jvp(block, (p,), (t,))       or in a level of dual numbers of its own

Both save the same tensors, which torch verifies. The reentrant kind has no forward mode and raises.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._autograd import transform
from . import deferred
from .levels import unpack


def generator(
    original: Callable[..., Any], context: Callable[[], Any], *args: Any, **kwargs: Any
) -> Any:
    """Call torch's generator of a checkpoint with a block that can be run again in `context()`."""
    deferred.settle_in((args, kwargs))
    signature = inspect.signature(original)
    block = next(iter(signature.parameters))
    bound = signature.bind(*args, **kwargs)
    given = bound.arguments
    given[block] = _second_run(
        given[block], given.get("args", ()), given.get("kwargs", {}), context
    )
    return _settled(original(*bound.args, **bound.kwargs))


def _settled(steps: Iterator[None]) -> Iterator[None]:
    """Compute what the block has deferred before torch stops to look at what is saved."""
    for step in steps:
        yield step
        deferred.settle(spent=True)


def _second_run(
    function: Callable[..., Any], args: Any, kwargs: Any, context: Callable[[], Any]
) -> Callable[..., Any]:
    """Return what to call for the second run in place of `function`; it ignores its arguments."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    pairs = [unpack(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    where = [i for i, (_, tangent) in enumerate(pairs) if tangent is not None]

    def block(*values: Tensor) -> Any:
        given = [primal for primal, _ in pairs]
        for i, value in zip(where, values, strict=True):
            given[i] = value
        arguments, keywords = pytree.tree_unflatten(given, spec)
        return function(*arguments, **keywords)

    functorch = torch._C._functorch
    level = functorch.maybe_current_level() if transform() is not None else None
    if level is not None:
        pairs = [
            tuple(
                functorch._unwrap_for_grad(x, level) if isinstance(x, Tensor) else x for x in pair
            )
            for pair in pairs
        ]
    primals, tangents = (tuple(pairs[i][j] for i in where) for j in (0, 1))

    def run(*_: Any, **__: Any) -> Any:
        with deferred.in_forward(), context():
            if not where:
                return block()
            if level is not None:
                return torch.func.jvp(block, primals, tangents)
            nested = forward_ad._current_level >= 0
            with contextlib.nullcontext() if nested else forward_ad.dual_level():
                return block(*map(forward_ad.make_dual, primals, tangents))

    return run
