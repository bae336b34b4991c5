"""Which tokens a step computes: the choice, and how tokens lie in an output."""

import pytest
import torch

from fewstep.caching import Grid, Ras
from fewstep.caching.token_session import select


def test_selection_is_the_largest_in_their_order():
    rank = torch.tensor([[0.1, 5.0, 3.0, 4.0, 0.2], [1.0, 1.0, 2.0, 1.0, 1.0]])
    index, position = select(rank, 3)
    assert index.tolist() == [[1, 2, 3], [0, 1, 2]]  # of equal ranks the first
    assert position.tolist() == [[-1, 0, 1, 2, -1], [0, 1, 2, -1, -1]]


@pytest.mark.parametrize("count", [1, 7, 20])
def test_positions_invert_the_selection(count):
    rank = torch.randn(3, 20)
    index, position = select(rank, count)
    assert (index.diff(dim=1) > 0).all()
    assert torch.equal(position.gather(1, index), torch.arange(count).expand(3, -1))
    assert ((position >= 0).sum(1) == count).all()
    left_out = rank.masked_fill(position >= 0, -torch.inf).amax(1)
    assert (rank.gather(1, index).amin(1) >= left_out).all()
    assert torch.equal(select(rank[1:2], count).index, index[1:2])


def patches(output, p):
    """Return [N] lists of a sample's patches [C, p, p], row by row."""
    _, H, W = output.shape
    return [output[:, i : i + p, j : j + p] for i in range(0, H, p) for j in range(0, W, p)]


@pytest.mark.parametrize(("channels", "p"), [(3, 2), (4, 1), (1, 2)])
def test_spread_is_of_the_channels_of_the_noise(channels, p):
    output = torch.randn(2, channels + 2, 4, 6)
    grid = Grid(p, channels)
    assert grid.count(output) == 24 // p**2
    noise = output[:, :channels]
    for metric in ("std", "l2"):
        found = grid.spread(output, metric)
        for b, n in ((0, 1), (1, grid.count(output) - 1)):
            patch = patches(noise[b], p)[n]
            if metric == "l2":
                want = patch.square().sum(0).sqrt().mean()
            elif channels > 1:
                want = patch.std(0, correction=0).mean()
            else:  # a channel alone has no spread: that of the patch
                want = patch.std(correction=0)
            torch.testing.assert_close(found[b, n], want)


def test_merge_takes_the_patches_that_were_computed():
    output, kept = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    position = torch.tensor([[0, -1, -1, 1, -1, -1], [-1, -1, 0, -1, -1, 1]])
    merged = Grid(2, 3).merge(output, kept, position)
    for b in range(2):
        each = zip(patches(merged[b], 2), patches(output[b], 2), patches(kept[b], 2), strict=True)
        for n, (got, new, old) in enumerate(each):
            assert torch.equal(got, new if position[b, n] >= 0 else old)


@pytest.mark.parametrize("shape", [(2, 3, 5, 6), (2, 24, 3)])
def test_outputs_without_such_tokens(shape):
    assert Grid(2, 3).count(torch.zeros(shape)) == 0


def test_schedule():
    times = list(range(1000, 0, -50))
    full = [i for i, step in enumerate(Ras(every=6).forecasts(times)) if step is None]
    assert full == [0, 1, 2, 3, 9, 15]
    assert all(step is None for step in Ras(every=1).forecasts(times))
    with pytest.raises(ValueError, match="lists its timesteps"):
        Ras().forecasts([])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0.0}, "share: expected a finite number > 0 and <= 1, got 0.0"),
        ({"share": 1.5}, "share: expected a finite number > 0 and <= 1, got 1.5"),
        ({"every": 0}, "every: expected at least 1, got 0"),
        ({"warmup": 0}, "warmup: expected at least 1, got 0"),
        ({"starvation": -1.0}, "starvation: expected a finite number >= 0"),
        ({"metric": "max"}, "metric: expected 'std' or 'l2', got 'max'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Ras(**settings)
