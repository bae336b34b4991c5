"""The last K outputs of full steps, and weighted sums of them.

    y = sum_k w_k S_k      one pass of `forecast_apply` over S [K, B, ..., C]

Reuse, Taylor, Newton, Hermite, BDF, DMD and calibrated affine forecasts are all of this form, so
one ring and one sum serve them. The full step of rank r (the r-th of the schedule) is kept in slot
r mod K: which weight belongs to which slot is known before the run, so a schedule's weights are one
table on the device (`slot_table`), and a skipped step copies nothing there.
S may be kept in a lower precision (`snapshots.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .policy import Forecasts
from .snapshots import Slots

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
        snapshots: in which precision, a name of `FORMATS`; None as computed.

    Attributes:
        bytes: what the snapshots take, or took before they were dropped.
        rebuild: what the layout makes of a forecast; it sets it.
    """

    def __init__(self, order: int, snapshots: str | None = None) -> None:
        self.order, self.snapshots, self.bytes = order, snapshots, 0
        self.rebuild: Any = None
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

    @property
    def device(self) -> torch.device:
        """Where the snapshots are; the CPU where there are none."""
        own = (slots.ring.device for slots in self._slots if isinstance(slots, Slots))
        return next(own, torch.device("cpu"))

    def push(
        self, snapshot: tuple[Any, ...], rank: int, form: Any, base: tuple[Any, ...] | None = None
    ) -> None:
        """Keep the snapshot of the full step of a rank, or what it adds to `base`.

        The others go where the form differs, a part's absence included, or where full steps between
        were not kept: slots belong to ranks, so a gap would have weights meet what is older, or
        nothing.
        """
        if strange := [part for part in snapshot if not isinstance(part, Tensor | None)]:
            raise TypeError(f"cache: expected tensors to keep, got a {type(strange[0]).__name__}")
        there = [part is None for part in snapshot] == [slots is None for slots in self._slots]
        if form != self.form or not there or self._newest != rank - 1:
            self.clear()
            self.form = form
            self._slots = tuple(
                None if part is None else Slots(part, self.order, self.snapshots)
                for part in snapshot
            )
            self.bytes = sum(slots.bytes for slots in self._slots if isinstance(slots, Slots))
        heads = (None,) * len(snapshot) if base is None else base
        for slots, part, head in zip(self._slots, snapshot, heads, strict=True):
            if isinstance(part, Tensor):
                slots.put(part, rank % self.order, head)
        self._kept, self._newest = self._kept + 1, rank

    def products(self, weights: Tensor) -> Tensor:
        """Return the inner products [B, M, M] of the first stream's sums, given weights [M, K]."""
        return self._slots[0].products(weights)

    def forecast(self, weights: Tensor, base: tuple[Any, ...] | None = None) -> tuple[Any, ...]:
        """Return the sums, plus `base`, given weights by slot [K] or [B, K] on the device."""
        heads = (None,) * len(self._slots) if base is None else base
        return tuple(
            slots.sum(weights, head) if isinstance(slots, Slots) else slots
            for slots, head in zip(self._slots, heads, strict=True)
        )
