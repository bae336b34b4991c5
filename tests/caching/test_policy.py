"""Policies: what they accept, and when they let a step skip."""

import pytest
import torch

from fewstep.caching import (
    PRESETS,
    CachePolicy,
    FirstBlock,
    Interval,
    ScheduledPolicy,
    resolve_policy,
)


def test_presets_and_objects():
    assert resolve_policy("first-block") == FirstBlock()
    assert resolve_policy("interval") == Interval()
    policy = FirstBlock(threshold=0.2)
    assert resolve_policy(policy) is policy
    for make in PRESETS.values():
        assert isinstance(make(), CachePolicy) != isinstance(make(), ScheduledPolicy)


def test_a_policy_of_ones_own():
    class Never:
        first, last, measures = 1, 0, False

        def must_run(self, step, since_full):
            return "never"

        def small_change(self, change):
            return False

    policy = Never()
    assert resolve_policy(policy) is policy


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: FirstBlock(threshold=-0.1),
            ValueError,
            "threshold: expected a finite number >= 0",
        ),
        (lambda: FirstBlock(threshold=float("nan")), ValueError, "threshold: expected a finite"),
        (lambda: FirstBlock(threshold="0.1"), TypeError, "threshold: expected a number, got str"),
        (lambda: FirstBlock(max_skips=-1), ValueError, "max_skips: expected at least 0, got -1"),
        (lambda: FirstBlock(warmup=0), ValueError, "warmup: expected at least 1, got 0"),
        (lambda: FirstBlock(first=0), ValueError, "first: expected at least 1, got 0"),
        (lambda: Interval(every=0), ValueError, "every: expected at least 1, got 0"),
        (lambda: Interval(every=2.5), TypeError, r"every: expected an integer, got float 2\.5"),
        (lambda: Interval(last=True), TypeError, "last: expected an integer, got bool"),
        (lambda: resolve_policy("deep"), ValueError, "expected 'auto', 'first-block', .* or"),
        (lambda: resolve_policy(Interval), TypeError, "or a policy object"),
        (lambda: resolve_policy(None), TypeError, "or a policy object"),
    ],
)
def test_refusals_name_what_was_expected(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_every_sample_is_asked_and_nan_is_never_small():
    policy = FirstBlock(threshold=0.1)
    change = torch.tensor([0.05, 0.11, float("nan"), 0.1])
    assert policy.small_change(change).tolist() == [True, False, False, False]
    assert not FirstBlock(threshold=0).small_change(torch.tensor([0.0]))


def test_when_a_step_must_run():
    policy = FirstBlock(warmup=2, max_skips=2)
    assert [policy.must_run(step, 1) for step in range(3)] == ["warm-up", "warm-up", None]
    assert policy.must_run(9, 3) == "max_skips reached"
    assert [Interval(every=3).must_run(step, 1) for step in range(4)] == [
        "interval",
        None,
        None,
        "interval",
    ]
    assert Interval(every=3).must_run(4, 3) == "interval"
