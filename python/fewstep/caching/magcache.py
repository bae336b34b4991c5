"""MagCache: skip while the residual's magnitude can be foretold (arXiv 2506.09045).

    r_i         what step i keeps: the blocks' residual, or the model's output
    gamma_i     mean over tokens of |r_i| / |r_{i-1}|, norms over the channels; gamma_0 = 1
    at step i   p := p gamma_i;  e := e + |1 - p|
    skip        e <= threshold and no more than max_skips in a row; else run, p := 1, e := 0

The first retention S + 1/2 steps always run. The ratios are those of a checkpoint, hardly of a
prompt, so that they make a schedule before the run; what the newest full step kept stands for a
skipped one's. For another number of steps the nearest ratio on the grid is taken. These are the
decisions of diffusers' MagCacheConfig. A `MagnitudeRecorder` measures the ratios:

    recorder = MagnitudeRecorder()
    with fewstep.patch(pipe, cache=recorder):
        pipe(prompt)
    fewstep.patch(pipe, cache=MagCache(recorder.ratios))
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, check_count, check_number, to_numbers
from .calls import Call
from .forecasters import reuse
from .methods import forecast_steps
from .policy import Forecasts
from .scheduled import ScheduledSession
from .schedules import Schedule

__all__ = ["MagCache", "MagnitudeRecorder"]


@dataclass(frozen=True)
class MagCache:
    """Skip while the accumulated change of magnitude is small.

    Args:
        ratios: gamma per step of the run that they were measured on (`MagnitudeRecorder`).
        threshold: of the accumulated error, inclusive; 0 skips only where nothing changes.
        max_skips: K, at most this many skipped steps in a row.
        retention: share of the steps, at the start, that always run in full.
        scope: "blocks" as published, or "output": what is repeated.
    """

    ratios: tuple[float, ...]
    threshold: float = 0.06
    max_skips: int = 3
    retention: float = 0.2
    scope: str = "blocks"

    order = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", to_numbers("ratios", self.ratios, 0, above=True))
        if not self.ratios:
            raise ValueError("ratios: expected one per step, got none")
        check_number("threshold", self.threshold, 0)
        check_number("retention", self.retention, 0, most=1)
        check_count("max_skips", self.max_skips, 0)
        check_choice("scope", self.scope, ("output", "blocks"))

    def full(self, steps: int) -> Schedule:
        """Return the full steps of a run."""
        kept = max(1, int(self.retention * steps + 0.5))
        last = len(self.ratios) - 1
        full, product, error, skips = [], 1.0, 0.0, 0
        for step in range(steps):
            if step >= kept:
                place = round(step * last / (steps - 1)) if steps > 1 else last
                product *= self.ratios[place]
                error += abs(1 - product)
                skips += 1
                if error <= self.threshold and skips <= self.max_skips:
                    continue
                product, error, skips = 1.0, 0.0, 0
            full.append(step)
        return tuple(full)

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid."""
        return forecast_steps(self.full(len(times)), times, reuse, clock="step")


class MagnitudeSession(ScheduledSession):
    """Runs everything in full and tells its policy how magnitudes change."""

    policy: MagnitudeRecorder

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Compare the magnitudes with those of the step before."""
        branch, stream = call.branch, kept[0]
        if branch is None or not isinstance(stream, Tensor):
            return
        channels = 1 if stream.dim() > 3 else -1  # images are [B, C, H, W], tokens [B, N, C]
        norms = torch.linalg.vector_norm(stream.detach().double(), dim=channels)
        previous = branch.probe
        if previous is not None and previous.shape == norms.shape:
            ratio = norms / previous.clamp(min=torch.finfo(torch.float64).tiny)
            self.policy.note(call.step, ratio.mean().item())
        branch.probe = norms


class MagnitudeRecorder:
    """A cache that skips nothing and measures MagCache's ratios, over all runs under its patch.

    Args:
        scope: of the `MagCache` that they are for.
    """

    order = 1
    session = MagnitudeSession

    def __init__(self, scope: str = "blocks") -> None:
        check_choice("scope", scope, ("output", "blocks"))
        self.scope = scope
        self._seen: dict[int, list[float]] = {}
        self._steps = 0

    def __repr__(self) -> str:
        return f"MagnitudeRecorder(scope={self.scope!r})"

    def note(self, step: int, ratio: float) -> None:
        """Take a ratio in; guided and unguided passes count alike."""
        self._seen.setdefault(step, []).append(ratio)

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Run every step in full."""
        if self._steps not in (0, len(times)):
            raise ValueError(
                f"cache: expected runs of {self._steps} steps like the first one, got {len(times)}"
            )
        self._steps = len(times)
        return (None,) * len(times)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The means of what was seen; 1 where nothing was, as at the first step."""
        if not self._seen:
            raise ValueError("ratios: expected at least one run under the patch, got none")
        means = {step: sum(seen) / len(seen) for step, seen in self._seen.items()}
        return tuple(means.get(step, 1.0) for step in range(self._steps))
