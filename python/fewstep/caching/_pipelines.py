"""What calibration and training ask of a pipeline, and what they leave as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ._wrap import is_cached

__all__ = [
    "denoiser_of",
    "denoisers_of",
    "expect_calls",
    "only_denoiser_of",
    "same_config",
    "standing_in",
]

_DENOISERS = ("transformer", "unet")


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the model that a pipeline's runs evaluate.

    Raises:
        TypeError: not a pipeline with a model that can be cached.
        ValueError: a compiled model, or one that is cached already.
    """
    component = next(
        (name for name in _DENOISERS if isinstance(getattr(pipe, name, None), nn.Module)), None
    )
    if component is None or not hasattr(getattr(pipe, "scheduler", None), "step"):
        raise TypeError(
            f"pipe: expected a pipeline with a scheduler and one of {', '.join(_DENOISERS)}, got "
            f"{type(pipe).__name__}"
        )
    _expect_plain(getattr(pipe, component), component)
    return getattr(pipe, component)


def denoisers_of(pipe: Any) -> tuple[nn.Module, ...]:
    """Return the models that a pipeline's runs evaluate, one after the other (`transformer_2`).

    Raises:
        TypeError, ValueError: as `denoiser_of`.
    """
    found = [denoiser_of(pipe)]
    for name in _DENOISERS:
        second = getattr(pipe, f"{name}_2", None)
        if found[0] is getattr(pipe, name, None) and isinstance(second, nn.Module):
            _expect_plain(second, f"{name}_2")
            found.append(second)
    return tuple(found)


def only_denoiser_of(pipe: Any) -> nn.Module:
    """Return the model of a pipeline that evaluates one at all steps.

    Raises:
        TypeError, ValueError: as `denoiser_of`; a pipeline with two models.
    """
    found = denoisers_of(pipe)
    if len(found) > 1:
        raise ValueError(
            f"pipe: expected one model for all steps, got {len(found)} that share them in "
            f"{type(pipe).__name__}"
        )
    return found[0]


def _expect_plain(denoiser: nn.Module, component: str) -> None:
    if hasattr(denoiser, "_orig_mod"):
        raise ValueError(
            f"pipe: expected an uncompiled model in pipe.{component}, got "
            f"{type(denoiser).__name__}; calibrate and patch first, then torch.compile"
        )
    if is_cached(denoiser) or getattr(denoiser, "is_cache_enabled", False):
        raise ValueError(
            "pipe: expected a model without a cache, got one that is cached; undo that"
        )


def expect_calls(calls: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the calls as a list.

    Raises:
        ValueError: none, or something else than dicts.
    """
    calls = list(calls)
    if not calls or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError("calls: expected at least one dict of keyword arguments")
    return calls


@contextmanager
def standing_in(stands: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    """Let values stand for attributes of objects; the objects are as they were afterwards.

    Args:
        stands: each an object, an attribute's name and the value. Where they are made one by one,
            each may be made of what those before it have put there.
    """
    before: list[tuple[Any, str, Any]] = []
    missing = object()
    try:
        for owner, name, value in stands:
            before.append((owner, name, owner.__dict__.get(name, missing)))
            owner.__dict__[name] = value
        yield
    finally:
        for owner, name, value in reversed(before):
            if value is missing:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


@contextmanager
def same_config(scheduler: Any) -> Iterator[None]:
    """Undo what runs rewrite in the scheduler's configuration."""
    before = getattr(scheduler, "config", None)
    before = dict(before) if isinstance(before, Mapping) else {}
    try:
        yield
    finally:
        changed = {
            name: value for name, value in before.items() if scheduler.config.get(name) is not value
        }
        if changed:
            scheduler.register_to_config(**changed)
