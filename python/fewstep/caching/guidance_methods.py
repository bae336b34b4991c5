"""The published rule for the unguided pass alone: late in the run, from what guidance was before.

    u^ = c - d^,  d = c - u       c computed on every step, d^ of the newest computed differences
    GuidanceReuse  all passes up to a share of the run, then u every n-th step

With degree 0 the newest difference is kept, as FasterCache's CFG cache does (arXiv 2410.19355)
before it weights high and low frequencies, which is not done here; with degree 1 it goes on along
a line through two, an affine rule such as those that LinearAG fits (arXiv 2312.12487). Both found
the two passes alike late in a run. `calibrate(guidance="auto")` fits where and with which weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ._checks import check_choice, check_count, check_number
from .forecasters import newton
from .guided import PASSES, GuidedSession
from .methods import forecast_steps
from .policy import Forecasts

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["GuidanceReuse"]


@dataclass(frozen=True)
class GuidanceReuse:
    """Leave out the unguided pass on most steps of the run's later part.

    Args:
        first: share of the steps, from the start, that compute both passes.
        every: distance of the steps behind them that do.
        degree: 0 keeps the newest difference of the passes, 1 goes on along a line.
        passes: how the pipeline computes them: "second half" of one batch is the guided one (most
            of diffusers' pipelines), "first half", or "calls", the guided one first. None tells
            "calls" from "second half" by the run.
    """

    first: float = 0.4
    every: int = 5
    degree: int = 0
    passes: str | None = None

    scope = "output"
    session = GuidedSession

    def __post_init__(self) -> None:
        check_number("first", self.first, 0, most=1)
        check_count("every", self.every, 1)
        check_choice("degree", self.degree, (0, 1))
        check_choice("passes", self.passes, (*PASSES, None))

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return self.degree + 1

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Every step computes the guided pass."""
        return (None,) * len(times)

    def on(self, times: Sequence[float], start: int = 0) -> Plan:
        """Return the plan for a grid and the step that a run starts at."""
        from .plan import Plan

        count = len(times)
        begin = min(count - 1, start + max(0, round(self.first * (count - start)) - 1))
        full = tuple(i for i in range(count) if i <= begin or (i - begin) % self.every == 0)
        guidance = forecast_steps(
            full, times, lambda known, at: newton(known, at, degree=self.degree)
        )
        passes = self.passes or "second half"  # until the session finds out
        return Plan(tuple(times), self.forecasts(times), guidance=guidance, passes=passes)
