"""Trials of EasyCache (arXiv 2507.02860), written from the paper: it comes in no package.

    x_t, v_t    what the guided call of the model gets and gives at step t
    k           mean |v_p - v_q| / mean |x_p - x_q|     of the last full steps p, q
    E           += k mean |x_t - x_{t-1}| / mean |v_p|  at every step after p
    skip        while E < threshold: v = x_t + (v_p - x_p); the unguided call does likewise

The first 3 steps and the last one run in full, as the paper asks of some.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .trial import Study, Trial

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3)
WARMUP = 3


class EasyCache:
    """Stands for the transformer's `forward`."""

    def __init__(self, pipe: Any, threshold: float) -> None:
        self.pipe, self.threshold = pipe, threshold
        self.below, self.null = pipe.transformer.forward, pipe.num_classes
        self.reset()

    def reset(self) -> None:
        """Forget the run."""
        self.full, self.rate, self.error = True, None, 0.0
        self.entered: Tensor | None = None  # x of the step before
        self.kept: tuple[Tensor, Tensor] | None = None  # x, v of the last full step
        self.shifts: dict[bool, Tensor] = {}  # v - x there, by branch

    def decide(self, x: Tensor, step: int) -> None:
        """Set whether this step is full."""
        last = step == len(self.pipe.scheduler.timesteps) - 1
        self.full = step < WARMUP or last or self.rate is None
        if not self.full:
            moved = (x - self.entered).abs().mean() / self.kept[1].abs().mean()
            self.error += float(self.rate * moved)
            self.full = self.error >= self.threshold
        if self.full:
            self.error = 0.0
        self.entered = x

    def __call__(self, x: Tensor, **kwargs: Any) -> tuple[Tensor]:
        unguided = int(kwargs["class_labels"][0]) == self.null
        step = self.pipe.scheduler.step_index or 0
        if not unguided:
            if step == 0:
                self.reset()
            self.decide(x, step)
        if not self.full:
            return (x + self.shifts[unguided],)
        (v,) = self.below(x, **kwargs)
        self.shifts[unguided] = v - x
        if not unguided:
            if self.kept is not None:
                was_x, was_v = self.kept
                self.rate = (v - was_v).abs().mean() / (x - was_x).abs().mean()
            self.kept = x, v
        return (v,)


def _install(pipe: Any, threshold: float) -> None:
    pipe.transformer.forward = EasyCache(pipe, threshold)


def trials(study: Study) -> Iterator[Trial]:
    """Yield the sweep of its threshold."""
    for threshold in THRESHOLDS:
        install = functools.partial(_install, threshold=threshold)
        yield Trial("EasyCache's rule", f"threshold={threshold}", install)
