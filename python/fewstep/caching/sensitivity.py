"""How much a run amplifies an error that it has at one of its steps.

    x(b)      latents of runs that follow a plan before step b and are full from there on
    e         x(b) - x(a), a < b: what the plan's forecasts between a and b do
    gain_b    |e| at the end over |e| behind step b; rms over the samples

A denoiser damps errors in most directions, but not in those in which forecasts err: early in a run
some samples amplify these a hundredfold, since they stand between two images, while others don't.
The schedule's cost of a gap that ends at b times gain_b^2 is what it does to the image. Errors are
made by the plan itself: random ones say nothing, they are damped. And by the steps just before b:
older ones have turned to where they grow.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .policy import Forecasts
from .solve import Array

__all__ = ["gain", "gain_curve", "places"]

_PLACES = 5  # steps at which gains are measured; the curve between them is smooth


def places(forecasts: Forecasts) -> list[int]:
    """Return the steps at which to measure: ends of a plan's gaps, denser at the start."""
    skipped = [weights is not None for weights in forecasts]
    ends = [b for b in range(1, len(skipped)) if skipped[b - 1] and not skipped[b]]
    if not ends:
        return []
    chosen = np.geomspace(1, len(ends), min(_PLACES, len(ends))).round().astype(int) - 1
    return [ends[index] for index in sorted(set(chosen.tolist()))]


def gain(earlier: Tensor, latents: Tensor, step: int) -> float | None:
    """Return gain_b, or None where no sample is off there.

    Args:
        earlier: x(a), latents behind each step [S, N, P].
        latents: x(b).
        step: b.
    """
    before, after = (
        (latents[index] - earlier[index]).double().square().mean(1) for index in (step - 1, -1)
    )
    off = before > 0
    return (after[off] / before[off]).mean().sqrt().item() if off.any() else None


def gain_curve(measured: Iterable[tuple[int, float]], steps: int) -> Array | None:
    """Return gain_b at every b from 0 to S, log-linear between what was measured; None of none."""
    found = [(step, max(value, torch.finfo(torch.float32).tiny)) for step, value in measured]
    if not found:
        return None
    at, values = zip(*found, (steps, 1.0), strict=True)
    return np.exp(np.interp(np.arange(steps + 1), at, np.log(values)))
