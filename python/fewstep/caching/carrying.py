"""Plans on other grids than their own, and on parts of it.

    a part      of a grid (image to image, two pipelines that share one): the other steps run in
                full
    a start     in the middle: that step runs in full, and forecasts know the full steps from it on.
                A forecast that needs no other keeps its weights; the others are fitted anew
    a count     of steps: the full ones nearest to the plan's, weights from the Gram matrix
                interpolated between its times, plus what the plan's own corrections have shifted
                those of the same gap by (on the digits teacher worth 5 to 8 dB)

Samplers of second order give one time to two steps: the second is taken to lie a little later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .guard import Check
from .solve import affine_weights, gaps

if TYPE_CHECKING:
    from .plan import Plan

__all__ = ["carried_over", "embedded", "rows", "starting"]

Array = NDArray[np.float64]


def embedded(plan: Plan, times: Sequence[float]) -> Plan:
    """Return the plan of a part of a grid as one of the whole grid."""
    if plan.part is None:
        return plan
    first, total = plan.part
    before, behind = (None,) * first, (None,) * (total - first - len(plan.times))
    predicted = dict(plan.predicted)
    if errors := predicted.get("step_error"):
        predicted["step_error"] = [0.0] * first + list(errors) + [0.0] * len(behind)
    return replace(
        plan,
        times=tuple(times),
        steps=before + plan.steps + behind,
        guidance=before + plan.guidance + behind if plan.guidance else (),
        predicted=predicted,
        lookback=before + plan.lookback + behind if plan.lookback else (),
        gram=None,
        part=None,
    )


def starting(plan: Plan, start: int) -> Plan:
    """Return the plan for runs that start at one of its steps."""
    if start <= 0 or start >= len(plan.times) or plan.gram is None:
        return plan
    gram = np.asarray(plan.gram)
    steps: list[tuple[float, ...] | None] = [None] * len(plan.times)
    checks: list[Check | None] = [None] * len(plan.times)
    known: list[int] = []  # full steps of the run, newest first
    before = [index for index in reversed(plan.full) if index < start]  # and of the plan alone
    for index in range(start, len(plan.times)):
        own, check = plan.steps[index], plan.lookback[index] if plan.lookback else None
        if index == start:
            before = [index, *before] if own is None else before
        elif own is None:
            if check is not None:
                checks[index] = Check(_weights(plan, gram, known, index), check.expected)
            before.insert(0, index)
        elif known[: len(own)] == before[: len(own)]:
            steps[index] = own
        else:
            steps[index] = _weights(plan, gram, known, index)
        if steps[index] is None:
            known.insert(0, index)
    lookback = tuple(checks) if plan.lookback else ()
    return replace(plan, steps=tuple(steps), predicted={}, lookback=lookback)


def _weights(plan: Plan, gram: Array, known: list[int], index: int) -> tuple[float, ...]:
    return tuple(affine_weights(gram, known[: plan.order], index).tolist())


def _shifts(plan: Plan, gram: Array) -> dict[int, Array]:
    """Return what corrections have added to the weights of a gap, by the full step before it."""
    found: dict[int, Array] = {}
    known: list[int] = []
    for start, end in gaps(plan.full, len(plan.steps)):
        known.insert(0, start)
        if end > start + 1:
            own = np.asarray(plan.steps[start + 1])
            found[start] = own - affine_weights(gram, known[: len(own)], start + 1)
    return found


def carried_over(plan: Plan, times: Sequence[float], *, corrected: bool = True) -> Plan:
    """Return the plan for a grid with another count of steps; see `Plan.at`."""
    first, count = plan.part or (0, len(plan.times))
    if plan.gram is None:
        raise ValueError(
            f"cache: expected the plan's grid of {count} steps, got one of {len(times)}; the "
            "plan has no Gram matrix to be carried over with"
        )
    if not count / 2 <= len(times) <= count * 2:
        raise ValueError(
            f"cache: expected {-(-count // 2)} to {2 * count} steps, which the plan for "
            f"{count} can be carried over to, got {len(times)}"
        )
    part = None
    if plan.part is not None:
        first, mine = _inside(plan, times, count)
        part, times = (first, len(times)), mine
    _expect_range(plan, times)
    place = _places(times, plan.times)
    shifts = _shifts(plan, np.asarray(plan.gram)) if corrected else {}
    gram = _interpolate(np.asarray(plan.gram), place)
    nearest = {int(np.abs(place - index).argmin()) for index in plan.full}
    steps: list[tuple[float, ...] | None] = []
    checks: list[Check | None] = []
    known: list[int] = []
    for index in range(len(times)):
        weights = _weights(plan, gram, known, index)
        full = index in nearest or index == 0
        old = plan.lookback[round(place[index])] if plan.lookback else None
        judged = full and known and old is not None
        checks.append(Check(weights, old.expected) if judged else None)
        if full:
            known.insert(0, index)
            gap = min(plan.full, key=lambda own: abs(own - place[known[0]]))
        shift = shifts.get(gap, ())
        if len(shift) == len(weights):
            weights = tuple((np.asarray(weights) + shift).tolist())
        steps.append(None if full else weights)
    return replace(
        plan,
        times=tuple(times),
        steps=tuple(steps),
        predicted={},
        lookback=tuple(checks) if plan.lookback else (),
        gram=rows(gram),
        made={**plan.made, "carried_over_from": count},
        part=part,
    )


def _inside(plan: Plan, times: Sequence[float], count: int) -> tuple[int, tuple[float, ...]]:
    """Return the steps of a grid within half a step of a part's: the first one's place, times."""
    ends = sorted((plan.times[0], plan.times[-1]))
    span = max(ends[1] - ends[0], abs(times[0] - times[-1]) / count)
    reach = 0.5 * span / max(1, len(plan.times) - 1)
    chosen = [i for i, time in enumerate(times) if ends[0] - reach <= time <= ends[1] + reach]
    if not chosen:
        raise ValueError(
            f"cache: expected a grid with steps from {plan.times[0]:g} to {plan.times[-1]:g}, "
            f"which the plan is for, got {times[0]:g} to {times[-1]:g}"
        )
    return chosen[0], tuple(times[chosen[0] : chosen[-1] + 1])


def _expect_range(plan: Plan, times: Sequence[float]) -> None:
    """Raise ValueError where a grid doesn't start and end where the plan's does."""
    span = plan.times[0] - plan.times[-1]
    coarser = min(tuple(times), plan.times, key=len)
    for end, inside in ((0, 1), (-1, -2)):
        if abs(times[end] - plan.times[end]) > _last_step(coarser, span, end, inside):
            raise ValueError(
                f"cache: expected times from {plan.times[0]:g} to {plan.times[-1]:g}, up to a "
                "step more or less, where the plan can be carried over to, got "
                f"{times[0]:g} to {times[-1]:g}"
            )


def _last_step(times: tuple[float, ...], span: float, end: int, inside: int) -> float:
    """Return how wide a grid's steps are on average or at one end, whichever is more."""
    if len(times) == 1:
        return abs(span)
    mean = abs(times[0] - times[-1]) / (len(times) - 1)
    return max(mean, abs(times[end] - times[inside]))


