"""A session in which every cached module has a ring of its own, and may have its own schedule.

    policy.forecasts(times)              one schedule for all modules
    policy.forecasts_for(name, times)    a module's own, where a policy has this method

A module's weights belong to the full steps of its own schedule. It runs in full against the
schedule where its ring lacks snapshots, where its input's form differs from theirs, and with the
whole call: on steps that are not in the schedule, and with new conditioning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .calls import Branch, Call
from .policy import Forecasts, ScheduledPolicy
from .ring import Ring, slot_table
from .scheduled import ScheduledSession

__all__ = ["ModuleSession", "Tally", "Visit"]


class _Course:
    """The decisions that modules with equal schedules share."""

    def __init__(self, forecasts: Forecasts, order: int) -> None:
        self.forecasts, self._order = forecasts, order
        self.ranks = tuple(accumulate((w is None for w in forecasts), initial=0))
        skipped = [index for index, weights in enumerate(forecasts) if weights is not None]
        self.last_skip = skipped[-1] if skipped else -1
        self._rows: dict[torch.device, tuple[Tensor, ...]] = {}

    def row(self, step: int, device: torch.device) -> Tensor:
        """Return the weights of a step by slot."""
        if device not in self._rows:
            table = slot_table(self.forecasts, self._order, self.forecasts)
            self._rows[device] = table.to(device, torch.float32).unbind(0)
        return self._rows[device][step]


class _Rings:
    """The rings of a branch: by module, and by its place among the module's runs in one call."""

    form = None

    def __init__(self) -> None:
        self.own: dict[tuple[str, int], Ring] = {}
        self.forecast: list[int] = []  # modules, by call of this run
        self.refused: Counter[str] = Counter()  # why some ran against their schedules, by calls

    @property
    def bytes(self) -> int:
        return sum(ring.bytes for ring in self.own.values())

    def clear(self) -> None:
        for ring in self.own.values():
            ring.clear()


class Tally:
    """A call of the denoiser, as its modules see it.

    Args:
        session: whose call it is.
        branch: of the call.
        step: of the schedule.
        why_full: why the whole call runs in full, or None.
    """

    def __init__(
        self, session: ModuleSession, branch: Branch, step: int, why_full: str | None
    ) -> None:
        self.session, self.step, self.why_full = session, step, why_full
        self.rings: _Rings = branch.ring
        self.ran = self.forecast = 0
        self.refused: set[str] = set()  # reasons why modules ran against their schedules
        self._visits: dict[str, int] = {}

    @torch.compiler.disable
    def visit(self, name: str, form: Any) -> Visit:
        """Return what a module does now, given what of its input its output's form depends on."""
        nth = self._visits.get(name, 0)
        self._visits[name] = nth + 1
        ring = self.rings.own.get((name, nth))
        if ring is None:
            policy = self.session.policy
            ring = Ring(policy.order, getattr(policy, "snapshots", None))
            self.rings.own[name, nth] = ring
        return Visit(self, ring, self.session.courses.get(name), form)

    @torch.compiler.disable
    def refuse(self, reason: str) -> None:
        """Note why a module runs against its schedule, or why nothing of it was kept."""
        self.refused.add(reason)


