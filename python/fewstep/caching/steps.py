"""Where on its grid a scheduler is, whether it counts its steps or not.

step_index      counts from the grid's start; None before the first step
begin_index     where that will be, if the pipeline has said it
counter         counts from the run's start: PNDM
none of them    the time says it: DDIM, DDPM
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["counts", "step_now", "times_of"]


def times_of(scheduler: Any) -> tuple[float, ...]:
    """Return the scheduler's timesteps in the order of the run; () if it has none.

    Where the scheduler counts no steps, a step is told by its time, so repeated times are one.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return ()
    times = [float(time) for time in torch.as_tensor(timesteps).tolist()]
    if not (hasattr(scheduler, "step_index") or counts(scheduler)):
        times = [time for i, time in enumerate(times) if i == 0 or time != times[i - 1]]
    return tuple(times)


def counts(scheduler: Any) -> bool:
    """Whether the scheduler counts its steps from where a run started, as PNDM does."""
    return isinstance(getattr(scheduler, "counter", None), int)


def step_now(scheduler: Any, time: Any, times: tuple[float, ...]) -> int | None:
    """Return the step on the grid that comes next, or None where the time is none of the grid's.

    Args:
        scheduler: may count steps from the grid's start, from the run's, or not at all.
        time: the present one.
        times: the grid (`times_of`).
    """
    index = getattr(scheduler, "step_index", "absent")
    if index != "absent" and index is not None:
        return index
    if index is None:
        if (begin := getattr(scheduler, "begin_index", None)) is not None:
            return begin
        # The scheduler is about to look for the time, too. Of a time that is there twice it takes
        # the second, where the step to the next time begins; of one that is not, nothing is known.
        places = [place for place, own in enumerate(times) if own == time][:2]
        return places[-1] if places else 0
    later = times[scheduler.counter if counts(scheduler) else 0 :]
    return len(times) - len(later) + later.index(time) if time in later else None
