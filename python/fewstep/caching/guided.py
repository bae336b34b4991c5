"""Following a plan whose unguided pass is forecast on steps that compute the guided one.

    m = u + g (c - u) = c + (g - 1) d,   d = c - u         guided pass c, unguided pass u
    full step      c and u are computed; the snapshots are c and d
    half step      c is computed and a snapshot;   u^ = c - d^
    skipped step   c^ forecast;                    u^ = c^ - d^

d changes more slowly than u, and its error counts g - 1 times where that of c counts once.

Pipelines compute the passes in two calls of a step, the guided one first, or in one call with a
batch whose halves are the two. In a batch a half step runs the model on the rows of the guided
half. A policy that doesn't say which it is (`passes` is None) has the session find out: a second
call of a step that is given the same form, named "uncond" if anything, is the unguided pass.

A batch of other images looks as a batch of passes does, so whether the halves of what enters the
model are equal is read back: on the first step of an image, and where they are, once more on the
next, before anything is forecast. Images that share their noise have parted by then, passes of one
have not. In a captured graph what the run before has found counts.
"""

from __future__ import annotations

from collections import Counter
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .calls import Branch, Call
from .guard import halves
from .policy import Forecasts
from .ring import Ring, slot_table
from .scheduled import ScheduledSession

__all__ = ["PASSES", "GuidedSession", "guided_half", "rows_of"]

# How a pipeline computes the two passes: the guided one in the first of two calls, or a batch half.
PASSES = ("calls", "first half", "second half")


