"""What all layouts share: following the denoiser's calls, and the form of a replacement."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from .calls import Call
from .inputs import CONDITIONING, entry_of, form_of, input_of, time_of
from .session import Session


class Replacement(NamedTuple):
    """An instance attribute to set: `module.<name> = value` while the cache is on."""

    module: nn.Module
    name: str
    value: Callable[..., Any]


def uncompiled(call: Callable[..., Any]) -> Callable[..., Any]:
    """Keep torch.compile out of a `__call__`, but not out of what it calls.

    It would otherwise guard on the wrapper's decisions, step by step.
    """
    return torch.compiler.disable(call, recursive=False)


class Wrapped:
    """A method of one instance, with the signature and name of what it wraps (pipelines inspect
    `forward`).

    An object rather than a closure, so that a deep or pickled copy of the module gets one that
    calls the copy: `below` is a bound method, and `session` is copied once for all wrappers of a
    model.
    """

    always = False  # whether the module runs on skipped steps too

    def __init__(self, below: Callable[..., Any], session: Session) -> None:
        functools.update_wrapper(self, below)
        self.below, self.session = below, session
        self.fewstep_cache = True  # in `__dict__`, which those who wrap this copy to theirs

    def __getstate__(self) -> dict[str, Any]:
        """Name the module's own method, which pickle would look up on an unfinished copy."""
        state = {name: value for name, value in self.__dict__.items() if name != "__wrapped__"}
        below = self.below
        if isinstance(below, MethodType):
            name = below.__func__.__name__
            if getattr(type(below.__self__), name, None) is below.__func__:
                state["below"] = _Method(below.__self__, name)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.below, _Method):
            owner, name = self.below
            self.below = MethodType(getattr(type(owner), name), owner)
        self.__wrapped__ = self.below


class _Method(NamedTuple):
    """A method that an object has of its class."""

    owner: Any
    name: str


def is_cached(module: nn.Module) -> bool:
    """Whether a replacement of this package sits on the module, also below other wrappers."""
    forward = module.__dict__.get("forward")
    return bool(getattr(forward, "fewstep_cache", False))


class Followed(Wrapped):
    """The denoiser's `forward`: opens and closes a `Call`."""

    def __init__(self, below: Callable[..., Any], session: Session, ignore: tuple[str, ...]):
        super().__init__(below, session)
        self.ignore = ignore
        self.parameters = inspect.signature(below)

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        if session.closed or session.call is not None:
            return self.below(*args, **kwargs)
        given = self.parameters.bind_partial(*args, **kwargs).arguments
        if any(given.get(name) is not None for name in self.ignore):
            return self.below(*args, **kwargs)
        conditioning = next((given[n] for n in CONDITIONING if given.get(n) is not None), None)
        whole = input_of(given)
        entry = entry_of(whole)
        call = session.begin(time_of(given), conditioning, form_of(whole, entry), self)
        call.entry = call.given = entry
        call.arguments = given
        try:
            session.enter(call)
            result = self.run(call, args, kwargs)
        except BaseException:
            session.abort()
            raise
        session.finish(call)
        while session.after_call:
            session.after_call.pop()()
        return result

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Evaluate the model; what sits on its blocks skips some of them."""
        return self.below(*args, **kwargs)


def follow(
    denoiser: nn.Module,
    session: Session,
    ignore: tuple[str, ...],
    kind: type[Followed] = Followed,
) -> list[Replacement]:
    """Open and close a `Call` around the denoiser.

    A call that gives one of the arguments in `ignore` runs as if there were no cache: these change
    which blocks run.
    """
    return [Replacement(denoiser, "forward", kind(denoiser.forward, session, ignore))]
