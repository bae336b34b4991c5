"""Trials of this library's policies that need something measured, or the number of steps.

MagCache    its ratios: on the calls that plans are calibrated on (`MagnitudeRecorder`)
lemica      its edges: one call of four images, gaps of up to LONGEST steps
mask        as many full steps spread evenly, and a Taylor sum for the others
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

import fewstep
from fewstep.caching import MagCache, MagnitudeRecorder, Scm, edge_costs
from fewstep.caching.schedules import evenly, minimax

from .ours import FEWER, said
from .trial import Study, Trial

MAG = (0.05, 0.1, 0.2, 0.4, 0.8)
LONGEST = 10
WARMUP = 3


@functools.cache
def _ratios(study: Study) -> tuple[float, ...]:
    pipe, recorder = study.pipeline(), MagnitudeRecorder()
    with fewstep.patch(pipe, cache=recorder):
        for call in study.calibration():
            pipe(**call)
    return recorder.ratios


@functools.cache
def _costs(study: Study) -> np.ndarray:
    calls = study.calibration(calls=1, images=4)
    return edge_costs(study.pipeline(), calls, longest=min(LONGEST, study.steps))


def _mag(pipe: Any, *, study: Study, **settings: Any) -> None:
    fewstep.patch(pipe, cache=MagCache(_ratios(study), **settings))


def _lemica(pipe: Any, *, study: Study, full_steps: int) -> dict[str, Any]:
    full = minimax(_costs(study), full_steps)
    fewstep.patch(pipe, cache=Scm.of(full, study.steps))
    return {"schedule": list(full)}


def _mask(pipe: Any, *, steps: int, full_steps: int, degree: int) -> None:
    full = evenly(steps, full_steps, warmup=WARMUP)
    fewstep.patch(pipe, cache=Scm.of(full, steps, degree=degree))


def trials(study: Study) -> Iterator[Trial]:
    """Yield their sweeps."""
    for threshold in MAG:
        # As diffusers' hook is tried: limits that would keep it from few full steps are lifted.
        settings = {"threshold": threshold, "max_skips": 10, "retention": 0.06}
        install = functools.partial(_mag, study=study, **settings)
        yield Trial("magcache", said(settings), install, "fewstep")
    counts = [max(1, study.steps // fewer) for fewer in FEWER]
    for full_steps in counts:
        install = functools.partial(_lemica, study=study, full_steps=full_steps)
        yield Trial("lemica", f"full_steps={full_steps}", install, "fewstep")
    for degree in (0, 2):
        for full_steps in counts:
            install = functools.partial(
                _mask, steps=study.steps, full_steps=full_steps, degree=degree
            )
            name = f"mask, degree {degree}"
            yield Trial(name, f"full_steps={full_steps}", install, "fewstep")
