"""A session whose decisions are all known when the run starts.

    at a run's start   the policy sees the grid and gives, per step: full, or weights
    full step          the output (or the residual of the blocks) enters the branch's ring
    skipped step       the weighted sum of the ring's newest snapshots stands for it

Weights belong to the full steps of the schedule, so only these enter the ring. A step that runs in
full against the schedule (new conditioning, another shape, too few snapshots) leaves the ring as it
is, and the schedule goes on as soon as enough of its full steps are in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .policy import Forecasts, ScheduledPolicy
from .ring import Ring, slot_table
from .session import Branch, Call, Session

__all__ = ["ScheduledSession", "times_of"]


def times_of(scheduler: Any) -> tuple[float, ...]:
    """Return the scheduler's timesteps in the order of the run; () if it has none.

    Where the scheduler counts no steps, a step is told by its time, so repeated times are one.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if timesteps is None:
        return ()
    times = [float(time) for time in torch.as_tensor(timesteps).tolist()]
    if not hasattr(scheduler, "step_index"):
        times = [time for i, time in enumerate(times) if i == 0 or time != times[i - 1]]
    return tuple(times)


class ScheduledSession(Session):
    """Follows the runs of one pipeline and decides by a schedule.

    Args:
        policy: gives the schedule of a grid.
        scheduler: returns the pipeline's present scheduler, or None.
    """

    policy: ScheduledPolicy

    def __init__(self, policy: ScheduledPolicy, scheduler: Callable[[], Any]) -> None:
        self.forecasts: Forecasts | None = None
        self._tables: dict[torch.device, Tensor] = {}  # the weights by slot
        self._taken: Forecasts | None = None  # the schedule that they are of
        super().__init__(policy, scheduler)

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        self.forecasts = None

    def _take(self, forecasts: Forecasts) -> None:
        """Use a schedule from now on."""
        if forecasts is not self._taken:
            self._tables, self._taken = {}, forecasts
        self.forecasts = forecasts

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        branch = call.branch
        if self.forecasts is None:
            self._take(self.policy.forecasts(times_of(self._scheduler())))
        if branch.ring is None:
            branch.ring = Ring(self.policy.order)
        # The scheduler's own count, so that a run that starts in the middle of its grid (image to
        # image) is at the right place of the schedule.
        call.step = index if isinstance(index, int) else call.step
        reason = self._must_run_now(call, branch)
        if reason is None:
            call.skip = True
        else:
            self.reasons[reason] += 1
        branch.decisions.append("full" if reason else "skip")

    def _must_run_now(self, call: Call, branch: Branch) -> str | None:
        if call.step >= len(self.forecasts):
            return "not in the schedule"
        weights = self.forecasts[call.step]
        if weights is None:
            return "scheduled"
        if branch.replaced:
            return "conditioning changed"
        if len(branch.ring) < len(weights):
            return "too few snapshots"
        return "shape changed" if branch.ring.form != call.form else None

    @torch.compiler.disable
    def decide(self, call: Call, entry: Tensor, output: Tensor) -> None:
        """Nothing is left to decide."""

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Put what a scheduled full step gave into the ring."""
        branch = call.branch
        if branch is None or call.is_last or call.step >= len(self.forecasts):
            return
        if any(isinstance(part, Tensor) and part.requires_grad for part in kept):
            self.reasons["gradients wanted"] += 1
            branch.ring.clear()
        elif self.forecasts[call.step] is None:
            rank = sum(weights is None for weights in self.forecasts[: call.step])
            branch.ring.push(kept, rank, call.form)

    @torch.compiler.disable
    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return the forecast."""
        device = call.form[-1] if call.form else torch.device("cpu")
        if device not in self._tables:
            table = slot_table(self.forecasts, self.policy.order)
            self._tables[device] = table.to(device, torch.float32)
        return call.branch.ring.forecast(self._tables[device][call.step])