def _places(times: Sequence[float], own: Sequence[float]) -> Array:
    """Return where times lie among a plan's own, in steps of these."""
    direction = 1.0 if own[0] < own[-1] else -1.0
    return np.interp(_rising(times, direction), _rising(own, direction), np.arange(len(own)))


def _rising(times: Sequence[float], direction: float) -> Array:
    """Return times so that they rise; where one is there twice, the second is a little later."""
    found = np.asarray(times, dtype=np.float64) * direction
    later = 1e-6 * max(abs(found[-1] - found[0]), 1e-9)
    again = np.concatenate([[False], found[1:] == found[:-1]])
    return found + later * again


def _interpolate(gram: Array, place: Array) -> Array:
    """Return the matrix at fractional rows and columns, bilinear."""
    low = np.clip(place.astype(int), 0, max(len(gram) - 2, 0))
    share = place - low
    spread = np.zeros((len(place), len(gram)))
    lines = np.arange(len(place))
    spread[lines, low] += 1 - share
    spread[lines, np.minimum(low + 1, len(gram) - 1)] += share
    return spread @ gram @ spread.T


def rows(matrix: Any) -> tuple[tuple[float, ...], ...]:
    """Return a matrix as a plan keeps it, to six digits."""
    return tuple(tuple(float(f"{value:.6g}") for value in row) for row in matrix)
