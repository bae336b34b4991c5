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
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._autograd import transform
from .attention import unpack

_NAME = "_checkpoint_without_reentrant_generator"
_lock = threading.Lock()
_users = 0
_original: Callable[..., Any] | None = None


@contextlib.contextmanager
def remembered(context: Callable[[], Any], is_active: Callable[[], bool]) -> Iterator[None]:
    """Let checkpoints made by threads where `is_active()` run again inside `context()`.

    torch's own generator is replaced while anyone is inside, whoever imported `checkpoint` from
    where, and put back after the last one.
    """
    global _users, _original
    module = torch.utils.checkpoint
    with _lock:
        if _users == 0 and hasattr(module, _NAME):
            _original = getattr(module, _NAME)
            setattr(module, _NAME, _replacement(_original, context, is_active))
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _original is not None:
                setattr(module, _NAME, _original)
                _original = None


def _replacement(
    original: Callable[..., Any], context: Callable[[], Any], is_active: Callable[[], bool]
) -> Callable[..., Any]:
    signature = inspect.signature(original)
    block = next(iter(signature.parameters))

    def generator(*args: Any, **kwargs: Any) -> Any:
        if not is_active():
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        given = bound.arguments
        given[block] = _second_run(
            given[block], given.get("args", ()), given.get("kwargs", {}), context
        )
        return original(*bound.args, **bound.kwargs)

    return generator


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
        with context():
            if not where:
                return block()
            if level is not None:
                return torch.func.jvp(block, primals, tangents)
            nested = forward_ad._current_level >= 0
            with contextlib.nullcontext() if nested else forward_ad.dual_level():
                return block(*map(forward_ad.make_dual, primals, tangents))

    return run
