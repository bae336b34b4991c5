"""A session whose decisions are all known when the run starts.

    at a run's start   the policy sees the grid and gives, per step: full, or weights
    full step          the output (or the residual of the blocks) enters the branch's ring
    skipped step       the weighted sum of the ring's newest snapshots stands for it

Weights belong to the full steps of the schedule, so only these enter the ring. A step that runs in
full against the schedule (new conditioning, another shape, too few snapshots) leaves the ring as it
is, and the schedule goes on as soon as enough of its full steps are in it.

A run may start in the middle of its grid (image to image): then the policy is asked for a schedule
that starts there. The same where another model takes over.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .calls import Branch, Call
from .guard import Check, Flags, lookback, trips
from .policy import Forecasts, ScheduledPolicy
from .ring import Ring, slot_table
from .session import Session
from .steps import times_of

__all__ = ["ScheduledSession", "expect_one_size"]


class ScheduledSession(Session):
    """Follows the runs of one pipeline and decides by a schedule.

    Args:
        policy: gives the schedule of a grid.
        scheduler: returns the pipeline's present scheduler, or None.
        verify: run the model on skipped steps too, to measure the forecasts; they are used all the
            same.
    """

    policy: ScheduledPolicy
    carried = (*Session.carried, "verify", "watch")

    def __init__(
        self, policy: ScheduledPolicy, scheduler: Callable[[], Any], *, verify: bool = False
    ) -> None:
        self.verify = verify
        self.watch = verify  # whether full steps are compared with their forecasts without a guard
        self.changed: Callable[[], str | None] = _nothing  # says what is not as it was
        self.guidance: Callable[[], Any] = _nothing  # the pipeline's scale
        self.size: tuple[int, ...] = ()  # of what enters the model, without the batch
        self._remarks: list[str] = []
        self.forecasts: Forecasts | None = None
        self._times: tuple[float, ...] = ()
        self._read: tuple[Any, int, tuple[float, ...]] | None = None  # timesteps, version, times
        self._plan: Any = None  # of this run, where the policy is a plan or chooses one
        self._start = 0  # the first step on its grid of the run, or of the model that took over
        self._began = 0  # the run's
        self._refused: str | None = None  # why this run is not the schedule's
        self._ranks: tuple[int, ...] = ()  # full steps before each step
        self._last_skip = -1
        self._taken: Forecasts | None = None  # the last run's
        self._checks: tuple[Check | None, ...] = ()
        self._tables: dict[Any, Tensor] = {}  # weights by slot: of forecasts and of checks
        self._flags: Flags | None = None  # which samples the guard has found off in this run
        super().__init__(policy, scheduler)

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        self.forecasts = None
        # Of the model that another one took over from.
        self._before: tuple[Forecasts, tuple[Check | None, ...]] | None = None
        self._flags = None

    def _take_over(self) -> None:
        super()._take_over()
        self._before = (self.forecasts or (), self._checks)
        self.forecasts = None

    def _plan_run(self, counted: int, index: Any) -> None:
        """Ask the policy about the grid of this run, given the number and place of its step."""
        self._times = times = self._read_times()
        self._start = start = index if isinstance(index, int) else self._place(counted)
        if self._before is None:
            self._began = start
        first = self._plan
        checks: tuple[Check | None, ...] = ()
        self._refused = self.changed()
        if self._refused is not None:
            self._plan, forecasts = None, ()
        elif hasattr(self.policy, "on"):
            self._plan = self.policy.on(times, start)
            forecasts = () if self._plan is None else self._plan.steps
            checks = () if self._plan is None else self._plan.lookback
            self._refused = "no plan for this grid" if self._plan is None else None
        else:
            forecasts = self._ask(self.policy.forecasts)
        if self._before is not None and self._before[0] and forecasts:
            forecasts = self._before[0][:start] + forecasts[start:]
            checks = self._before[1][:start] + checks[start:]
            if self._plan is not None:
                # What was measured with these very steps, both models'.
                known = first is not None and first.steps == forecasts
                predicted = first.predicted if known else {}
                parts = {"steps": forecasts, "lookback": checks, "predicted": predicted}
                self._plan = replace(self._plan, **parts)
        if (forecasts, checks) != (self._taken, self._checks):
            self._tables = {}
        self.forecasts = self._taken = forecasts
        self._checks = checks
        self._ranks = tuple(accumulate((w is None for w in forecasts), initial=0))
        skipped = [index for index, weights in enumerate(forecasts) if weights is not None]
        self._last_skip = skipped[-1] if skipped else -1

    def _ask(self, policy: Callable[[tuple[float, ...]], Forecasts]) -> Forecasts:
        """Return a policy's decisions, from the run's first step on where it counts from that."""
        skipped = self._start if getattr(self.policy, "restarts", False) else 0
        forecasts = (None,) * skipped + tuple(policy(self._times[skipped:]))
        _expect_schedule(forecasts, len(self._times), self.policy)
        return forecasts

    def _read_times(self) -> tuple[float, ...]:
        """Return the scheduler's times, read anew only where it has other ones than before.

        So a loop over a grid that is set can be captured in a CUDA graph after one run: nothing of
        it reads the device.
        """
        scheduler = self._scheduler()
        timesteps = getattr(scheduler, "timesteps", None)
        known = isinstance(timesteps, Tensor) and not timesteps.is_inference()
        if known and self._read is not None:
            read, version, times = self._read
            if read is timesteps and version == timesteps._version:
                return times
        times = times_of(scheduler)
        self._read = (timesteps, timesteps._version, times) if known else None
        return times

    def _row(self, call: Call, what: str) -> Tensor:
        """Return the weights of a call's step by slot, on its device."""
        device = call.form[-1] if call.form else torch.device("cpu")
        if (what, device) not in self._tables:
            weights = self.forecasts
            if what == "check":
                weights = tuple(None if check is None else check.weights for check in self._checks)
            table = slot_table(weights, self.policy.order, self.forecasts)
            self._tables[what, device] = table.to(device, torch.float32)
        return self._tables[what, device][call.step]

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        branch = call.branch
        if self.forecasts is None:
            self.size = tuple(call.form[0][1:]) if call.form else ()
            self._plan_run(call.step, index)
            self._remarks = remarks(getattr(self._plan, "made", {}), self.size, self.guidance())
        if branch.ring is None:
            branch.ring = Ring(self.policy.order, getattr(self.policy, "snapshots", None))
        # The scheduler's own count, so that a run that starts in the middle of its grid (image to
        # image) is at the right place of the schedule.
        call.step = index if isinstance(index, int) else self._place(call.step)
        reason = self._must_run_now(call, branch)
        call.skip = reason is None
        flags = self._flags
        if call.skip and flags is not None and flags.fits(call.form) and flags.any():
            reason, call.flags = "guard", flags
        if reason is not None:
            self.reasons[reason] += 1
        branch.note("full" if reason else "skip", reason)

    def _place(self, counted: int) -> int:
        """Return the step that the model's time is that of; the number counted where it is none."""
        time = self._clock[1] if self._clock else None
        return self._times.index(time) if time in self._times else counted

    def _must_run_now(self, call: Call, branch: Branch) -> str | None:
        if self._refused is not None:
            return self._refused
        if call.step >= len(self.forecasts):
            return "not in the schedule"
        weights = self.forecasts[call.step]
        if weights is None:
            return "scheduled"
        if branch.replaced:
            return "conditioning changed"
        if branch.ring.count(self._ranks[call.step]) < len(weights):
            return "too few snapshots"
        return "shape changed" if branch.ring.form != call.form else None

    @torch.compiler.disable
    def decide(self, call: Call, entry: Tensor, output: Tensor) -> None:
        """Nothing is left to decide."""

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Put what a scheduled full step gave into the ring."""
        branch = call.branch
        if branch is None or call.step >= min(self._last_skip, len(self.forecasts)):
            return  # nothing reads it
        if any(isinstance(part, Tensor) and part.requires_grad for part in kept):
            self.reasons["gradients wanted"] += 1
            branch.ring.clear()
        elif self.forecasts[call.step] is None:
            self._look_back(call, kept)
            branch.ring.push(kept, self._ranks[call.step], call.form)

    def _look_back(self, call: Call, kept: tuple[Any, ...]) -> None:
        branch, check = call.branch, self._checks[call.step] if self._checks else None
        factor = getattr(self._plan or self.policy, "guard", None)
        if check is None or not (self.watch or factor is not None):
            return
        expect_one_size(call)
        known = branch.ring.count(self._ranks[call.step])
        if branch.ring.form != call.form or known < len(check.weights):
            return
        forecast = branch.ring.forecast(self._row(call, "check"))
        error = branch.errors[call.step] = lookback(kept[0], forecast[0])
        if factor is not None and check.expected < math.inf:
            tripped = trips(error, factor * check.expected, call.entry)
            before = self._flags
            if before is not None and before.tripped.shape == tripped.shape:
                tripped = tripped | before.tripped
            self._flags = Flags(tripped)

    @torch.compiler.disable
    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return the forecast."""
        return call.branch.ring.forecast(self._row(call, "forecast"))

    @torch.compiler.disable
    def finish(self, call: Call) -> None:
        """Close a call; the snapshots go with the last step."""
        super().finish(call)
        if call.is_last and call.branch is not None and call.branch.ring is not None:
            call.branch.ring.clear()

    @torch.compiler.disable
    def compare(self, call: Call, computed: tuple[Any, ...], forecast: tuple[Any, ...]) -> None:
        """Note how far a forecast is off what the model computes."""
        expect_one_size(call)
        call.branch.errors[call.step] = lookback(computed[0], forecast[0])

    def errors(self) -> dict[str, dict[int, list[float]]]:
        """Return the relative L1 errors that were measured, by branch, step and sample."""
        return {
            branch.name: {step: error.tolist() for step, error in sorted(branch.errors.items())}
            for branch in self._branches.values()
        }

    def report(self) -> dict[str, Any]:
        """Return what every session does, the plan that was followed, and the forecasts' errors.

        `snapshot_bytes`: what the snapshots of all guidance passes take during the run.
        `step_error`: relative RMS, what calibration lets expect per step. `measured_error`, with a
        guard or `verify`: relative L1 by branch, step and sample; at full steps of the forecast
        that was not used, and with `verify` of those that were.
        """
        numbers = super().report()
        rings = (branch.ring for branch in self._branches.values())
        numbers["snapshot_bytes"] = sum(ring.bytes for ring in rings if ring is not None)
        if self._plan is not None:
            numbers["plan"] = {
                "steps": len(self._plan.steps),
                "full": list(self._plan.full),
                "carried_over_from": self._plan.made.get("carried_over_from"),
                "starts_at": self._began,
                "remarks": list(self._remarks),
            }
            if expected := self._plan.predicted.get("step_error"):
                numbers["step_error"] = list(expected)
        measured = self.errors()
        if any(measured.values()):
            numbers["measured_error"] = measured
        return numbers


