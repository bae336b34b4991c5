"""A plan: which steps of a grid run in full, and with which weights the others are forecast.

    v^_i = sum_k w_ik v_f(k),   sum_k w_ik = 1,   f(0) > f(1) > ... the newest full steps before i

Plain data, saved as JSON. `calibrate` makes plans; `patch(pipe, cache=plan)` follows them. A plan
knows what it was made for (`Fingerprint`, grid) and what error was measured with it. With the Gram
matrix of its calibration it can be carried over to another step count of the same scheduler.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .carrying import carried_over, embedded, rows, starting
from .fingerprint import Fingerprint
from .guard import Check
from .guided import PASSES, GuidedSession
from .policy import Forecasts
from .ring import MAX_ORDER
from .scheduled import ScheduledSession

__all__ = ["Plan"]

_FORMAT = "fewstep cache plan"
_VERSION = 3  # 2 is without guidance and passes
_SUM = 1e-3  # how far weights may be from summing to one: they are rounded when they are saved


@dataclass(frozen=True)
class Plan:
    """Decisions for every step of one grid.

    Args:
        times: the scheduler's timesteps.
        steps: per time None (full) or the weights of the newest full steps, newest first.
        fingerprint: what it was calibrated for; None fits every model.
        predicted: what was measured in calibration: "psnr" and "psnr_min" in dB over its samples
            and "of" what ("images" or "latents"), "step_error" the relative RMS error of every
            forecast.
        lookback: per time what the guard compares at a full step: weights of the full ones before
            it, and the error expected (`guard.Check`); () without.
        guard: how many times the expected error trips it; None never.
        gram: [S, S] mean inner products of the outputs, for other step counts; None without.
        made: how: settings of the calibration.
        guidance: per time None where the unguided pass is computed, else the weights of the newest
            differences of guided and unguided pass, by which it is forecast (`guided`): a step that
            is None in `steps` alone is a half step; () without such steps.
        passes: how the pipeline computes the two passes, one of `guided.PASSES`, with `guidance`.
        part: where the times are a part of a grid, as of image to image: the first one's place on
            it, and how many it has; the other steps run in full.

    Raises:
        ValueError: not a schedule: the first step skipped, more weights than full steps before,
            weights that don't sum to one or are not finite.
    """

    times: tuple[float, ...]
    steps: Forecasts
    fingerprint: Fingerprint | None = None
    predicted: dict[str, Any] = field(default_factory=dict)
    lookback: tuple[Check | None, ...] = ()
    guard: float | None = None
    gram: tuple[tuple[float, ...], ...] | None = None
    made: dict[str, Any] = field(default_factory=dict)
    guidance: Forecasts = ()
    passes: str | None = None
    part: tuple[int, int] | None = None

    scope = "output"

    def __post_init__(self) -> None:
        if len(self.times) != len(self.steps) or not self.steps:
            raise ValueError(
                f"steps: expected one entry per time ({len(self.times)}, at least 1), "
                f"got {len(self.steps)}"
            )
        _expect_weights("steps", self.steps)
        if self.guidance:
            self._expect_half_steps()
        first, total = self.part or (0, len(self.times))
        if first < 0 or first + len(self.times) > total:
            raise ValueError(
                f"part: expected (first, total) that {len(self.times)} steps fit into, "
                f"got {self.part}"
            )
        if self.lookback and len(self.lookback) != len(self.steps):
            raise ValueError(
                f"lookback: expected one entry per time ({len(self.times)}) or none, "
                f"got {len(self.lookback)}"
            )
        if self.guard is not None and not (0 < self.guard < math.inf and self.lookback):
            raise ValueError(
                "guard: expected None, or a finite factor above 0 in a plan with lookback, "
                f"got {self.guard!r}{'' if self.lookback else ' without'}"
            )

    def _expect_half_steps(self) -> None:
        if len(self.guidance) != len(self.steps) or self.passes not in PASSES or self.lookback:
            raise ValueError(
                f"guidance: expected one entry per time ({len(self.times)}), passes of "
                f"{', '.join(PASSES)}, and no lookback, got {len(self.guidance)}, {self.passes!r} "
                f"and {len(self.lookback)} checks"
            )
        _expect_weights("guidance", self.guidance)
        for index, (own, other) in enumerate(zip(self.steps, self.guidance, strict=True)):
            if own is not None and other is None:
                raise ValueError(
                    f"guidance: expected weights at step {index}, where the guided pass is "
                    "forecast, got None"
                )

    @property
    def session(self) -> type[ScheduledSession]:
        """What follows the plan."""
        return GuidedSession if self.guidance else ScheduledSession

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        every = (*self.steps, *self.guidance)
        return max((len(weights) for weights in every if weights is not None), default=1)

    @property
    def full(self) -> tuple[int, ...]:
        """The steps that run in full."""
        every = self.guidance or self.steps
        return tuple(index for index, weights in enumerate(every) if weights is None)

    @property
    def half(self) -> tuple[int, ...]:
        """The steps that compute the guided pass alone."""
        full = set(self.full)
        return tuple(i for i, weights in enumerate(self.steps) if weights is None and i not in full)

    @property
    def speedup(self) -> float:
        """Steps per full step, a half one for half: the speed-up if skipped steps were free."""
        return len(self.steps) / (len(self.full) + len(self.half) / 2)

    def __repr__(self) -> str:
        said = f"Plan({len(self.full)} of {len(self.steps)} steps in full, "
        said += f"{len(self.half)} in half, " if self.half else ""
        said += f"{self.speedup:.2f}x"
        if "psnr" in self.predicted:
            said += f", {self.predicted['psnr']:.1f} dB expected"
        return said + ")"

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid: the plan's own, or the plan carried over to it.

        Raises:
            ValueError: the grid is not the plan's, and the plan can't be carried over.
        """
        return self.on(times).steps

    def on(self, times: Sequence[float], start: int = 0) -> Plan:
        """Return the plan for a grid: this one, or this one carried over (`at`).

        Args:
            times: the whole grid.
            start: the step of it that the run starts at (`from_step`).
        """
        plan = self if self.is_on(times) else self.at(times)
        first, _ = plan.part or (0, 0)
        return embedded(plan.from_step(start - first), times)

    def from_step(self, start: int) -> Plan:
        """Return the plan for runs that start at a step in its middle: that step runs in full.

        The full steps behind it stay. So do the weights of forecasts that need no snapshot from
        before it; the others are fitted anew to the Gram matrix. Without one, steps that lack
        snapshots run in full.
        """
        return starting(self.without_half_steps() if start > 0 else self, start)

    def without_half_steps(self) -> Plan:
        """Return the plan with half steps in full: what other grids and starts take."""
        if not self.guidance:
            return self
        return replace(self, guidance=(), passes=None, predicted={})

    def guarded(self, factor: float | None = 2.0) -> Plan:
        """Return the plan with the guard at a factor of the expected error; None takes it out."""
        return replace(self, guard=factor)

    def is_on(self, times: Sequence[float]) -> bool:
        """Whether a grid is the plan's, or that which the plan is a part of."""
        first, total = self.part or (0, len(self.times))
        span = max(abs(self.times[0] - self.times[-1]), 1e-9)
        return len(times) == total and all(
            abs(mine - other) <= 1e-3 * span
            for mine, other in zip(self.times, times[first:], strict=False)
        )

    def at(self, times: Sequence[float], *, corrected: bool = True) -> Plan:
        """Return a plan for another grid in the same range of times, half to twice the steps.

        Where a grid starts and ends depends on its count of steps (leading ones of 20 and 10 steps
        start at 951 and 901): by a step of the coarser one.
        As many steps run in full, those nearest to the plan's; weights are fitted anew to the Gram
        matrix, interpolated between its times, and corrected as those of the same gap were. A plan
        calibrated on that grid is better: on the digits teacher by some decibels.

        Args:
            times: the grid.
            corrected: False leaves the plan's corrections out.

        Raises:
            ValueError: no Gram matrix, or another range or far other count of steps.
        """
        return carried_over(self.without_half_steps(), times, corrected=corrected)

    def to_json(self) -> str:
        """Return the plan as JSON."""
        data = {"format": _FORMAT, "version": _VERSION, **asdict(self)}
        lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in data.items())
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        Path(path).write_text(self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            ValueError: not a plan, or one of a version that is not known.
        """
        try:
            return cls.of_json(Path(path).read_text(errors="replace"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def of_json(cls, text: str) -> Plan:
        """Return the plan that `to_json` has made `text` of.

        Raises:
            ValueError: not a plan, or one of a version that is not known.
        """
        try:
            data = json.loads(text)
            if data.pop("format") != _FORMAT or data.pop("version") not in (2, _VERSION):
                raise KeyError("format, version")
            mark = data.pop("fingerprint")
            return cls(
                times=tuple(data.pop("times")),
                steps=tuple(None if w is None else tuple(w) for w in data.pop("steps")),
                fingerprint=None if mark is None else Fingerprint.of_json(mark),
                lookback=tuple(
                    None if c is None else Check(tuple(c[0]), c[1]) for c in data.pop("lookback")
                ),
                gram=None if (gram := data.pop("gram")) is None else rows(gram),
                guidance=tuple(None if w is None else tuple(w) for w in data.pop("guidance", ())),
                part=None if (part := data.pop("part", None)) is None else tuple(part),
                **data,
            )
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"expected a {_FORMAT} of version {_VERSION}, got something else "
                f"({type(error).__name__}: {error})"
            ) from error


def _expect_weights(name: str, forecasts: Forecasts) -> None:
    """Raise ValueError where a step's weights can't be those of snapshots before it."""
    known = 0
    for index, weights in enumerate(forecasts):
        if weights is None:
            known += 1
            continue
        if not 1 <= len(weights) <= min(known, MAX_ORDER):
            raise ValueError(
                f"{name}: expected 1 to {min(known, MAX_ORDER)} weights at step {index} "
                f"({known} full steps before it), got {len(weights)}"
            )
        if not all(map(math.isfinite, weights)) or abs(sum(weights) - 1) > _SUM:
            raise ValueError(
                f"{name}: expected finite weights that sum to 1 at step {index}, got {weights}"
            )
