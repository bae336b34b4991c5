"""Which samples the guard ties: halves of one batch, pair by pair."""

import torch

from fewstep.caching.guard import halves, trips

NAN = float("nan")


def test_halves_are_tied_pair_by_pair():
    entry = torch.tensor([[1.0, 2], [3, 4], [NAN, 5], [1, 2], [3, 5], [NAN, 5]])
    assert halves(entry, 6).tolist() == [True, False, False] * 2


def test_what_has_no_halves():
    assert halves(None, 2) is None
    assert halves(torch.zeros(3, 2), 3) is None
    assert halves(torch.zeros(2, 2), 4) is None
    assert halves(torch.zeros(0, 2), 0) is None


def test_a_pair_trips_together_whatever_its_mates_are():
    error = torch.tensor([2.0, 0, 0, 0, 2, NAN])
    for mate in (0.0, NAN):
        entry = torch.tensor([[1.0], [3], [5 + mate], [1], [4], [5]])
        tripped = trips(error, 1.0, entry).tolist()
        assert tripped[:2] + tripped[3:5] == [True, False, True, True]
        assert tripped[2] == (mate == 0)
        assert tripped[5]
    assert trips(error, 1.0, None).tolist() == [True, False, False, False, True, True]
