"""`cache=...`: leave out the denoiser, or its middle blocks, on steps that can be foretold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..caching import (
    OutputStack,
    Plan,
    ScheduledPolicy,
    ScheduledSession,
    Session,
    is_cached,
    resolve_policy,
)
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


def _resolve(cache: Any) -> Any:
    if isinstance(cache, Path) or (isinstance(cache, str) and cache.endswith(".json")):
        return Plan.load(cache)
    return resolve_policy(cache)


def _expect_fit(plan: Plan, target: Target, scheduler: Any) -> None:
    """Raise ValueError where a plan belongs to another pipeline."""
    mark = plan.fingerprint
    if mark is not None and (wrong := mark.differences(target.denoiser, scheduler)):
        raise ValueError(
            f"cache: expected the pipeline that {plan!r} was calibrated on, got another: "
            f"{'; '.join(wrong[:3])}. fewstep.caching.calibrate makes a plan for this one"
        )


def plan_cache(pipe: Any, target: Target, cache: Any, scheduler: Any) -> Change:
    """Plan the replacements of `forward`; nothing is changed yet.

    Args:
        pipe: the pipeline.
        target: its denoiser.
        cache: a preset's name, a policy, a plan or a file with one.
        scheduler: the one that the pipeline will have.

    Raises:
        TypeError, ValueError: not a preset or policy, or a model that it can't serve.
        PatchError: the model is cached already, by this library or by diffusers.
    """
    policy = _resolve(cache)
    if isinstance(policy, Plan):
        _expect_fit(policy, target, scheduler)
    if getattr(policy, "scope", "blocks") == "output":
        target.require_eager("cache")
        target.require_alone("cache")
        layout: Any = OutputStack(target.denoiser)
    else:
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
    kind = ScheduledSession if isinstance(policy, ScheduledPolicy) else Session
    session = kind(policy, SchedulerOf(pipe))
    change = _CacheChange(repr(policy), session)
    change.done.append(layout.describe(session))
    ends = "the first" if kind is ScheduledSession else "the first and the last"
    change.done.append(
        f"{ends} step of an image runs in full; state is per guidance pass and starts anew with "
        "every image"
    )
    names = {id(module): name for name, module in target.denoiser.named_modules()}
    for module, name, value in layout.replacements(session):
        path = f"{names[id(module)]}.{name}".lstrip(".")
        change.slots.append(Slot(module, name, value, f"pipe.{target.component}.{path}"))
    change.left.append("weights, scheduler and step count")
    return change
