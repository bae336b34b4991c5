"""The guard: full steps tell whether the forecasts around them were good.

    e_i = sum |v_i - v^_i| / sum |v_i|     at a full step i, v^_i forecast from the full ones before
    tripped if e_i > factor * expected_i   per sample; expected_i its mean in calibration

The forecast of a full step costs one pass over the output, and its error says how far from the
calibrated images this one is. From then on the model runs on the skipped steps too, and the samples
that tripped take what it computes: the weights of later steps make up for what forecasts before
them have missed, so going back to them after a stretch without any makes it worse. The others keep
their forecast to the bit, so no image depends on what it shares a batch with.

A sample trips in all guidance passes at once. Their errors are nearly the same, and guidance, a
difference of passes, cancels most of them: u + g (c - u) with an exact c and a forecast u would err
g - 1 times as much as u. Passes that are halves of one batch are known by their equal inputs.

The flags stay on the device. The host reads whether any is set, on CUDA from a copy made meanwhile
and only once that has arrived: nothing waits, and at worst a gap's first steps go unguarded.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import cache_metric

__all__ = ["Check", "Flags", "halves", "lookback", "trips"]


class Check(NamedTuple):
    """How to judge a full step: weights of the newest full steps before it, and e_i expected."""

    weights: tuple[float, ...]
    expected: float = math.inf


def lookback(output: Tensor, forecast: Tensor) -> Tensor:
    """Return e [B] of an output and what was forecast for it."""
    return cache_metric(forecast, output, per_sample=True)


def trips(error: Tensor, limit: float, entry: Tensor | None) -> Tensor:
    """Return which samples trip, [B].

    Args:
        error: e [B].
        limit: what it may be; a NaN trips.
        entry: what the model was given [B, ...]: equal samples of its halves trip together.
    """
    tripped = ~(error <= limit)
    tied = halves(entry, len(tripped))
    return tripped if tied is None else tripped | (tripped.roll(len(tripped) // 2) & tied)


def halves(entry: Tensor | None, count: int) -> Tensor | None:
    """Return which samples have the same input as their counterpart in the other half, [B].

    By pair, so that whether two are tied depends on these two alone. None where there are no
    halves of a batch of `count`.
    """
    if entry is None or not count or count % 2 or len(entry) != count:
        return None
    first, second = entry.chunk(2)
    return (first == second).flatten(1).all(1).repeat(2)


class Flags:
    """Which samples tripped, [B] on the device, and whether any did."""

    def __init__(self, tripped: Tensor) -> None:
        self.tripped = tripped
        self._any = tripped.any()
        self._event = None
        if tripped.device.type == "cuda":
            self._any = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(
                self._any, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def fits(self, form: tuple[Any, ...]) -> bool:
        """Whether a call's input, of (shape, dtype, device), has as many samples, there."""
        return form[0][:1] == self.tripped.shape and form[2] == self.tripped.device

    def any(self) -> bool:
        """Whether a sample tripped, as far as it is known by now."""
        if self._event is not None and not self._event.query():
            return False
        return bool(self._any)
