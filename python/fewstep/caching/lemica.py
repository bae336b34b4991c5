"""LeMiCa: a schedule whose worst gap harms the final latents least (arXiv 2511.00090).

    cost [a, b]    mean over the images of |x - x_full| / |x_full|, x the final latents of a run
                   where all steps but those between a and b are full; these get the output of a
    schedule       the chain of gaps whose list of costs, worst first, is the least (`minimax`)

What an edge costs is measured by running it. Up to step a such a run is the full run, whose outputs
are kept, so that nothing of the model runs before step b. Still that is a run of most of the steps
for every edge: few calls, with no more steps and images than it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._checks import check_choice, check_count
from ._pipelines import expect_calls, only_denoiser_of, same_config, standing_in
from ._wrap import Followed, follow
from .calls import Call
from .kept import SCOPES
from .methods import Scm
from .output import take_apart
from .policy import Interval
from .record import Run, record, repeatable, seeded
from .schedules import minimax
from .session import Session

__all__ = ["edge_costs", "lemica"]


class _Tape(Session):
    """The outputs of the full run by branch and step, and which of them are played back."""

    def __init__(self, scheduler: Callable[[], Any]) -> None:
        super().__init__(Interval(1), scheduler)  # its decisions are never asked for
        self.outputs: dict[tuple[str, int], tuple[tuple[Any, ...], Callable[..., Any]]] = {}
        self.gap: tuple[int, int] | None = None  # (a, b); None records


class _Rehearsed(Followed):
    """`forward` of the model; steps before the end of the gap are played back."""

    session: _Tape

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tape = self.session
        if call.branch is None:
            return self.below(*args, **kwargs)
        name = call.branch.name
        if tape.gap is None:
            output = self.below(*args, **kwargs)
            parts, rebuild = take_apart(output)
            # Copies, both ways: pipelines may write to what a model returns.
            tape.outputs[name, call.step] = _copies(parts), rebuild
            return output
        start, end = tape.gap
        kept = tape.outputs.get((name, min(call.step, start)))
        if call.step >= end or kept is None:
            return self.below(*args, **kwargs)
        return kept[1](_copies(kept[0]))


def _copies(parts: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(part.clone() if isinstance(part, Tensor) else part for part in parts)


@contextmanager
def _rehearsing(pipe: Any, denoiser: nn.Module) -> Iterator[_Tape]:
    tape = _Tape(lambda: pipe.scheduler)
    try:
        with standing_in(follow(denoiser, tape, ignore=(), kind=_Rehearsed)):
            yield tape
    finally:
        tape.close()


def _latents(pipe: Any, call: Mapping[str, Any], values: int, seed: int) -> tuple[Tensor, Run]:
    with repeatable([call]), seeded(seed), record(pipe.scheduler, values=values, seed=seed) as run:
        pipe(**call)
    if run.start or len(run.outputs) != len(run.times):
        raise ValueError(
            f"calls: expected whole runs with one step of {type(pipe.scheduler).__name__} per "
            f"timestep, got {len(run.outputs)} steps from step {run.start} on, of "
            f"{len(run.times)} timesteps"
        )
    return run.latents[-1], run


def edge_costs(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    longest: int = 8,
    values: int = 65536,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Return the costs [S, S + 1] of the module's header, infinite for longer gaps.

    Args:
        pipe: a diffusers pipeline with a transformer or UNet, and a scheduler.
        calls: keyword dicts, each run as `pipe(**call)` about S times `longest` times.
        longest: the most steps from one full step to the next.
        values: elements of each image's latents that are looked at.
        seed: of that choice, and of what calls draw without a generator.

    Raises:
        TypeError: not a pipeline with a model that can be cached.
        ValueError: a compiled or cached model, two models that share the steps, no call, runs of a
            part of a grid or of several numbers of steps.
    """
    check_count("longest", longest, 1)
    check_count("values", values, 1)
    calls = expect_calls(calls)
    _count_steps(pipe, calls, seed)
    return _measure(pipe, calls, longest, values, seed)


def _measure(
    pipe: Any, calls: list[Mapping[str, Any]], longest: int, values: int, seed: int
) -> NDArray[np.float64]:
    denoiser = only_denoiser_of(pipe)
    total: Any = 0.0
    with torch.no_grad(), same_config(pipe.scheduler), _rehearsing(pipe, denoiser) as tape:
        for index, call in enumerate(calls):
            tape.gap = None
            tape.outputs.clear()
            want, run = _latents(pipe, call, values, seed + index)
            steps = len(run.times)
            costs = np.full((steps, steps + 1), np.inf)
            costs[np.arange(steps), np.arange(1, steps + 1)] = 0.0
            for start in range(steps - 1):
                for end in range(start + 2, min(start + longest, steps) + 1):
                    tape.gap = start, end
                    found, _ = _latents(pipe, call, values, seed + index)
                    change = (found - want).abs().sum(1) / want.abs().sum(1)
                    costs[start, end] = change.double().mean().item()
            total = total + costs / len(calls)
    return total


def lemica(
    pipe: Any,
    calls: Iterable[Mapping[str, Any]],
    *,
    full_steps: int,
    longest: int | None = None,
    scope: str = "output",
    values: int = 65536,
    seed: int = 0,
) -> Scm:
    """Return LeMiCa's policy for a pipeline's calls.

    Args:
        pipe: a diffusers pipeline with a transformer or UNet, and a scheduler.
        calls: keyword dicts, each run as `pipe(**call)` about S times `longest` times.
        full_steps: how many of the steps run in full.
        longest: the most steps from one full step to the next; twice the mean where nothing is
            said.
        scope: "output" or "blocks": what the policy repeats.
        values: elements of each image's latents that are looked at.
        seed: of that choice, and of what calls draw without a generator.

    Raises:
        TypeError: not a pipeline with a model that can be cached.
        ValueError: a compiled or cached model, two models that share the steps, no call, runs of a
            part of a grid or of several numbers of steps, more full steps than a run has, or gaps
            too short for so few. All of it before anything is measured.
    """
    check_count("full_steps", full_steps, 1)
    check_count("values", values, 1)
    if longest is not None:
        check_count("longest", longest, 1)
    check_choice("scope", scope, SCOPES)
    calls = expect_calls(calls)
    steps = _count_steps(pipe, calls, seed)
    if full_steps > steps:
        raise ValueError(f"full_steps: expected at most the run's {steps} steps, got {full_steps}")
    if longest is None:
        longest = 2 * math.ceil(steps / full_steps)
    if full_steps * longest < steps:
        raise ValueError(
            f"longest: expected at least {math.ceil(steps / full_steps)} for {full_steps} of "
            f"{steps} steps in full, got {longest}"
        )
    costs = _measure(pipe, calls, longest, values, seed)
    return Scm.of(minimax(costs, full_steps), steps, scope=scope)


def _count_steps(pipe: Any, calls: list[Mapping[str, Any]], seed: int) -> int:
    """Return how many steps all calls have, found by running each once."""
    only_denoiser_of(pipe)
    with torch.no_grad(), same_config(pipe.scheduler):
        counts = [len(_latents(pipe, call, 1, seed)[1].times) for call in calls]
    for index, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"calls: expected one number of steps in all calls, {counts[0]}, got {count} in "
                f"call {index}"
            )
    return counts[0]
