"""Calibrating plans with half steps: the guided pass computed, the unguided one forecast.

    m = c + (g - 1) d,  d = c - u          guided pass c, unguided pass u
    budget 2 F      evaluations: n steps compute c, 2 F - n of these u, too
    split           the n whose schedules cost least: gaps of c plus gaps of d, one dynamic
                    programme each, the second over the steps of the first
    passes          as without half steps; the shift of a gap is of the weights of c on its skipped
                    steps and of the weights of d on all that forecast it, both of sum zero

g and which of the two passes is the guided one follow from what the scheduler gets: m is solved
for. What is no such sum (rescaled guidance, passes left out on some steps) has no half steps.
"""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .guided import guided_half, rows_of
from .inputs import input_of
from .output import take_apart
from .plan import Plan
from .policy import Forecasts
from .record import Run, sample_of
from .runs import Runs, gram_matrices
from .solve import Array, affine_weights, best_schedule, gap_costs, gaps

if TYPE_CHECKING:
    from .calibrate import Calibration

__all__ = ["Guidance", "HalfSteps", "Passes", "find_guidance", "watch_passes"]

# How far m may be off the sum, relative: it has the model's precision, bfloat16 at worst.
_OFF = 0.02
_RIDGE = 1e-6  # of the shifts, relative to each one's own term
# Shares of the full steps that are tried as the steps that compute the unguided pass.
_SHARES = (0.25, 0.33, 0.42, 0.5, 0.59, 0.67, 0.75, 0.84, 0.92)


class Passes(defaultdict[int, list[Tensor]]):
    """Per step what the model returned, call by call: [rows, P].

    Attributes:
        first: arguments, named ones and first output of the first call.
    """

    def __init__(self) -> None:
        super().__init__(list)
        self.first: tuple[Any, Any, Tensor] | None = None


@dataclass
class Guidance:
    """How a pipeline computes its passes.

    Args:
        passes: one of `guided.PASSES`.
        scales: g by step [S].
    """

    passes: str
    scales: Array

    def split(self, found: Passes) -> tuple[Tensor, Tensor]:
        """Return c and d, each [S, B, P]."""
        pairs = []
        for step in sorted(found):
            first, *others = found[step]
            if self.passes == "calls":
                pairs.append((first, others[0]))
            else:
                mine = guided_half(self.passes, len(first))
                other = slice(0, mine.start) if mine.start else slice(mine.stop, None)
                pairs.append((first[mine], first[other]))
        guided = torch.stack([pair[0] for pair in pairs])
        return guided, guided - torch.stack([pair[1] for pair in pairs])


@contextmanager
def watch_passes(denoiser: nn.Module, run: Run, values: int, seed: int) -> Iterator[Passes]:
    """Keep what every call of the model returns, by step of the run that is being recorded."""
    found = Passes()

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        first = take_apart(output)[0][0]
        found.first = found.first or (args, kwargs, first)
        found[len(run.outputs)].append(sample_of(first, values, seed))

    handle = denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def find_guidance(denoiser: nn.Module, found: Passes, outputs: list[Tensor]) -> Guidance | str:
    """Return how a run's passes make up what the scheduler got, or why they don't.

    Args:
        denoiser: the model, which is asked for a half of its first batch where passes share one.
        found: what the model returned.
        outputs: m by step, [B, P].
    """
    scales, kinds = [], set()
    for step, output in enumerate(outputs):
        got, rows = found.get(step, []), len(output)
        if any(one.shape[1:] != output.shape[1:] for one in got):
            return "the model's output is not of the form that the scheduler gets"
        shapes = [len(one) for one in got]
        if shapes == [rows, rows]:
            first, second = got
        elif shapes == [2 * rows]:
            first, second = got[0].chunk(2)
        else:
            return f"no two guidance passes at step {step}"
        change = (first - second).double()
        size = change.square().sum().item()
        share = ((output - second).double() * change).sum().item() / size if size else 0.0
        off = (output - second).double() - share * change
        if off.square().mean() > (_OFF * output.double().square().mean().sqrt()) ** 2:
            return f"what the scheduler gets at step {step} is no sum of two passes"
        in_first = share >= 0.5
        half = "first half" if in_first else "second half"
        kinds.add(("calls" if in_first else "unguided first") if len(got) == 2 else half)
        scales.append(share if in_first else 1 - share)
    if len(kinds) > 1:
        return "which pass is the guided one changes"
    (kind,) = kinds
    if kind == "unguided first":
        return "the unguided pass is computed first: what it is forecast from is not known by then"
    if kind != "calls" and not _serves_halves(denoiser, found.first, kind):
        return "the model gives something else on half of the batch"
    return Guidance(kind, np.asarray(scales))


