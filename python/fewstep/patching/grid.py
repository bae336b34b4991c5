"""A scheduler that takes n steps whatever count it is asked for, and what `strength` makes of that.

    text to image     1, (n-1)/n .. 1/n                    n evaluations of the whole trajectory
    image to image    the last n of N = ceil(n / strength) n evaluations of what is left of it

An image-to-image pipeline of diffusers asks for a count (its default where the caller gives none),
and its `get_timesteps` then leaves out the first 1 - strength of that many: of a grid of n that is
nothing at all or too few. So its `get_timesteps` is replaced on the instance too: the grid is
placed again with N steps, and starts after the first N - n.

State lives on the scheduler object, so that a deep copy of it stays a copy.
"""

from __future__ import annotations

import inspect
import math
import types
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

__all__ = ["StrengthSteps", "fix", "fixed_steps"]

_UNIFORM = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
_FIXED = "_fewstep_fixed"


@dataclass
class _Fixed:
    """The count, and what the last `set_timesteps` gave besides it."""

    steps: int
    given: dict[str, Any] = field(default_factory=dict)
    explicit: bool = False  # a grid that can only come from the caller
    may_begin_later: bool = False


def fixed_steps(scheduler: Any) -> int | None:
    """Return the count that a scheduler is fixed at, or None."""
    fixed = getattr(scheduler, "__dict__", {}).get(_FIXED)
    return None if fixed is None else fixed.steps


def _is_default_grid(sigmas: Sequence[float]) -> bool:
    """Whether a pipeline makes this grid from its step count."""
    n = len(sigmas)
    return bool(
        np.allclose(np.asarray(sigmas, dtype=np.float64), np.linspace(1, 1 / n, n), atol=1e-6)
    )


def fix(scheduler: Any, steps: int) -> Any:
    """Make this scheduler object take n steps; the signatures of its class stay."""
    own = type(scheduler).set_timesteps
    signature = inspect.signature(own)
    scheduler.__dict__[_FIXED] = _Fixed(steps)

    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(signature.bind_partial(self, *args, **kwargs).arguments)
        given.update(given.pop("kwargs", {}))
        given.pop("self")
        given.pop("num_inference_steps", None)
        for name in ("sigmas", "timesteps"):
            grid = given.get(name)
            if grid is None or (name == "sigmas" and _is_default_grid(grid)):
                given.pop(name, None)
                continue
            # SCM counts the final 0.
            expected = steps + (name == "timesteps" and "max_timesteps" in signature.parameters)
            if len(grid) != expected:
                raise ValueError(
                    f"{name}: expected {expected} values, because the pipeline is patched with "
                    f"steps={steps}, got {len(grid)}"
                )
        fixed = self.__dict__[_FIXED]
        fixed.given = given
        fixed.explicit = "sigmas" in given or "timesteps" in given
        _place(self, steps)

    set_timesteps.__signature__ = signature  # type: ignore[attr-defined]
    set_timesteps.__doc__ = f"Take {steps} steps, whatever count is asked for."
    # Bound methods, so that a deep copy of the scheduler stays a copy.
    scheduler.__dict__["set_timesteps"] = types.MethodType(set_timesteps, scheduler)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.__dict__["set_begin_index"] = types.MethodType(_set_begin_index, scheduler)
    return scheduler


def _place(scheduler: Any, count: int) -> None:
    """Put the grid of `count` steps, with the arguments of the last `set_timesteps`."""
    own, fixed = type(scheduler).set_timesteps, scheduler.__dict__[_FIXED]
    given = dict(fixed.given)
    if "intermediate_timesteps" in inspect.signature(own).parameters:  # SCM
        if count != 2 or fixed.explicit:
            given["intermediate_timesteps"] = None
        given["num_inference_steps"] = count
    elif not fixed.explicit and type(scheduler).__name__ in _UNIFORM:
        given["sigmas"] = np.linspace(1.0, 1 / count, count).tolist()
    elif not fixed.explicit:
        given["num_inference_steps"] = count
    own(scheduler, **given)


def _set_begin_index(self: Any, begin_index: int = 0) -> None:
    """Start later in the grid: refused where that would leave steps out unnoticed."""
    fixed = self.__dict__[_FIXED]
    if begin_index and not (fixed.may_begin_later or fixed.explicit):
        raise ValueError(
            f"steps: expected a pipeline that starts at the first of its {fixed.steps} steps, got "
            f"one that starts at index {begin_index}. The scheduler comes from another pipeline, "
            f"patched with steps={fixed.steps}: call fewstep.patch(pipe, steps=...) on the one "
            "that you call"
        )
    type(self).set_begin_index(self, begin_index)


class StrengthSteps:
    """`get_timesteps` of an image-to-image pipeline: n evaluations whatever the strength.

    Two cases are left to the pipeline's own rule: a grid that the caller gave, and SDXL's
    `denoising_start`, which tells where another pipeline has stopped on the same grid.
    """

    def __init__(self, pipe: Any, steps: int) -> None:
        self._pipe, self._steps = weakref.ref(pipe), steps
        self.__signature__ = inspect.signature(pipe.get_timesteps)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the class's `get_timesteps` does: timesteps and their count."""
        pipe = self._pipe()
        own = type(pipe).get_timesteps
        given = inspect.signature(own).bind(pipe, *args, **kwargs).arguments
        scheduler, strength = pipe.scheduler, given["strength"]
        fixed = scheduler.__dict__.get(_FIXED)
        if fixed is None:  # somebody has set another scheduler since
            return own(**given)
        fixed.may_begin_later = True
        try:
            whole = given.get("denoising_start") is not None or "sigmas" in given
            if fixed.explicit or whole or strength <= 0:
                return own(**{**given, "num_inference_steps": self._steps})
            return self._last(scheduler, strength, "timesteps" not in given)
        finally:
            fixed.may_begin_later = False

    def _last(self, scheduler: Any, strength: float, begins: bool) -> tuple[Any, int]:
        steps = self._steps
        count = max(steps, math.ceil(steps / strength - 1e-9))
        most = scheduler.config.get("num_train_timesteps", count)
        if count > most:
            raise ValueError(
                f"strength: expected at least {steps / most:g} for steps={steps}, got {strength}"
            )
        if count > steps:
            try:
                _place(scheduler, count)
            except Exception as error:
                raise ValueError(
                    f"strength: expected one from which {type(scheduler).__name__} can take "
                    f"{steps} of {count} steps, got {strength}: {error}"
                ) from error
        start = (count - steps) * scheduler.order
        if begins and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)
        return scheduler.timesteps[start:], steps

    def __deepcopy__(self, memo: dict[int, Any]) -> StrengthSteps:
        pipe = self._pipe()
        return type(self)(memo.get(id(pipe), pipe), self._steps)
