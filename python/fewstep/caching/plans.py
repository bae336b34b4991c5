"""Choosing among several plans: by what they were calibrated for, by the grid and by a target.

Plans lie beside the checkpoint they belong to, in the folder `cache_plans` of a saved pipeline.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .plan import Plan
from .policy import Forecasts
from .scheduled import ScheduledSession

__all__ = ["FOLDER", "PlanChoice", "find_plans", "parse_target"]

FOLDER = "cache_plans"
DEFAULT_TARGET = "psnr>=40"
_TARGET = re.compile(r"psnr\s*>=\s*(\d+(?:\.\d+)?)")


def parse_target(target: str) -> float:
    """Return the PSNR in dB that a target asks for.

    Raises:
        ValueError: not such as "psnr>=30".
    """
    found = _TARGET.fullmatch(target) if isinstance(target, str) else None
    if found is None:
        raise ValueError(f'target: expected such as "psnr>=30", got {target!r}')
    return float(found[1])


def find_plans(
    folder: Path, denoiser: nn.Module, scheduler: Any, *others: nn.Module
) -> tuple[list[Plan], list[str]]:
    """Return the plans in a folder's files that fit a pipeline, and why the others don't."""
    plans, refused = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            plan = Plan.load(path)
        except ValueError as error:
            refused.append(f"{path.name}: {error}")
            continue
        mark = plan.fingerprint
        wrong = mark.differences(denoiser, scheduler, *others) if mark else []
        if wrong:
            refused.append(f"{path.name}: {wrong[0]}")
        else:
            plans.append(plan)
    return plans, refused


@dataclass(frozen=True)
class PlanChoice:
    """A policy that takes, on each grid, the plan for it that meets the target.

    A grid that no plan is for is served by one that is carried over to it (`Plan.at`): of those
    that meet the target on their own grids, one of the nearest count of steps. What that gives
    there has not been measured; reports say where it was done.

    Args:
        plans: to choose from.
        psnr: dB that a plan must have been measured to reach on average; of those that do, the one
            with the fewest full steps is taken.
        speedup: instead, steps per full step that a plan must give; of those that do, the one with
            the highest PSNR.

    Raises:
        ValueError: no plan meets the target; the message says the best there is.
    """

    plans: tuple[Plan, ...]
    psnr: float | None = None
    speedup: float | None = None

    scope = "output"

    @property
    def session(self) -> type[ScheduledSession]:
        """What follows the plans."""
        kinds = [plan.session for plan in self.plans if plan.guidance]
        return kinds[0] if kinds else ScheduledSession

    def __post_init__(self) -> None:
        if not self.plans:
            raise ValueError("plans: expected at least one, got none")
        if not self._meet(self.plans):
            said = "; ".join(
                f"{plan.speedup:.2f}x at {_reached(plan):.1f} dB ({len(plan.times)} steps)"
                for plan in self.plans
            )
            wanted = [] if self.psnr is None else [f"{self.psnr:g} dB"]
            wanted += [] if self.speedup is None else [f"{self.speedup:g}x"]
            raise ValueError(f"target: expected {' and '.join(wanted)}, got plans of {said}")

    def __repr__(self) -> str:
        return f"one of {', '.join(repr(plan) for plan in self.plans)}"

    @property
    def order(self) -> int:
        """Snapshots that the largest plan keeps."""
        return max(plan.order for plan in self.plans)

    def _meet(self, plans: Sequence[Plan]) -> list[Plan]:
        """Return the plans that meet the target, the best first."""
        meets = [
            plan
            for plan in plans
            if (self.psnr is None or _reached(plan) >= self.psnr)
            and (self.speedup is None or plan.speedup >= self.speedup)
        ]
        if self.speedup is not None:
            return sorted(meets, key=_reached, reverse=True)
        return sorted(meets, key=lambda plan: (-plan.speedup, -_reached(plan)))

    def on(self, times: Sequence[float], start: int = 0) -> Plan | None:
        """Return the plan for a grid, or one carried over; None, every step in full, without any.

        Of the plans for it, those calibrated on runs that start at the same step come first.
        """
        fits = [plan for plan in self.plans if plan.is_on(times)]
        alike = [plan for plan in fits if (plan.part or (0,))[0] == start]
        if meets := self._meet(alike) or self._meet(fits):
            return meets[0].on(times, start)
        return None if fits else self._carried_over(times, start)

    def _carried_over(self, times: Sequence[float], start: int) -> Plan | None:
        def distance(plan: Plan) -> tuple[float, bool]:
            first, count = plan.part or (0, len(plan.times))
            return abs(math.log(count / max(1, len(times)))), first != start

        for plan in sorted(self._meet(self.plans), key=distance):  # keeps the best first
            try:
                return plan.at(times).on(times, start)
            except ValueError:  # another range of times, or no Gram matrix
                continue
        return None

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions of the plan for a grid; all in full without one."""
        plan = self.on(times)
        return (None,) * len(times) if plan is None else plan.steps


def _reached(plan: Plan) -> float:
    return plan.predicted.get("psnr", -math.inf)
