"""`cache=...`: skip the middle blocks of the denoiser on steps that barely differ."""

from __future__ import annotations

from typing import Any

from ..caching import Session, is_cached, resolve_policy
from .pipeline import SchedulerOf
from .recognise import Target
from .undo import Change, PatchError, Slot

__all__ = ["plan_cache"]


class _CacheChange(Change):
    def __init__(self, summary: str, session: Session) -> None:
        super().__init__("cache", summary)
        self._session = session

    def undo(self) -> None:
        # A wrapper that somebody else has wrapped stays below theirs: it must do nothing then.
        self._session.close()
        super().undo()

    def report(self) -> dict[str, Any]:
        return self._session.report()


def plan_cache(pipe: Any, target: Target, cache: Any) -> Change:
    """Plan the replacements of `forward`; nothing is changed yet.

    Raises:
        TypeError, ValueError: not a preset or policy, or a model that it can't serve.
        PatchError: the model is cached already, by this library or by diffusers.
    """
    policy = resolve_policy(cache)
    layout = target.layout()
    if is_cached(target.denoiser):
        raise PatchError(
            f"cache: expected a {target.model} without a cache, got one that another pipeline's "
            "patch caches, or a deep copy of such a one; undo that patch before, or before copying"
        )
    if getattr(target.denoiser, "is_cache_enabled", False):
        raise PatchError(
            f"cache: expected a {target.model} without a cache, got one with diffusers' "
            "enable_cache; call disable_cache first"
        )
    session = Session(policy, SchedulerOf(pipe))
    change = _CacheChange(repr(policy), session)
    change.done.append(layout.describe(session))
    change.done.append(
        "the first and the last step of an image run in full; state is per guidance pass and "
        "starts anew with every image"
    )
    names = {id(module): name for name, module in target.denoiser.named_modules()}
    for module, name, value in layout.replacements(session):
        path = f"{names[id(module)]}.{name}".lstrip(".")
        change.slots.append(Slot(module, name, value, f"pipe.{target.component}.{path}"))
    change.left.append("weights, scheduler and step count")
    return change
