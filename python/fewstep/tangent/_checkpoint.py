"""Non-reentrant checkpointing of a block that is being differentiated in forward mode.

torch runs the block again during backward, to get the tensors that it didn't keep. By then the
level of torch.func.jvp (or of dual numbers) has ended and its tangents with it: torch raises, as
fewer tensors are saved the second time. Inside `forward_mode` the second run is therefore told the
primals and the tangents, and takes the derivative anew:

    first run    block(dual of p, t)                     inside the level, as always
    second run   torch.func.jvp(block, (p,), (t,))       or in a level of dual numbers of its own

Both save the same tensors, which torch verifies. The reentrant kind has no forward mode and raises.

Tangents come with the arguments of the block and with what it reads beside them: from a closure, an
attribute, an object among its arguments. The first run notes each such tensor as an operator reads
it; in the second run operators that are handed one of them get its new dual instead. A tensor of
the first that the second doesn't read any more (an attribute that was set again, parameters of
torch.func.functional_call) would lose its tangent: that raises.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.autograd import forward_ad

from ..ops._autograd import DerivativeError, transform
from . import deferred
from .levels import is_forward, unpack


@dataclass
class _Read:
    """A tensor with a tangent that a block was given or has read, and at which of its calls."""

    tensor: Tensor
    primal: Tensor
    tangent: Tensor
    call: int


@dataclass
class _FirstRun:
    """What a block reads: notes tensors that have a tangent and are not of its own making."""

    level: int | None
    reads: list[_Read] = field(default_factory=list)
    known: set[int] = field(default_factory=set)
    calls: int = 0

    def note(self, x: Tensor) -> None:
        self.known.add(id(x))
        primal, tangent = unpack(x)
        if tangent is None:
            return
        if self.level is not None:
            unwrap = torch._C._functorch._unwrap_for_grad
            primal, tangent = (unwrap(v, self.level) for v in (primal, tangent))
        self.reads.append(_Read(x, primal, tangent, self.calls))

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.calls += 1
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.known:
                self.note(x)
        result = function(*args, **kwargs)
        self.known.update(id(x) for x in pytree.tree_leaves(result) if isinstance(x, Tensor))
        return result


@dataclass
class _SecondRun:
    """Stands in for what was read in the first run; `duals` by the id of the tensor it was."""

    duals: dict[int, Tensor]
    seen: set[int] = field(default_factory=set)
    calls: int = 0

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.calls += 1
        leaves, spec = pytree.tree_flatten((args, kwargs))
        found = {id(x) for x in leaves} & self.duals.keys()
        if found:
            self.seen |= found
            args, kwargs = pytree.tree_unflatten([self.duals.get(id(x), x) for x in leaves], spec)
        return function(*args, **kwargs)

    def expect_all(self, reads: list[_Read]) -> None:
        """Raise if a call has been passed that read a tensor in the first run, but didn't here."""
        for read in reads:
            if 0 < read.call <= self.calls and id(read.tensor) not in self.seen:
                raise DerivativeError(
                    "a checkpointed block has read a tensor with a tangent, of shape "
                    f"{list(read.primal.shape)}, that is not one of its arguments, and doesn't "
                    "find it when it is run again: its tangent would be lost. Pass the tensor to "
                    "the block as an argument of torch.utils.checkpoint.checkpoint"
                )


class _Runs(threading.local):
    def __init__(self) -> None:
        self.active: list[_FirstRun | _SecondRun] = []


_runs = _Runs()


@contextlib.contextmanager
def _watched(run: _FirstRun | _SecondRun) -> Iterator[None]:
    _runs.active.append(run)
    try:
        yield
    finally:
        # Not the last one, if an exception has left a generator behind that ends later.
        _runs.active[:] = [other for other in _runs.active if other is not run]


def is_watching() -> bool:
    """Return whether the caller is inside a checkpointed block, of either run."""
    return bool(_runs.active)


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of torch as the checkpointed blocks that the caller is in want it."""
    for run in reversed(_runs.active):  # the outermost comes first
        function = _through(run, function)
    return function(*args, **kwargs)


def _through(run: _FirstRun | _SecondRun, function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: run.call(function, args, kwargs)


def generator(
    original: Callable[..., Any], context: Callable[[], Any], *args: Any, **kwargs: Any
) -> Iterator[Any]:
    """Be torch's generator of a checkpoint with a block that can be run again in `context()`.

    The caller runs the block for the first time where the generator yields.
    """
    deferred.settle_in((args, kwargs))
    signature = inspect.signature(original)
    block = next(iter(signature.parameters))
    bound = signature.bind(*args, **kwargs)
    given = bound.arguments
    level = torch._C._functorch.maybe_current_level() if transform() is not None else None
    first = _FirstRun(level)
    given[block] = _second_run(
        given[block], given.get("args", ()), given.get("kwargs", {}), context, first
    )
    for step in original(*bound.args, **bound.kwargs):
        with _watched(first) if is_forward() else contextlib.nullcontext():
            yield step
        deferred.settle(spent=True)  # before torch stops to look at what is saved


def _second_run(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    context: Callable[[], Any],
    first: _FirstRun,
) -> Callable[..., Any]:
    """Return what to call for the second run in place of `function`; it ignores its arguments."""
    leaves, spec = pytree.tree_flatten((args, kwargs))
    for x in leaves:
        if isinstance(x, Tensor):
            first.note(x)
    unwrap, level = torch._C._functorch._unwrap_for_grad, first.level
    plain = [
        unwrap(unpack(x)[0], level) if isinstance(x, Tensor) and level is not None else x
        for x in leaves
    ]

    def run(*_: Any, **__: Any) -> Any:
        def block(*values: Tensor) -> Any:
            duals = {id(read.tensor): x for read, x in zip(first.reads, values, strict=True)}
            given = [duals.get(id(x), y) for x, y in zip(leaves, plain, strict=True)]
            arguments, keywords = pytree.tree_unflatten(given, spec)
            second = _SecondRun(duals)
            with _watched(second):
                try:
                    result = function(*arguments, **keywords)
                except torch.utils.checkpoint._StopRecomputationError:  # it has all it wanted
                    second.expect_all(first.reads)
                    raise
            second.expect_all(first.reads)
            return result

        primals = tuple(read.primal for read in first.reads)
        tangents = tuple(read.tangent for read in first.reads)
        with deferred.in_forward(), context():
            if not primals:
                return block()
            if level is not None:
                return torch.func.jvp(block, primals, tangents)
            nested = forward_ad._current_level >= 0
            with contextlib.nullcontext() if nested else forward_ad.dual_level():
                return block(*map(forward_ad.make_dual, primals, tangents))

    return run
