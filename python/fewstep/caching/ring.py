"""The last K outputs of full steps, and weighted sums of them.

    y = sum_k w_k S_k      S_0 the newest snapshot

Reuse, Taylor, Newton, Hermite, BDF, DMD and calibrated affine forecasts are all of this form, so
one ring and one sum serve them. A snapshot may be a tree: tuples of tensors and None.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ring"]


class Ring:
    """Keeps the newest `order` snapshots.

    Args:
        order: K, at least 1.
    """

    def __init__(self, order: int) -> None:
        self._kept: deque[tuple[Tensor | None, ...]] = deque(maxlen=order)
        self.form: Any = None  # of the call that the newest snapshot is from

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drop the snapshots."""
        self._kept.clear()
        self.form = None

    def push(self, snapshot: tuple[Tensor | None, ...], form: Any) -> None:
        """Keep a snapshot: the oldest goes from a full ring, all go where the form differs."""
        if form != self.form:
            self.clear()
        self.form = form
        self._kept.appendleft(snapshot)

    def forecast(self, weights: Sequence[float]) -> tuple[Tensor | None, ...]:
        """Return the weighted sum of the newest snapshots."""
        parts = zip(*list(self._kept)[: len(weights)], strict=True)
        return tuple(_combine(part, weights) for part in parts)


def _combine(parts: Sequence[Tensor | None], weights: Sequence[float]) -> Tensor | None:
    newest = parts[0]
    if newest is None:
        return None
    if len(parts) == 1 and weights[0] == 1.0:  # to the bit, and a tensor that may be written to
        return newest.clone()
    total = newest.to(torch.promote_types(newest.dtype, torch.float32)) * weights[0]
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        if weight:
            total.add_(part, alpha=weight)
    return total.to(newest.dtype)
