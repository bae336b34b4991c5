"""What both layouts share: following the denoiser's calls, and the form of a replacement."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .session import Session

# Arguments that tell the guided from the unguided pass; the first one given counts.
_CONDITIONING = ("encoder_hidden_states", "class_labels", "pooled_projections")


class Replacement(NamedTuple):
    """An instance attribute to set: `module.<name> = value` while the cache is on."""

    module: nn.Module
    name: str
    value: Callable[..., Any]


def like(original: Callable[..., Any], value: Callable[..., Any]) -> Callable[..., Any]:
    """Give a wrapper the signature and name of what it wraps (pipelines inspect `forward`).

    torch.compile skips the wrapper itself, whose decisions it would otherwise guard on, step by
    step; what the wrapper calls is compiled.
    """
    value = torch.compiler.disable(value, recursive=False)
    functools.update_wrapper(value, original)
    value.fewstep_cache = True  # type: ignore[attr-defined]
    return value


def is_cached(module: nn.Module) -> bool:
    """Whether a replacement of this package sits on the module, also below other wrappers."""
    forward = module.__dict__.get("forward")
    return bool(getattr(forward, "fewstep_cache", False))


def follow(denoiser: nn.Module, session: Session, ignore: tuple[str, ...]) -> list[Replacement]:
    """Open and close a `Call` around the denoiser, and read the `cache_context` names.

    A call that gives one of the arguments in `ignore` runs as if there were no cache: these change
    which blocks run.
    """
    forward = denoiser.forward
    signature = inspect.signature(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if session.closed or session.call is not None:
            return forward(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs).arguments
        if any(given.get(name) is not None for name in ignore):
            return forward(*args, **kwargs)
        conditioning = next((given[n] for n in _CONDITIONING if given.get(n) is not None), None)
        call = session.begin(given.get("timestep"), conditioning)
        try:
            result = forward(*args, **kwargs)
        except BaseException:
            session.abort()
            raise
        session.finish(call)
        return result

    replacements = [Replacement(denoiser, "forward", like(forward, run))]
    open_context = getattr(denoiser, "cache_context", None)
    if open_context is not None:

        @contextmanager
        def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
            outer, session.context = session.context, name
            try:
                with open_context(name, *args, **kwargs) as value:
                    yield value
            finally:
                session.context = outer

        replacements.append(
            Replacement(denoiser, "cache_context", like(open_context, cache_context))
        )
    return replacements
