"""Calibrating a plan on a few calls of a pipeline.

    once      every call in full: outputs m_i, latents x_b, responses R, Gram matrix of the outputs
    schedule  the cheapest chain of gaps (`solve.best_schedule`)
    weights   per step the affine forecast of the Gram matrix, which errs least step by step
    passes    every call with the plan as it stands, then per gap a..b a shift u of its weights,
              sum u = 0, that makes up for where the latents have got to:
              min | x_b(full) - x_b(plan) - drift - R u |^2

A pass takes the drift of earlier gaps into account as it changes: what their shifts do to later
latents is known from the responses. So the weights answer the states that the plan itself leads to,
which the Gram matrix of undisturbed runs can't; on the digits teacher that is worth 10 dB at 12 of
50 steps. The pass with the least error at the end is the plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from ._pipelines import denoisers_of, expect_calls, same_config, standing_in
from .fingerprint import Fingerprint
from .guard import Check
from .half_steps import Guidance, HalfSteps, Passes, find_guidance, watch_passes
from .output import OutputStack
from .plan import Plan
from .plans import parse_target
from .policy import Forecasts
from .quality import MOST, images_of, psnr
from .record import Run, record, repeatable, responses, seeded, takeovers
from .ring import MAX_ORDER
from .runs import Runs, expect_alike, expect_finite, gram_matrices, mean_squares
from .scheduled import ScheduledSession
from .sensitivity import gain, gain_curve, places
from .solve import affine_weights, best_stages, fit_affine, gap_costs, gaps

__all__ = ["calibrate"]


@contextmanager
def _following(
    pipe: Any, denoisers: tuple[nn.Module, ...], plan: Plan
) -> Iterator[ScheduledSession]:
    """Let the pipeline follow a plan."""
    session = plan.session(plan, lambda: pipe.scheduler)
    session.watch = True
    stands = (
        slot for denoiser in denoisers for slot in OutputStack(denoiser).replacements(session)
    )
    try:
        with standing_in(stands):
            yield session
    finally:
        session.close()


class Calibration:
    """The calls in full, and plans tried on them."""

    def __init__(
        self,
        pipe: Any,
        denoisers: tuple[nn.Module, ...],
        calls: list[Mapping[str, Any]],
        values: int,
        seed: int,
        progress: Progress,
        guidance: str = "off",
    ) -> None:
        self.pipe, self.denoisers, self.calls = pipe, denoisers, calls
        self.values, self.seed, self.progress = values, seed, progress
        self.guidance: set[float] = set()  # scales that the pipeline had
        # How the passes are combined, or why half steps can't be; None until it is known.
        self.branches: Guidance | str | None = None
        if guidance == "off" or len(denoisers) > 1:
            self.branches = "off" if guidance == "off" else "steps that two models share"
        self._scales: list[np.ndarray] = []
        self.bar = progress.add_task("in full", total=len(calls))
        mark = Fingerprint.of(denoisers[0], pipe.scheduler, *denoisers[1:])
        self.full, first = self._run()
        # The steps at which another model takes over, and the end.
        self.stages = [*takeovers(first.models), len(first.outputs)]
        self.mark = mark.without_rewritten(pipe.scheduler)
        self.steps = len(first.outputs)
        grid, end = len(first.times), first.start + self.steps
        self.times = first.times[first.start : end]
        self.part = None if len(self.times) == grid else (first.start, grid)
        if end > grid:
            raise ValueError(
                f"calls: expected one call of {type(pipe.scheduler).__name__}.step per timestep, "
                f"got {self.steps} from timestep {first.start} of {grid}: a sampler that goes "
                "back, or a pipeline that steps several tensors with it"
            )
        self.responses = responses(first)
        self.grams = gram_matrices(self.full.outputs)
        self.gram = self.grams.mean(0)
        self.sizes = mean_squares(self.full.latents).numpy()
        self.gains: np.ndarray | None = None
        self.half: HalfSteps | None = None
        if isinstance(self.branches, Guidance):
            self.half = HalfSteps(self, self.branches)
            self.full.passes = None  # of which nothing else is read

    def _run(self, session: ScheduledSession | None = None) -> tuple[Runs, Run]:
        runs: list[Run] = []
        errors: dict[int, list[float]] = defaultdict(list)
        parts: list[tuple[Tensor, Tensor] | None] = []
        # Runs with a plan without half steps are not corrected by their passes.
        looks = session is None or bool(session.policy.guidance)
        with repeatable(self.calls):
            for index, call in enumerate(self.calls):
                watching = record(self.pipe.scheduler, values=self.values, seed=self.seed)
                with (
                    seeded(self.seed + index),
                    watching as run,
                    run.watch(self.denoisers),
                    self._watch(run, looks) as passes,
                ):
                    run.images = images_of(self.pipe(**call))
                if isinstance(guidance := getattr(self.pipe, "guidance_scale", None), int | float):
                    self.guidance.add(float(guidance))
                self.progress.advance(self.bar)
                if not run.outputs:
                    raise ValueError(
                        f"calls: expected calls that step {type(self.pipe.scheduler).__name__}, "
                        f"got none in call {index}"
                    )
                runs.append(run)
                expect_alike(runs[0], run, index)
                expect_finite(run, index)
                if looks:
                    parts.append(self._part(passes, run, seen=session is not None))
                for branch in session.errors().values() if session else ():
                    for step, found in branch.items():
                        errors[step] += found
        outputs = torch.cat([torch.stack(run.outputs) for run in runs], 1)
        latents = torch.cat([torch.stack(run.latents) for run in runs], 1)
        passes = None
        if looks and not isinstance(self.branches, str):
            passes = tuple(torch.cat(part, 1) for part in zip(*parts, strict=True))
        return Runs(outputs, latents, [run.images for run in runs], errors, passes), runs[0]

    def _watch(self, run: Run, looks: bool) -> AbstractContextManager[Passes]:
        if not looks or isinstance(self.branches, str):
            return nullcontext({})
        return watch_passes(self.denoisers[0], run, self.values, self.seed)

    def _part(self, passes: Passes, run: Run, seen: bool) -> tuple[Tensor, Tensor] | None:
        """Return a run's guided pass and difference; None where they are not looked at."""
        if not seen and not isinstance(self.branches, str):
            found = find_guidance(self.denoisers[0], passes, run.outputs)
            before = self.branches or found
            if isinstance(found, Guidance) and found.passes != before.passes:
                found = "calls that compute the passes in different ways"
            elif isinstance(found, Guidance):
                self._scales.append(found.scales)
                found = Guidance(found.passes, np.mean(self._scales, 0))
            self.branches = found
        return None if isinstance(self.branches, str) else self.branches.split(passes)

    def _share(self, start: int, end: int, at: int) -> np.ndarray:
        """What a unit of each output in the gap start..end does to the latents of step `at`."""
        share = np.zeros(self.steps)
        share[start + 1 : end] = self.responses[at, start + 1 : end]
        return share

    def schedule(self, full_steps: int, power: float) -> tuple[int, ...]:
        """The full steps."""

        def rho(start: int, end: int) -> np.ndarray:
            return self._share(start, end, end) * self.weight(end)

        cost = gap_costs(self.grams, rho, power=power)
        return best_stages(self.stages, full_steps, cost)

    def weight(self, end: int) -> float:
        """How much an error of the latents that enter a step counts."""
        if self.gains is not None:
            return float(self.gains[end])
        return 1 / math.sqrt(self.sizes[end - 1] or 1.0)

    def measure_gains(self, order: int, power: float) -> None:
        """Find out by runs how much errors grow from each step on, and let schedules mind it."""
        count = max(len(self.stages), 3, self.steps // 4)
        if count >= self.steps:
            return
        steps = self.forecasts(self.schedule(count, power), order)
        measured, earlier = [], self.full.latents
        for place in places(steps):
            rest = (None,) * (self.steps - place)
            plan = Plan(self.times, steps[:place] + rest, self.mark, part=self.part)
            latents = self.follow(plan)[0].latents
            if (found := gain(earlier, latents, place)) is not None:
                measured.append((place, found))
            earlier = latents
        self.gains = gain_curve(measured, self.steps)

    def forecasts(self, full: tuple[int, ...], order: int) -> Forecasts:
        """Weights from the Gram matrix."""
        steps: list[tuple[float, ...] | None] = []
        known: list[int] = []
        for index in range(self.steps):
            if index in self.stages:
                known.clear()
            if index in full:
                known.insert(0, index)
                steps.append(None)
            else:
                steps.append(tuple(affine_weights(self.gram, known[:order], index).tolist()))
        return tuple(steps)

    def checks(self, full: tuple[int, ...], order: int) -> tuple[Check | None, ...]:
        """What the guard compares, nothing expected yet."""
        checks: list[Check | None] = [None] * self.steps
        for place, index in enumerate(full):
            stage = max((begin for begin in self.stages if begin < index), default=0)
            known = () if index in self.stages else full[:place][::-1][:order]
            known = tuple(step for step in known if step >= stage)
            if known:
                weights = affine_weights(self.gram, known, index)
                checks[index] = Check(tuple(float(f"{x:.7g}") for x in weights))
        return tuple(checks)

    def follow(self, plan: Plan) -> tuple[Runs, ScheduledSession]:
        """Run all calls with a plan."""
        what = f"{len(plan.full)} of {self.steps} steps in full"
        self.bar = self.progress.add_task(what, total=len(self.calls))
        with _following(self.pipe, self.denoisers, plan) as session:
            return self._run(session)[0], session

    def try_out(self, plan: Plan) -> tuple[Runs, dict[str, Any]]:
        """Run all calls with a plan; return the runs and what they lost."""
        runs, session = self.follow(plan)
        self.given = session.size
        size = mean_squares(self.full.outputs)
        error = mean_squares(runs.outputs, self.full.outputs)
        lost = psnr(self.full.images, runs.images)
        of = "images"
        if lost is None:
            lost, of = psnr([self.full.latents[-1]], [runs.latents[-1]]), "latents"
        final = (runs.latents[-1] - self.full.latents[-1]).double().square().mean().item()
        predicted = {
            "psnr": float(np.mean(lost)),
            "psnr_min": float(np.min(lost)),
            "samples": len(lost),
            "of": of,
            "final_mse": final,
            "step_error": [float(f"{value:.4g}") for value in (error / size).sqrt().tolist()],
        }
        return runs, predicted

    def correct(self, steps: Forecasts, base: Forecasts, runs: Runs) -> Forecasts:
        """Shift the weights of every gap so that the latents behind it are those of full runs.

        Args:
            steps: the plan that `runs` followed.
            base: the weights that shifts are measured from.
            runs: what it led to.
        """
        full = tuple(index for index, weights in enumerate(steps) if weights is None)
        corrected = list(steps)
        moved: list[tuple[int, int, Tensor]] = []  # gap, change of its outputs [N, P]
        for place, (start, end) in enumerate(gaps(full, self.steps)):
            if end == start + 1:
                continue
            order = len(steps[start + 1])
            known = full[place : place - order if place >= order else None : -1]
            snapshots = runs.outputs[list(known)].double().flatten(1)  # [K, N * P]
            missed = (self.full.latents[end - 1] - runs.latents[end - 1]).double()
            for other_start, other_end, change in moved:
                missed = missed - self._share(other_start, other_end, end).sum() * change
            reach = self._share(start, end, end).sum()
            before = np.subtract(steps[start + 1], base[start + 1])
            shift = fit_affine(
                (reach**2 * snapshots @ snapshots.T).numpy(),
                (reach * snapshots @ missed.flatten()).numpy(),
                0.0,
                prior=-before,
            )
            for index in range(start + 1, end):
                moved_to = np.asarray(steps[index]) + shift
                corrected[index] = tuple(float(f"{x:.7g}") for x in moved_to)
            change = torch.from_numpy(shift) @ snapshots
            moved.append((start, end, change.view_as(missed)))
        return tuple(corrected)

    def plan(self, full_steps: int, order: int, passes: int, power: float) -> Plan:
        """The best plan with so many full steps, or half steps of as many evaluations."""
        plan = self._plan(full_steps, order, passes, power)
        if self.branches == "off":
            return plan
        other, why = None, self.branches
        if self.half is not None and full_steps < self.steps:
            why = "no split of so few evaluations"
            other = self.half.plan(full_steps, order, passes, power, plan.made)
        elif self.half is not None:
            why = "every step runs in full"
        if other is not None and other.predicted["psnr"] > plan.predicted["psnr"]:
            return other
        if other is not None:
            levels = [one.predicted["psnr"] for one in (other, plan)]
            why = "no better: {:.1f} dB with them, {:.1f} without".format(*levels)
        return replace(plan, made={**plan.made, "half_steps": why})

    def _plan(self, full_steps: int, order: int, passes: int, power: float) -> Plan:
        """The best plan of full and skipped steps alone."""
        full = self.schedule(full_steps, power)
        base = steps = self.forecasts(full, order)
        plan = Plan(
            self.times,
            steps,
            self.mark,
            lookback=self.checks(full, order),
            gram=tuple(tuple(float(f"{value:.6g}") for value in row) for row in self.gram),
            made={"calls": len(self.calls), "order": order, "passes": passes, "tail": power},
            part=self.part,
        )
        best = plan
        if self.guidance:
            plan.made["guidance"] = [min(self.guidance), max(self.guidance)]
        if full_steps == self.steps:
            passes = 0  # nothing is forecast, so there is nothing to correct
        for turn in range(passes + 1):
            runs, predicted = self.try_out(replace(plan, steps=steps))
            if not best.predicted or predicted["final_mse"] < best.predicted["final_mse"]:
                expected = {step: float(np.mean(errors)) for step, errors in runs.errors.items()}
                judged = tuple(
                    check._replace(expected=expected[step]) if check and step in expected else None
                    for step, check in enumerate(plan.lookback)
                )
                made = {**plan.made, "size": list(self.given)}
                best = replace(plan, steps=steps, predicted=predicted, lookback=judged, made=made)
            if turn < passes:
                steps = self.correct(steps, base, runs)
        return best


def _check(**counts: int) -> None:
    for name, value in counts.items():
        least = 0 if name == "passes" else 1
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an integer, got {type(value).__name__} {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")


def calibrate(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    full_steps: int | None = None,
    speedup: float | None = None,
    target: str | None = None,
    order: int = 4,
    passes: int = 2,
    tail: float = 1.0,
    values: int = 65536,
    seed: int = 0,
    progress: bool = False,
    guidance: str = "off",
    sensitivity: bool = False,
) -> Plan:
    """Find out which steps of a pipeline's calls need to run in full, and forecast the others.

    Runs every call once in full and passes + 1 times with a plan, twice that with guidance="auto";
    with `target` that for several counts of full steps.

    Args:
        pipe: a diffusers pipeline with a transformer or UNet, and a scheduler.
        calls: 4 to 16 keyword dicts, each run as `pipe(**call)`, all on the same grid, or the same
            part of it, and of one size. What is drawn at random is drawn the same way in every
            round of the calls; those that share a generator draw from it one after the other.
        full_steps: how many steps run in full; a quarter of them where nothing is said.
        speedup: instead of it, steps per full step.
        target: instead of both, the least full steps for a mean PSNR over the calls' images (over
            the latents where a call returns none), such as "psnr>=30". Found by bisection, which
            takes for granted that more full steps do not lose quality.
        order: K, the most snapshots that a forecast sums, up to 8; each is as large as the model's
            output.
        passes: times that the weights are corrected by runs with the plan.
        tail: p of the mean over samples in the schedule's cost; large values mind the worst sample.
        values: elements of each image's tensors that are looked at. Those of two rounds are held,
            each 8 bytes per value, step and image: at 50 steps 25 MiB an image. With half steps one
            of them takes twice as much.
        seed: of that choice, and of what calls draw without a generator.
        progress: draw bars, one per round of the calls, on stderr.
        guidance: "auto" also tries plans that forecast the unguided pass alone on some steps, with
            as many evaluations as `full_steps` have, and returns the better one; "off" doesn't. The
            plan's `made["half_steps"]` says why it has none, such as that what the scheduler gets
            is no sum of two passes.
        sensitivity: whether the schedule weighs errors by how much the runs amplify them
            (`sensitivity`), which takes up to five more rounds of the calls, most of their steps in
            full.

    Returns:
        The plan. The pipeline, its scheduler's configuration and the calls' generators are as they
        were.

    Raises:
        TypeError: not a pipeline with a model that can be cached.
        ValueError: a compiled model; no call, calls on several grids or of several sizes, outputs
            that are not finite; a count out of range, a target that is none, several of full_steps,
            speedup and target.
    """
    denoisers = denoisers_of(pipe)
    if not isinstance(sensitivity, bool):
        raise TypeError(f"sensitivity: expected a bool, got {sensitivity!r}")
    if guidance not in ("auto", "off"):
        raise ValueError(f"guidance: expected 'auto' or 'off', got {guidance!r}")
    wishes = {"full_steps": full_steps, "speedup": speedup, "target": target}
    said = [name for name, value in wishes.items() if value is not None]
    if len(said) > 1:
        raise ValueError(
            f"{said[1]}: expected one of {', '.join(wishes)}, got {' and '.join(said)}"
        )
    if not said:
        speedup = 4.0
    _check(full_steps=1 if full_steps is None else full_steps)
    _check(order=order, passes=passes, values=values)
    if order > MAX_ORDER:
        raise ValueError(f"order: expected at most {MAX_ORDER}, got {order}")
    wanted = None if target is None else parse_target(target)
    if wanted is not None and wanted > MOST:
        raise ValueError(
            f"target: expected at most {MOST:g} dB, what equal images count as, got {target!r}"
        )
    for name, value in (("tail", tail), ("speedup", 1.0 if speedup is None else speedup)):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 1 <= value < math.inf:
            raise ValueError(f"{name}: expected a finite number of at least 1, got {value!r}")
    calls = expect_calls(calls)
    bars = Progress(console=Console(stderr=True), disable=not progress)
    with torch.no_grad(), same_config(pipe.scheduler), bars:
        found = Calibration(pipe, denoisers, calls, values, seed, bars, guidance)
        if sensitivity:
            found.measure_gains(order, tail)
        if wanted is not None:
            return _cheapest(found, wanted, order, passes, tail)
        if full_steps is None:
            if said and speedup > found.steps:
                raise ValueError(
                    f"speedup: expected at most {found.steps}, the calls' steps, got {speedup:g}"
                )
            full_steps = max(1, math.floor(found.steps / speedup))
        if full_steps > found.steps:
            raise ValueError(
                f"full_steps: expected at most the calls' {found.steps} steps, got {full_steps}"
            )
        return found.plan(full_steps, order, passes, tail)


def _cheapest(found: Calibration, wanted: float, order: int, passes: int, tail: float) -> Plan:
    """Bisect for the fewest full steps whose plan reaches the PSNR, as if it grew with them."""
    low, high, best = len(found.stages), found.steps, None
    while low < high:
        middle = (low + high) // 2
        plan = found.plan(middle, order, passes, tail)
        if plan.predicted["psnr"] >= wanted:
            best, high = plan, middle
        else:
            low = middle + 1
    if best is None:
        best = found.plan(high, order, passes, tail)
    return best
