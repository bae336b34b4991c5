"""Which steps of a run are evaluated in full, as published.

    every_nth   a warm-up, then one full step in n: FORA (arXiv 2407.01425), TaylorSeer (2503.06923)
    evenly      a warm-up, then so many full steps spread over the rest
    minimax     the chain of gaps whose worst error is least, then the second worst, ...: the
                lexicographic minimax path of LeMiCa (arXiv 2511.00090)
    from_mask   an explicit list, 1 is full: the steps mask of cache-dit
    from_bins   the same as lengths of runs: compute, cache, compute, cache, ...

A schedule is the sorted tuple of the full steps, 0 always among them: nothing is known before it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ._checks import check_count

__all__ = ["evenly", "every_nth", "from_bins", "from_mask", "minimax"]

Schedule = tuple[int, ...]


def every_nth(steps: int, every: int, *, warmup: int = 1, tail: int = 0) -> Schedule:
    """Full: the first `warmup` steps, then every n-th counted from the last of these, and `tail`.

    Args:
        steps: S.
        every: n; 1 runs all in full.
        warmup: full steps at the start, at least 1.
        tail: full steps at the end.
    """
    for name, value, least in (("every", every, 1), ("warmup", warmup, 1), ("tail", tail, 0)):
        check_count(name, value, least)
    return tuple(
        i for i in range(steps) if i < warmup or (i - warmup + 1) % every == 0 or i >= steps - tail
    )


def evenly(steps: int, full_steps: int, *, warmup: int = 1) -> Schedule:
    """Full: the first `warmup` steps, and the others as far apart as they can be.

    The gaps after the warm-up, the one at the end among them, differ by one step at most.
    """
    for name, value in (("full_steps", full_steps), ("warmup", warmup)):
        check_count(name, value, 1)
    if full_steps > steps:
        raise ValueError(f"full_steps: expected at most the run's {steps} steps, got {full_steps}")
    first = min(warmup, full_steps)
    gaps = full_steps - first + 1  # the last full step of the warm-up opens the first of them
    start = first - 1
    return (
        *range(start),
        *(start + round(gap * (steps - start) / gaps) for gap in range(gaps)),
    )


def from_mask(mask: str | Sequence[int]) -> Schedule:
    """Full: where the mask is 1 (or "1").

    Raises:
        ValueError: something else than 0 and 1, or a mask that does not start with 1.
    """
    marks = [int(mark) if mark in ("0", "1", 0, 1) else -1 for mark in mask]
    if not marks or -1 in marks or marks[0] != 1:
        raise ValueError(f"mask: expected 1 (full) and 0, the first of them 1, got {mask!r}")
    return tuple(index for index, mark in enumerate(marks) if mark)


def from_bins(bins: Sequence[int]) -> tuple[int, ...]:
    """Return the mask of alternating runs of full and skipped steps: (3, 2, 1) is 1 1 1 0 0 1."""
    for value in bins:
        check_count("bins", value, 1)
    return tuple(int(place % 2 == 0) for place, length in enumerate(bins) for _ in range(length))


def minimax(costs: NDArray[np.float64], full_steps: int) -> Schedule:
    """Return the schedule whose sorted list of gap errors, worst first, is the least.

    Args:
        costs: [S, S + 1]; [a, b] is the error at the end of a run where all steps but those
            between a and b are full. LeMiCa measures it with a run per entry; entries of
            neighbours and below the diagonal are not read.
        full_steps: B, 1 to S.

    Inserting one gap into two lists of gaps keeps their order, so that the best list to every
    (step, number of full steps) is enough to go on from.
    """
    costs = np.asarray(costs, dtype=np.float64)
    if costs.ndim != 2 or costs.shape[1] != costs.shape[0] + 1:
        raise ValueError(f"costs: expected a matrix [S, S + 1], got {list(costs.shape)}")
    steps = costs.shape[0]
    check_count("full_steps", full_steps, 1)
    if full_steps > steps:
        raise ValueError(f"full_steps: expected at most the run's {steps} steps, got {full_steps}")

    def gone(errors: tuple[float, ...], start: int, end: int) -> tuple[float, ...]:
        gap = 0.0 if end == start + 1 else float(costs[start, end])
        return tuple(sorted((*errors, gap), reverse=True))

    best: dict[int, tuple[tuple[float, ...], Schedule]] = {0: ((), (0,))}
    for count in range(1, full_steps):
        latest = steps - (full_steps - count)
        after: dict[int, tuple[tuple[float, ...], Schedule]] = {}
        for start, (errors, path) in best.items():
            for end in range(start + 1, latest + 1):
                found = gone(errors, start, end), (*path, end)
                if end not in after or found < after[end]:
                    after[end] = found
        best = after
    return min((gone(errors, path[-1], steps), path) for errors, path in best.values())[1]
