"""Rows of a layer's input as evidence: each once, with how often it came, some of them held out.

    rows = different rows, in the order in which they came          counts = how often each did

What is fitted to some rows is judged by others. A layer may see one row many times (projections of
a text see its tokens at every step of every call), so rows are told apart before they are shared
out: a copy of a fitted row would find whatever was fitted to it good.

Better than single rows, whole runs of a pipeline are held out, where it is known which run a row
came from: rows of one run are alike (its text, its steps), those of another show what others bring.
A run may bring rows that others had: then these must gain, as often as they come, and the new ones
among them by themselves. Runs differ in size: those are held out that leave most rows to fit to.

A layer that sees few different rows (modulation by step and class, projections of short texts), or
few in the runs that would be left, can be judged by runs alone. Half of them judge what is fitted
to the other half, both ways: if new rows come, by those; if the same few come in every run, they
are taken for all there will be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT = 8  # one row, or run, of so many is not fitted to
# Different rows that a layer must have seen for anything to be fitted to them without other runs'
# word. In trials with random layers and inputs, compensation by fewer erred more on other rows than
# rounding to nearest did, and so few were held out that they missed it; 8 of 64 were off by less
# than what `smoothing.GAIN` asks for. Smoothing by a few rows behind a GELU multiplied the error.
FEWEST = 64


def _places(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return (first [D], places [R]): the different rows, and which of them each row is."""
    different, index = torch.unique(rows, dim=0, return_inverse=True)
    came = torch.arange(len(rows), device=rows.device)
    first = torch.full_like(came[: len(different)], len(rows))
    first, order = first.scatter_reduce_(0, index, came, "amin").sort()
    return first, order.argsort()[index]


@dataclass(frozen=True)
class Samples:
    """rows [R, K], no two of them equal; counts [R], float64."""

    rows: Tensor
    counts: Tensor

    @staticmethod
    def of(rows: Tensor) -> Samples:
        """Return the samples in rows [R, K], finite ones."""
        first, places = _places(rows)
        return Samples(rows[first], torch.bincount(places, minlength=len(first)).double())

    @property
    def enough(self) -> bool:
        """Whether what is fitted to them can be judged by some of them."""
        return len(self.rows) >= FEWEST

    def all_rows(self) -> Tensor:
        """Return every row as often as it came."""
        return self.rows.repeat_interleave(self.counts.long(), 0)

    def to(self, like: Tensor) -> Samples:
        """Return them on a weight's device and in its dtype."""
        return Samples(self.rows.to(like), self.counts.to(like.device))


@dataclass(frozen=True)
class Split:
    """What may be fitted to, and what judges it.

    fitted     rows to fit to
    held_out   rows that are not fitted to, as often as they came where that is judged
    new        those of held_out that nothing was fitted to; all of them, some or none
    """

    fitted: Samples
    held_out: Samples
    new: Samples

    @staticmethod
    def of(rows: Tensor, places: Tensor, held: Tensor) -> Split:
        """Return the split that holds out the rows where `held` [R] says so."""
        new = held & ~torch.isin(places, places[~held])
        return Split(*(Samples.of(rows[mask]) for mask in (~held, held, new)))

    def judges(self) -> list[Samples]:
        """Return the samples on each of which there must be a gain."""
        some = 0 < len(self.new.rows) < len(self.held_out.rows)
        return [self.held_out, self.new] if some else [self.held_out]


def splits(rows: Tensor, runs: Tensor | None = None) -> list[Split]:
    """Return the ways to hold out some of the rows [R, K]; none where nothing can be judged.

    What is fitted in each of them must gain; the first is to be kept.

    Args:
        rows: as they came, finite.
        runs: [R], which run of the pipeline each came in, or None if that is not known.
    """
    first, places = _places(rows)
    many = len(first) >= FEWEST
    run = torch.zeros_like(places) if runs is None else runs.unique(return_inverse=True)[1]
    if int(run.max()):
        few = not many
        for turn in range(HELD_OUT) if many else ():
            found = Split.of(rows, places, run % HELD_OUT == turn)
            fitted = len(found.fitted.rows)
            if len(found.new.rows) * HELD_OUT >= FEWEST and 2 * fitted >= len(first):
                if found.fitted.enough:
                    return [found]
                few = True
        if few:
            return [Split.of(rows, places, run % 2 == turn) for turn in (1, 0)]
    return [Split.of(rows, places, places % HELD_OUT == 0)] if many else []
