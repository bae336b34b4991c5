"""The last K outputs of full steps, and weighted sums of them.

    y = sum_k w_k S_k      one pass of `forecast_apply` over S [K, B, ..., C]

Reuse, Taylor, Newton, Hermite, BDF, DMD and calibrated affine forecasts are all of this form, so
one ring and one sum serve them. The full step of rank r (the r-th of the schedule) is kept in slot
r mod K: which weight belongs to which slot is known before the run, so a schedule's weights are one
table on the device (`slot_table`), and a skipped step copies nothing there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import forecast_apply
from .policy import Forecasts

__all__ = ["MAX_ORDER", "Ring", "slot_table"]

MAX_ORDER = 8  # what `forecast_apply` sums


def slot_table(weights: Forecasts, order: int, schedule: Forecasts) -> Tensor:
    """Return weights [T, K] by slot, 0 where a step has none or doesn't use a slot.

    Args:
        weights: of the newest full steps before each step, newest first.
        order: K.
        schedule: None where a step runs in full.
    """
    table = torch.zeros(len(schedule), order, dtype=torch.float64, device="cpu")
    rank = 0
    for index, own in enumerate(weights):
        for back, weight in enumerate(own or (), 1):
            table[index, (rank - back) % order] = weight
        rank += schedule[index] is None
    return table


class Ring:
    """Keeps the newest `order` snapshots, each a tuple of tensors (and of None).

    Args:
        order: K, 1 to 8.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.clear()

    def clear(self) -> None:
        """Drop the snapshots."""
        self._slots: tuple[Any, ...] = ()
        self._kept = 0
        self._newest: int | None = None  # rank
        self.form: Any = None  # of the call that the snapshots are from

    def count(self, rank: int) -> int:
        """Return how many snapshots there are of the full steps just before that of a rank."""
        return min(self._kept, self.order) if self._newest == rank - 1 else 0

    def push(self, snapshot: tuple[Any, ...], rank: int, form: Any) -> None:
        """Keep the snapshot of the full step of a rank.

        The others go where the form differs, or where full steps between were not kept: slots
        belong to ranks, so a gap would have weights meet what is older, or nothing.
        """
        if form != self.form or len(snapshot) != len(self._slots) or self._newest != rank - 1:
            self.clear()
            self.form = form
            self._slots = tuple(
                part.new_empty((self.order, *part.shape)) if isinstance(part, Tensor) else part
                for part in snapshot
            )
        for slots, part in zip(self._slots, snapshot, strict=True):
            if isinstance(part, Tensor):
                slots[rank % self.order].copy_(part.detach())
        self._kept, self._newest = self._kept + 1, rank

    def forecast(self, weights: Tensor) -> tuple[Any, ...]:
        """Return the sums, given a row of `slot_table` on the snapshots' device."""
        return tuple(
            _sum(slots, weights) if isinstance(slots, Tensor) else slots for slots in self._slots
        )


def _sum(slots: Tensor, weights: Tensor) -> Tensor:
    return forecast_apply(slots, weights.double() if slots.dtype == torch.float64 else weights)