def _serves_halves(denoiser: nn.Module, call: tuple[Any, Any, Tensor], passes: str) -> bool:
    """Whether the model gives on the guided half of a batch what it gives on all of it."""
    args, kwargs, output = call
    rows = guided_half(passes, len(output))
    given = inspect.signature(denoiser.forward).bind_partial(*args, **kwargs).arguments
    lists = isinstance(input_of(given), list)
    mine = rows_of((args, kwargs), rows, len(output), lists=lists)
    try:
        alone = denoiser(*mine[0], **mine[1])
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    first, wanted = take_apart(alone)[0][0], output[rows]
    if first.shape != wanted.shape:
        return False
    off = (first - wanted).double().square().mean().sqrt()
    return bool(off <= _OFF * wanted.double().square().mean().sqrt())


class _Split(NamedTuple):
    """Steps that compute the guided pass, and those of them that compute both."""

    guided: tuple[int, ...]
    full: tuple[int, ...]


class HalfSteps:
    """Plans with half steps of a calibration's calls; the full runs' passes are read once, here."""

    def __init__(self, found: Calibration, guidance: Guidance) -> None:
        self.found, self.guidance = found, guidance
        self.steps = found.steps
        # What a unit of d moves: g - 1 times what one of m does.
        self.of_difference = found.responses * (guidance.scales - 1)[None]
        guided, difference = found.full.passes
        self.grams = gram_matrices(guided), gram_matrices(difference)

    def _reach(self, matrix: Array, start: int, end: int) -> Array:
        share = np.zeros(self.steps)
        share[start + 1 : end] = matrix[end, start + 1 : end]
        return share * self.found.weight(end)

    def split(self, full_steps: int, power: float) -> _Split | None:
        """The cheapest split of the budget; None where there is none with half steps."""
        of_guided = gap_costs(
            self.grams[0],
            lambda start, end: self._reach(self.found.responses, start, end),
            power=power,
        )
        of_difference = gap_costs(
            self.grams[1],
            lambda start, end: self._reach(self.of_difference, start, end),
            power=power,
        )
        best: tuple[float, _Split] | None = None
        for count in sorted({max(1, round(share * full_steps)) for share in _SHARES}):
            more = 2 * full_steps - count
            if count >= full_steps or more > self.steps:
                continue
            guided = best_schedule(self.steps, more, of_guided)
            places = {*guided, self.steps}

            def cost(known: tuple[int, ...], end: int, places: set[int] = places) -> float:
                return of_difference(known, end) if end in places else math.inf

            full = best_schedule(self.steps, count, cost)
            total = _total(guided, self.steps, of_guided) + _total(full, self.steps, of_difference)
            if set(full) <= places and (best is None or total < best[0]):
                best = total, _Split(guided, full)
        return None if best is None else best[1]

    def _forecasts(self, gram: Array, known: tuple[int, ...], order: int) -> Forecasts:
        mean, newest = gram.mean(0), []
        steps: list[tuple[float, ...] | None] = []
        for index in range(self.steps):
            if index in known:
                newest.insert(0, index)
                steps.append(None)
            else:
                steps.append(tuple(affine_weights(mean, newest[:order], index).tolist()))
        return tuple(steps)

    def correct(self, plan: Plan, base: Plan, runs: Runs) -> Plan:
        """Shift the weights of every gap so that the latents behind it are those of full runs."""
        guided, difference = runs.passes
        responses, order = self.found.responses, plan.made["order"]
        steps, second = list(plan.steps), list(plan.guidance)
        computed = tuple(i for i, weights in enumerate(plan.steps) if weights is None)
        moved: list[tuple[Array, Tensor]] = []  # per set of weights: responses [S + 1], change
        for start, end in gaps(computed, self.steps):
            sets = []
            for matrix, snapshots, given, at_base, chosen in (
                (responses, guided, steps, base.steps, computed),
                (self.of_difference, difference, second, base.guidance, plan.full),
            ):
                places = [i for i in range(start, end) if given[i] is not None]
                known = [i for i in chosen if i <= start][: -order - 1 : -1]
                if places and len(known) > 1:
                    before = np.subtract(at_base[places[0]], given[places[0]])
                    reach = matrix[:, places].sum(1)
                    sets.append((given, places, snapshots[known].double(), reach, before))
            missed = (self.found.full.latents[end - 1] - runs.latents[end - 1]).double()
            for reach, change in moved:
                missed = missed - reach[end] * change
            if not sets:
                continue
            basis = torch.cat([reach[end] * taken for _, _, taken, reach, _ in sets]).flatten(1)
            shift = _fit_shifts(
                (basis @ basis.T).numpy(),
                (basis @ missed.flatten()).numpy(),
                [len(before) for *_, before in sets],
                np.concatenate([before for *_, before in sets]),
            )
            for given, places, taken, reach, before in sets:
                own, shift = shift[: len(before)], shift[len(before) :]
                for index in places:
                    to = np.asarray(given[index]) + own
                    given[index] = tuple(float(f"{x:.7g}") for x in to)
                moved.append((reach, torch.einsum("k,knp->np", torch.from_numpy(own), taken)))
        return replace(plan, steps=tuple(steps), guidance=tuple(second))

    def plan(
        self, full_steps: int, order: int, passes: int, power: float, made: Mapping[str, Any]
    ) -> Plan | None:
        """The best plan with half steps of so many full steps' evaluations, if there is any."""
        split = self.split(full_steps, power)
        if split is None:
            return None
        base = plan = Plan(
            self.found.times,
            self._forecasts(self.grams[0], split.guided, order),
            self.found.mark,
            gram=tuple(tuple(float(f"{x:.6g}") for x in row) for row in self.found.gram),
            made={**made, "scale": float(f"{self.guidance.scales.mean():.4g}")},
            guidance=self._forecasts(self.grams[1], split.full, order),
            passes=self.guidance.passes,
            part=self.found.part,
        )
        best: Plan | None = None
        for turn in range(passes + 1):
            runs, predicted = self.found.try_out(plan)
            if best is None or predicted["final_mse"] < best.predicted["final_mse"]:
                made = {**plan.made, "size": list(self.found.given)}
                best = replace(plan, predicted=predicted, made=made)
            if turn < passes:
                plan = self.correct(plan, base, runs)
        return best


def _total(known: tuple[int, ...], steps: int, cost: Any) -> float:
    ends = (*known[1:], steps)
    return sum(cost(known[: i + 1][-2:], end) for i, end in enumerate(ends))


def _fit_shifts(normal: Array, right: Array, sizes: list[int], prior: Array) -> Array:
    """Return w that minimises w'Aw - 2 b'w + ridge |w - prior|^2, of sum 0 in each set.

    Args:
        normal: A [K, K].
        right: b [K].
        sizes: of the sets, one behind the other.
        prior: weights to stay close to.
    """
    order, sets = len(right), len(sizes)
    lift = _RIDGE * np.maximum(np.diag(normal), np.finfo(float).tiny)
    system = np.zeros((order + sets, order + sets))
    system[:order, :order] = normal + np.diag(lift)
    member = np.repeat(np.arange(sets), sizes)
    for own in range(sets):
        system[order + own, :order] = system[:order, order + own] = member == own
    return np.linalg.solve(system, np.append(right + lift * prior, np.zeros(sets)))[:order]
