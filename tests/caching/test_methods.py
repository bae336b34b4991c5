"""Scheduled methods: trajectories they know are exact on the machine, and what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

from fewstep.caching import (
    PRESETS,
    FoCa,
    Fora,
    HiCache,
    Newton,
    OutputStack,
    ScheduledPolicy,
    ScheduledSession,
    Scm,
    Taylor,
)

# A shifted flow's grid: its steps grow to more than four times the first.
TIMES = [1000 * 3 * s / (1 + 2 * s) for s in np.linspace(1, 0.05, 20)]

METHODS = [
    (Fora(), 0),
    (Taylor(), 1),
    (Newton(), 2),
    (Newton(degree=3, warmup=4), 3),
    (HiCache(), 0),
    (HiCache(scale=0.5**0.5), 1),
    (FoCa(), 1),
    (Scm("11100" * 4, degree=1), 1),
]


class Trajectory(nn.Module):
    """A model whose output is a polynomial of the time, another one for every sample."""

    def __init__(self, degree):
        super().__init__()
        generator = torch.Generator().manual_seed(degree)
        self.factors = torch.randn(degree + 1, 2, 3, 4, 4, generator=generator).double()

    def forward(self, hidden_states, timestep):
        return sum(f * (float(timestep) / 300) ** i for i, f in enumerate(self.factors))


class Scheduler:
    step_index = None

    def __init__(self, times):
        self.timesteps = torch.tensor(times, dtype=torch.float64)


def trajectory(policy, degree, times=TIMES):
    """Return what a model gives with and without the policy, and the session."""
    model, plain, scheduler = Trajectory(degree), Trajectory(degree), Scheduler(times)
    session = ScheduledSession(policy, lambda: scheduler)
    for module, name, value in OutputStack(model).replacements(session):
        setattr(module, name, value)
    x, found, want = torch.zeros(2, 3, 4, 4), [], []
    for index, time in enumerate(scheduler.timesteps):
        scheduler.step_index = index
        found.append(model(x, time))
        want.append(plain(x, time))
    return torch.stack(found), torch.stack(want), session


@pytest.mark.parametrize(("policy", "degree"), METHODS)
def test_exact_to_the_degree_on_uneven_steps(policy, degree):
    assert isinstance(policy, ScheduledPolicy)
    found, want, session = trajectory(policy, degree)
    assert session.report()["skipped"] >= 8
    # The table on the device is float32: every weight is off by 2^-24 of itself at most, and fp64
    # adds nothing to speak of.
    largest = max(sum(map(abs, w)) for w in policy.forecasts(TIMES) if w is not None)
    atol = 1.01 * 2**-24 * largest * want.abs().max().item()
    torch.testing.assert_close(found, want, rtol=0, atol=atol)
    found, want, _ = trajectory(policy, degree + 1)
    assert (found - want).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["fora", "taylor", "newton", "hicache", "foca"])
def test_presets_are_known_by_name(name):
    steps = PRESETS[name]().forecasts(TIMES)
    assert len(steps) == 20
    assert steps[0] is None
    assert 4 < sum(weights is None for weights in steps) < 10
    assert all(sum(w) == pytest.approx(1, abs=1e-9) for w in steps if w is not None)


def test_schedules_of_the_methods():
    full = [i for i, weights in enumerate(Taylor().forecasts(TIMES)) if weights is None]
    assert full == [0, 1, 2, 6, 10, 14, 18]
    full = [i for i, weights in enumerate(Fora(every=5, tail=1).forecasts(TIMES)) if not weights]
    assert full == [0, 5, 10, 15, 19]
    assert Scm.of((0, 3), 5) == Scm((1, 0, 0, 1, 0))


def test_the_clock():
    by_step = Taylor(clock="step").forecasts(TIMES)
    assert by_step[6:10] == Taylor(clock="step").forecasts(list(range(20)))[6:10]
    assert by_step != Taylor().forecasts(TIMES)
    # Samplers of second order evaluate a time twice: steps are told by their number then.
    twice = [time for time in TIMES[:10] for _ in range(2)]
    assert Taylor().forecasts(twice) == by_step
    assert Taylor().forecasts(TIMES[::-1])[3] is not None  # rising times


def test_one_grid_is_like_another_in_its_unit():
    other = [time / 1000 for time in TIMES]
    for ours, theirs in zip(HiCache().forecasts(TIMES), HiCache().forecasts(other), strict=True):
        assert ours == theirs or ours == pytest.approx(theirs, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Fora(every=0), ValueError, "every: expected at least 1, got 0"),
        (
            lambda: Fora(scope="stack"),
            ValueError,
            "scope: expected 'output' or 'blocks' or 'block'",
        ),
        (lambda: Fora(modules="attn"), ValueError, 'modules: expected with scope "block" or "mod'),
        (lambda: Fora(scope="module", modules="("), ValueError, "modules: expected a regular exp"),
        (lambda: Fora(scope="module", modules=["a"]), TypeError, "modules: expected a regular exp"),
        (lambda: Fora(snapshots="fp16"), ValueError, "snapshots: expected 'float32' or 'bfloat16'"),
        (lambda: Taylor(degree=0), ValueError, "degree: expected at least 1, got 0"),
        (lambda: Taylor(degree=8), ValueError, "degree: expected at most 7, got 8"),
        (lambda: Taylor(degree=1.0), TypeError, "degree: expected an integer, got float"),
        (lambda: Taylor(clock="sigma"), ValueError, "clock: expected 'time' or 'step'"),
        (lambda: HiCache(scale=0), ValueError, "scale: expected a finite number > 0, got 0"),
        (lambda: HiCache(scale="1"), TypeError, "scale: expected a number, got str"),
        (lambda: FoCa(warmup=0), ValueError, "warmup: expected at least 1, got 0"),
        (lambda: Scm("0"), ValueError, "mask: expected 1"),
        (lambda: Scm("1", degree=-1), ValueError, "degree: expected at least 0"),
        (lambda: Scm("101").forecasts(TIMES), ValueError, "the mask's 3 steps, got 20"),
        (lambda: Fora().forecasts(()), ValueError, "a scheduler that lists its timesteps"),
    ],
)
def test_refusals_name_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()