class Visit:
    """One run of a module within a call.

    Attributes:
        skips: whether a forecast stands for it.
        wanted: whether what it returns is to be kept.
    """

    __slots__ = ("_course", "_form", "_tally", "ring", "skips", "wanted")

    def __init__(self, tally: Tally, ring: Ring, course: _Course | None, form: Any) -> None:
        self._tally, self.ring, self._course, self._form = tally, ring, course, form
        step = tally.step
        self.skips = self.wanted = False
        if course is None or step >= len(course.forecasts):
            tally.ran += 1
            return
        weights = course.forecasts[step]
        if weights is None:
            self.wanted = step < course.last_skip
        elif tally.why_full is None:
            if ring.count(course.ranks[step]) < len(weights):
                tally.refuse("too few snapshots")
            elif ring.form != form:
                tally.refuse("shape changed")
            else:
                self.skips = True
        if self.skips:
            tally.forecast += 1
        else:
            tally.ran += 1

    @torch.compiler.disable
    def forecast(self, base: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Return the forecast, added to `base`."""
        row = self._course.row(self._tally.step, self.ring.device)
        return self.ring.forecast(row, base)

    @torch.compiler.disable
    def keep(self, parts: tuple[Any, ...], base: tuple[Any, ...] | None = None) -> None:
        """Put what the module returned, or what that adds to `base`, into the ring."""
        if any(isinstance(part, Tensor) and part.requires_grad for part in parts):
            self.refuse("gradients wanted")
            self.ring.clear()
            return
        self.ring.push(parts, self._course.ranks[self._tally.step], self._form, base)

    @torch.compiler.disable
    def refuse(self, reason: str) -> None:
        """Note why nothing was kept."""
        self._tally.refuse(reason)


class ModuleSession(ScheduledSession):
    """Follows the runs of one pipeline and decides for each of its cached modules by a schedule.

    Attributes:
        names: the modules; the layout sets them.
        courses: the schedules of this run, by module.
        tally: the call under way, or None where there is no cache.
    """

    carried = (*ScheduledSession.carried, "names")

    def __init__(
        self, policy: ScheduledPolicy, scheduler: Callable[[], Any], *, verify: bool = False
    ) -> None:
        self.names: tuple[str, ...] = ()
        self.courses: dict[str, _Course] = {}
        self.tally: Tally | None = None
        super().__init__(policy, scheduler, verify=verify)

    def _plan_run(self, counted: int, index: Any) -> None:
        """Ask the policy about the grid of this run, for every module."""
        self._times = self._read_times()
        self._start = index if isinstance(index, int) else self._place(counted)
        self._refused = self.changed()
        before = {course.forecasts: course for course in self.courses.values()}
        courses: dict[Forecasts, _Course] = {}
        self.courses = {}
        if self._refused is not None:
            self.forecasts = ()
            return  # the policy need not know this run's grid
        own = getattr(self.policy, "forecasts_for", None)
        common = self._ask(self.policy.forecasts) if own is None else None
        for name in self.names:
            forecasts = common if own is None else self._ask(partial(own, name))
            if forecasts not in courses:
                known = before.get(forecasts)  # with its tables on the device
                courses[forecasts] = known or _Course(forecasts, self.policy.order)
            self.courses[name] = courses[forecasts]
        self.forecasts = ()

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        branch = call.branch
        if self.forecasts is None:
            self._plan_run(call.step, index)
        if branch.ring is None:
            branch.ring = _Rings()
        call.step = index if isinstance(index, int) else self._place(call.step)
        why_full = self._refused
        if call.step >= len(self._times):
            why_full = why_full or "not in the schedule"
        elif branch.replaced:
            why_full = why_full or "conditioning changed"
        self.tally = Tally(self, branch, call.step, why_full)

    @torch.compiler.disable
    def finish(self, call: Call) -> None:
        """Close a call, and note what its modules did."""
        tally, self.tally = self.tally, None
        if tally is not None and call.branch is not None:
            refused = sorted(tally.refused)
            if not tally.forecast:
                why = tally.why_full or next(iter(refused), "scheduled")
                self.reasons[why] += 1
                call.branch.note("full", why)
            elif tally.ran:
                call.branch.note("part", ", ".join(refused) or None)
                tally.rings.refused.update(refused)
            else:
                call.branch.note("skip")
            tally.rings.forecast.append(tally.forecast)
        super().finish(call)

    def abort(self) -> None:
        """Close a call that raised: nothing of this run is used again."""
        self.tally = None
        super().abort()

    def report(self) -> dict[str, Any]:
        """Return what every session does.

        `partly`: calls in which some modules ran, `why_part` some did against their schedules.
        `forecast_modules`: how many did not run, by branch and call.
        """
        numbers = super().report()
        branches = self._branches.values()
        numbers["partly"] = sum(branch.decisions.count("part") for branch in branches)
        numbers["forecast_modules"] = {
            branch.name: list(branch.ring.forecast) for branch in branches if branch.ring
        }
        refused = (branch.ring.refused for branch in branches if branch.ring)
        numbers["why_part"] = dict(sum(refused, Counter()))
        return numbers
