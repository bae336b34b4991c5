"""A way from a part of a pipeline back to its scheduler; the pipeline is held weakly."""

from __future__ import annotations

import copy
import weakref
from typing import Any

__all__ = ["GuidanceOf", "SchedulerHeld", "SchedulerOf"]


class SchedulerOf:
    """The present scheduler of a pipeline; in a deep copy of the pipeline, of the copy."""

    name = "scheduler"

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __call__(self) -> Any:
        """Return it, or None."""
        return getattr(self._pipe(), self.name, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerOf:
        pipe = self._pipe()
        return self if pipe is None else type(self)(memo.get(id(pipe), pipe))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the scheduler, not the pipeline: a model's file would hold all of that."""
        return SchedulerHeld, (self(),)


class SchedulerHeld:
    """One scheduler.

    Args:
        scheduler: the object, or None.
        shared: deep copies have this very object, too.
    """

    def __init__(self, scheduler: Any, shared: bool = False) -> None:
        self._scheduler, self._shared = scheduler, shared

    def __call__(self) -> Any:
        """Return it."""
        return self._scheduler

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerHeld:
        own = self._scheduler if self._shared else copy.deepcopy(self._scheduler, memo)
        return SchedulerHeld(own, self._shared)


class GuidanceOf(SchedulerOf):
    """The guidance scale of a pipeline's present call."""

    name = "guidance_scale"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle nothing: a model in a file belongs to no call."""
        return SchedulerHeld, (None,)