def remarks(made: dict[str, Any], size: tuple[int, ...], guidance: Any) -> list[str]:
    """Say where a run is unlike the calls that a plan was calibrated on: it is followed all the
    same, and how good it is there has not been measured.

    Args:
        made: of the plan.
        size: of what enters the model, without the batch.
        guidance: the pipeline's scale, or None.
    """
    found = []
    own = tuple(made.get("size", ()))
    if own and size and own != size:
        found.append(f"latents of {list(size)}, calibrated with {list(own)}")
    low, high = made.get("guidance", (-math.inf, math.inf))
    is_number = isinstance(guidance, int | float)
    if is_number and not low - 0.1 * abs(low) <= guidance <= high + 0.1 * abs(high):
        own = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        found.append(f"guidance {guidance:g}, calibrated with {own}")
    return found


def _nothing() -> None:
    return None


def expect_one_size(call: Call) -> None:
    """Raise ValueError where samples of several sizes can't be compared in one pass."""
    if call.entry is None and call.form:
        raise ValueError(
            "cache: expected samples of one size with a guard, verify or weights by sample, got "
            f"{[list(shape) for shape in call.form[0][1:]]}"
        )


def _expect_schedule(forecasts: Forecasts, steps: int, policy: ScheduledPolicy) -> None:
    """Raise ValueError where what a policy returns is no schedule of so many steps."""
    longest = max((len(weights) for weights in forecasts if weights is not None), default=0)
    if len(forecasts) != steps or longest > policy.order:
        raise ValueError(
            f"cache: expected {steps} steps with at most order={policy.order} weights from "
            f"{policy!r}, got {len(forecasts)} with up to {longest}"
        )
