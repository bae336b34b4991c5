"""A way from a part of a pipeline back to the pipeline, which is held weakly."""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["SchedulerOf"]


class SchedulerOf:
    """The present scheduler of a pipeline; in a deep copy of the pipeline, of the copy."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = weakref.ref(pipe)

    def __call__(self) -> Any:
        """Return it, or None."""
        return getattr(self._pipe(), "scheduler", None)

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulerOf:
        pipe = self._pipe()
        return self if pipe is None else SchedulerOf(memo.get(id(pipe), pipe))
