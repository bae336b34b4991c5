"""Rows of a layer's input as evidence: each once, with how often it came, some of them held out.

    rows = different rows, in the order in which they came          counts = how often each did

What is fitted to some rows is judged by others. A layer may see one row many times (projections of
a text see its tokens at every step of every call), so rows are told apart before they are shared
out: a copy of a fitted row would find whatever was fitted to it good.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 8  # one row of so many is not fitted to
# Different rows that a layer must have seen for anything to be fitted to them. In trials with
# random layers and inputs, compensation by fewer erred more on other rows than rounding to nearest
# did, and so few were held out that they missed it; 8 of 64 were off by less than what
# `smoothing.GAIN` asks for. Smoothing by a few rows behind a GELU multiplied the error.
FEWEST = 64


@dataclass(frozen=True)
class Samples:
    """rows [R, K], no two of them equal; counts [R], float64."""

    rows: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Tensor) -> Samples:
        """Return the samples in rows [R, K], finite ones."""
        different, index, counts = torch.unique(
            rows, dim=0, return_inverse=True, return_counts=True
        )
        place = torch.arange(len(rows), device=rows.device)
        first = torch.full_like(counts, len(rows)).scatter_reduce_(0, index, place, "amin")
        order = first.argsort()
        return Samples(different[order], counts[order].double())

    @property
    def enough(self) -> bool:
        """Whether what is fitted to them can be judged."""
        return len(self.rows) >= FEWEST

    def fitted(self) -> Samples:
        """Return what may be fitted to: all but what is held out."""
        kept = torch.arange(len(self.rows), device=self.rows.device) % HELD_OUT != 0
        return Samples(self.rows[kept], self.counts[kept])

    def held_out(self) -> Samples:
        """Return one row of `HELD_OUT`."""
        return Samples(self.rows[::HELD_OUT], self.counts[::HELD_OUT])

    def all_rows(self) -> Tensor:
        """Return every row as often as it came."""
        return self.rows.repeat_interleave(self.counts.long(), 0)

    def to(self, like: Tensor) -> Samples:
        """Return them on a weight's device and in its dtype."""
        return Samples(self.rows.to(like), self.counts.to(like.device))
