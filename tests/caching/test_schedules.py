"""Schedules: by hand where they are short, against all there are where they are the best."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from fewstep.caching import schedules


def test_every_nth():
    assert schedules.every_nth(10, 3) == (0, 3, 6, 9)
    assert schedules.every_nth(10, 4, warmup=3) == (0, 1, 2, 6)
    assert schedules.every_nth(10, 4, warmup=3, tail=2) == (0, 1, 2, 6, 8, 9)
    assert schedules.every_nth(5, 1) == (0, 1, 2, 3, 4)
    assert schedules.every_nth(2, 4, warmup=3) == (0, 1)


@pytest.mark.parametrize("warmup", [1, 3])
def test_evenly(warmup):
    for steps in range(1, 30):
        for count in range(1, steps + 1):
            full = schedules.evenly(steps, count, warmup=warmup)
            first = min(warmup, count)
            assert full[:first] == tuple(range(first))
            assert len(set(full)) == len(full) == count
            gaps = [b - a for a, b in pairwise((*full[first - 1 :], steps))]
            assert max(gaps) - min(gaps) <= 1


def test_masks():
    assert schedules.from_mask("1101") == (0, 1, 3)
    assert schedules.from_mask(schedules.from_bins((3, 2, 1))) == (0, 1, 2, 5)
    assert schedules.from_mask([1, 0, 0]) == (0,)


@pytest.mark.parametrize("seed", range(4))
def test_minimax_is_the_least_of_all(seed):
    steps, rng = 8, np.random.default_rng(seed)
    # Few values, so that many schedules share their worst gap and the second worst decides.
    costs = rng.integers(1, 4, (steps, steps + 1)).astype(float)
    for full_steps in range(1, steps + 1):

        def errors(path):
            gaps = pairwise((*path, steps))
            return sorted((0.0 if b == a + 1 else costs[a, b] for a, b in gaps), reverse=True)

        every = [(0, *rest) for rest in combinations(range(1, steps), full_steps - 1)]
        found = schedules.minimax(costs, full_steps)
        assert found in every
        assert errors(found) == min(map(errors, every))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.every_nth(5, 0), ValueError, "every: expected at least 1, got 0"),
        (lambda: schedules.every_nth(5, 2, warmup=0), ValueError, "warmup: expected at least 1"),
        (lambda: schedules.evenly(5, 6), ValueError, "expected at most the run's 5 steps, got 6"),
        (lambda: schedules.from_mask("011"), ValueError, "the first of them 1, got '011'"),
        (lambda: schedules.from_mask("1x1"), ValueError, "mask: expected 1"),
        (lambda: schedules.from_mask(""), ValueError, "mask: expected 1"),
        (lambda: schedules.from_bins((2, 0)), ValueError, "bins: expected at least 1, got 0"),
        (lambda: schedules.minimax(np.zeros((3, 3)), 2), ValueError, r"\[S, S \+ 1\], got \[3, 3"),
        (lambda: schedules.minimax(np.zeros((3, 4)), 4), ValueError, "at most the run's 3 steps"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()