def guided_half(passes: str, count: int) -> slice:
    """Return the rows of a batch of `count` that are the guided pass's."""
    return slice(0, count // 2) if passes == "first half" else slice(count // 2, count)


def rows_of(value: Any, rows: slice, count: int, *, lists: bool = False) -> Any:
    """Return arguments with the rows of every tensor that has a first dimension of `count`.

    With `lists`, the model is given its samples in lists: of those of length `count` the entries
    are the rows.
    """
    if isinstance(value, Tensor):
        return value[rows] if value.dim() and value.shape[0] == count else value
    if lists and type(value) is list and len(value) == count:
        return value[rows]
    if isinstance(value, dict):
        return {name: rows_of(entry, rows, count, lists=lists) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(rows_of(entry, rows, count, lists=lists) for entry in value)
    return value


def _each(function: Any, *parts: tuple[Any, ...]) -> tuple[Any, ...]:
    """Apply a function to the tensors of outputs, part by part; what is no tensor stays."""
    return tuple(
        function(*entries) if isinstance(entries[0], Tensor) else entries[0]
        for entries in zip(*parts, strict=True)
    )


class GuidedSession(ScheduledSession):
    """A `ScheduledSession` for plans with `guidance`; on others it does what that does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._second: Forecasts = ()  # weights of the differences
        self._second_ranks: tuple[int, ...] = ()
        self._last_forecast = -1  # of a difference
        self._rows: dict[Any, Tensor] = {}
        self._passes: str | None = None  # how they are computed
        self._entered: tuple[int, Any] | None = None  # a step and the form of its first call
        self._now: tuple[int, tuple[Any, ...]] | None = None  # a step and its guided output
        self._equal: tuple[Any, bool] | None = None  # form of a batch, whether its halves are one's
        self._looked: int | None = None  # the step of this run at which that was looked at
        self._sure = False  # whether it needs no other look in this run
        super().__init__(*args, **kwargs)

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        if self._looked is not None and not self._sure:
            self._equal = None
        self._now, self._looked, self._sure = None, None, False

    def _plan_run(self, *where: Any) -> None:
        super()._plan_run(*where)
        second = () if self._plan is None else self._plan.guidance
        if second != self._second:
            self._rows = {}
        self._second = second
        self._passes = None if self._plan is None else self._plan.passes
        self._second_ranks = tuple(accumulate((w is None for w in second), initial=0))
        self._last_forecast = max((i for i, w in enumerate(second) if w is not None), default=-1)

    @property
    def _in_calls(self) -> bool:
        return self._passes == "calls"

    @property
    def _finds_out(self) -> bool:
        """Whether the passes may turn out to be calls: the policy doesn't say, nothing did yet."""
        return getattr(self.policy, "passes", "") is None and not self._in_calls

    def _find_passes(self, call: Call) -> None:
        """Take the second call of a step for the unguided pass where it looks like one."""
        if call.place == 0:
            self._entered = call.step, call.form
            return
        same = call.place == 1 and self._entered == (call.step, call.form)
        if same and self.context in (None, "uncond"):
            self._passes = "calls"
            for branch in self._branches.values():
                branch.memory = None  # of halves, which were no passes

    def _difference_row(self, call: Call) -> Tensor:
        device = call.form[-1] if call.form else torch.device("cpu")
        if device not in self._rows:
            table = slot_table(self._second, self.policy.order, self._second)
            self._rows[device] = table.to(device, torch.float32)
        return self._rows[device][call.step]

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        super()._foresee(call, timesteps, index)
        if call.half is not None:
            call.branch.correct("half", call.branch.why[-1])

    def _must_run_now(self, call: Call, branch: Branch) -> str | None:
        if not self._second or self._refused is not None:
            return super()._must_run_now(call, branch)
        if self._finds_out:
            self._find_passes(call)
        if call.place > 1 or (call.place and not self._in_calls):
            return "a pass of its own"
        if call.step >= len(self._second):
            return "not in the schedule"
        weights = self._second[call.step]
        if weights is None:
            return "scheduled"
        if branch.replaced:
            return "conditioning changed"
        if call.place == 0:
            reason = super()._must_run_now(call, branch)
            if self._in_calls:
                return reason
            if reason not in (None, "scheduled"):
                return reason
            if self._equal != (call.form, True):
                return "no halves of guidance"
        elif self._now is None or self._now[0] != call.step:
            return "no guided pass before it"
        ring = self._differences(branch)
        if ring is None or ring.count(self._second_ranks[call.step]) < len(weights):
            return "too few snapshots"
        if ring.form != call.form:
            return "shape changed"
        if call.place == 0 and self.forecasts[call.step] is None:
            call.half = guided_half(self._passes, call.form[0][0])
            return "half"
        return None

    @torch.compiler.disable
    def enter(self, call: Call) -> None:
        """Look at the input again before the first forecast of a batch's half or of both."""
        super().enter(call)
        halved = call.half is not None or call.skip
        if not (self._second and halved and call.branch is not None) or self._in_calls:
            return
        self._look_at_halves(call)
        if self._equal != (call.form, True):
            if call.half is not None:
                self.reasons -= Counter(half=1)
            call.half, call.skip = None, False
            self.reasons["no halves of guidance"] += 1
            call.branch.correct("full", "no halves of guidance")

    def _differences(self, branch: Branch) -> Ring | None:
        return branch.ring if self._in_calls else branch.memory

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Keep what a step computed: the guided pass, and on full steps the difference."""
        if not self._second or call.branch is None or call.place > 1:
            super().keep(call, *kept)
            return
        if call.step >= len(self._second):
            return
        if self._in_calls:
            if call.place == 0:
                self._now = (call.step, kept)
                super().keep(call, *kept)
            elif self._now is not None and self._now[0] == call.step:
                self._keep_difference(call, call.branch.ring, self._now[1], kept)
            return
        if call.place:
            return
        if self._finds_out:
            self._now = (call.step, kept)
        self._look_at_halves(call)
        if self._equal != (call.form, True):
            return
        guided, other = self._split(call, kept)
        super().keep(call, *guided)
        if call.branch.memory is None:
            call.branch.memory = Ring(self.policy.order, getattr(self.policy, "snapshots", None))
        self._keep_difference(call, call.branch.memory, guided, other)

    def _keep_difference(
        self, call: Call, ring: Ring, guided: tuple[Any, ...], other: tuple[Any, ...]
    ) -> None:
        wants = any(isinstance(part, Tensor) and part.requires_grad for part in other)
        scheduled = self._second[call.step] is None
        if scheduled and call.step < self._last_forecast and not wants:
            difference = _each(torch.sub, guided, other)
            ring.push(difference, self._second_ranks[call.step], call.form)

    def _look_at_halves(self, call: Call) -> None:
        """See whether the halves of the batch are given the same.

        If they are, a second look, behind the first step, is needed to be sure.
        """
        entry, rows = call.entry, call.form[0][0] if call.form else 0
        captured = (
            isinstance(entry, Tensor)
            and entry.device.type == "cuda"
            and torch.cuda.is_current_stream_capturing()
        )
        if self._sure or captured or self._looked == call.step:
            return
        same = halves(entry, rows)
        equal = same is not None and bool(same.all())
        self._equal = (call.form, equal)
        self._sure = not equal or self._looked is not None
        self._looked = call.step

    def _split(self, call: Call, parts: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        rows = call.form[0][0]
        mine = guided_half(self._passes, rows)
        other = slice(0, mine.start) if mine.start else slice(mine.stop, rows)
        return tuple(_each(lambda part, own=own: part[own], parts) for own in (mine, other))

    def _join(self, call: Call, guided: tuple[Any, ...], ring: Ring) -> tuple[Any, ...]:
        """Return the batch of a guided pass and of what its difference is forecast to be."""
        other = _each(torch.sub, guided, ring.forecast(self._difference_row(call)))
        first = self._passes == "first half"
        pair = (guided, other) if first else (other, guided)
        return _each(lambda *both: torch.cat(both), *pair)

    @torch.compiler.disable
    def complete(self, call: Call, guided: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the whole batch's output on a half step, and keep the half that was computed."""
        super().keep(call, *guided)
        return self._join(call, guided, call.branch.memory)

    @torch.compiler.disable
    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return the forecast of a pass, or of both."""
        if not self._second:
            return super().recall(call)
        if not self._in_calls:
            return self._join(call, super().recall(call), call.branch.memory)
        if call.place == 0:
            guided = super().recall(call)
            self._now = (call.step, guided)
            return guided
        difference = call.branch.ring.forecast(self._difference_row(call))
        return _each(torch.sub, self._now[1], difference)

    @torch.compiler.disable
    def finish(self, call: Call) -> None:
        """Close a call; the snapshots go with the last step."""
        super().finish(call)
        if call.is_last and call.branch is not None:
            call.branch.memory = None
            if call.place or not self._in_calls:
                self._now = None

    def abort(self) -> None:
        """Close a call that raised: nothing of this run is used again."""
        super().abort()
        self._now = None

    def report(self) -> dict[str, Any]:
        """Return what a schedule's session does, and how many calls ran on half of the batch."""
        numbers = super().report()
        every = [one for branch in numbers["branches"].values() for one in branch]
        return numbers | {"half": every.count("half")}
