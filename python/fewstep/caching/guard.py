"""The guard: full steps tell whether the forecasts around them were good.

    e_i = sum |v_i - v^_i| / sum |v_i|     at a full step i, v^_i forecast from the full ones before
    tripped if e_i > factor * expected_i   per sample; expected_i its mean in calibration

The forecast of a full step costs one pass over the output, and its error says how far from the
calibrated images this one is: on the digits teacher it ranks images by their final error with a
correlation of 0.77. Until the next full step the model then runs on the skipped steps too, and the
samples that tripped take what it computes. The others keep their forecast to the bit, so no image
depends on what it shares a batch with.

The flags stay on the device. The host reads whether any is set, on CUDA from a copy made meanwhile
and only once that has arrived: nothing waits, and at worst a gap's first steps go unguarded.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import cache_metric

__all__ = ["Check", "Flags", "lookback"]


class Check(NamedTuple):
    """How to judge a full step: weights of the newest full steps before it, and e_i expected."""

    weights: tuple[float, ...]
    expected: float = math.inf


def lookback(output: Tensor, forecast: Tensor) -> Tensor:
    """Return e [B] of an output and what was forecast for it."""
    return cache_metric(forecast, output, per_sample=True)


class Flags:
    """Which samples tripped, [B] on the device, and whether any did."""

    def __init__(self, error: Tensor, limit: float) -> None:
        self.tripped = ~(error <= limit)  # so that a NaN trips
        self._any = self.tripped.any()
        self._event = None
        if error.device.type == "cuda":
            self._any = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(
                self._any, non_blocking=True
            )
            self._event = torch.cuda.Event()
            self._event.record()

    def any(self) -> bool:
        """Whether a sample tripped, as far as it is known by now."""
        if self._event is not None and not self._event.query():
            return False
        return bool(self._any)

    def mix(self, computed: Tensor, forecast: Tensor) -> Tensor:
        """Return per sample what was computed where it tripped, and the forecast elsewhere."""
        shape = (-1, *(1,) * (computed.dim() - 1))
        return torch.where(self.tripped.view(shape), computed, forecast)
