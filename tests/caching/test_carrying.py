"""Plans from a step in the middle on, and of parts of a grid."""

from dataclasses import replace

import numpy as np
import pytest

from fewstep.caching import Plan, PlanChoice
from fewstep.caching.guard import Check

TIMES = tuple(float(t) for t in np.linspace(1000, 100, 10))
FULL = (0, 2, 5, 8)


def outputs(times):
    """A quadratic in time."""
    return (np.asarray(times)[:, None] / 1000) ** np.arange(3)


def made(**changes):
    steps = tuple(None if i in FULL else (1.0,) if i < 2 else (1.5, -0.5) for i in range(10))
    gram = tuple(map(tuple, outputs(TIMES) @ outputs(TIMES).T))
    return Plan(TIMES, steps, **{"gram": gram, "predicted": {"psnr": 40.0}, **changes})


def test_a_run_from_the_middle():
    plan = made()
    found = plan.on(TIMES, 4)
    assert found.full == (0, 1, 2, 3, 4, 5, 8)  # 0 to 3 are never run
    # Two full steps of the run are known at 6, but 4 is none of the plan's: fitted anew.
    assert found.steps[6] != plan.steps[6]
    assert sum(found.steps[6]) == pytest.approx(1)
    exact = outputs(TIMES)
    known, weights = exact[[5, 4]], np.array(found.steps[6])
    assert np.abs(weights @ known - exact[6]).max() < 0.02
    assert found.steps[9] == plan.steps[9]  # of 8 and 5
    assert found.predicted == {}
    assert plan.on(TIMES, 0) is plan
    assert plan.on(TIMES, 5).full == (0, 1, 2, 3, 4, 5, 8)
    assert plan.on(TIMES, 5).steps[6] == (1.0,)


def test_without_a_gram_matrix_it_stays_as_it_is():
    plan = made(gram=None)
    assert plan.on(TIMES, 4) is plan


def test_a_part():
    lookback = (None, Check((1.0,), 0.5), *[None] * 2)
    part = Plan(TIMES[4:8], (None, None, (1.0,), (1.0,)), part=(4, 10), lookback=lookback)
    part = replace(part, predicted={"step_error": [0.0, 0.0, 0.1, 0.2]})
    assert part.is_on(TIMES)
    assert not part.is_on(TIMES[4:8])
    whole = part.on(TIMES, 4)
    assert (whole.times, whole.part) == (TIMES, None)
    assert whole.steps == (None,) * 6 + ((1.0,),) * 2 + (None,) * 2
    assert whole.lookback[5] == lookback[1]
    assert whole.predicted["step_error"] == [0.0] * 6 + [0.1, 0.2] + [0.0] * 2
    assert part.on(TIMES, 2).steps == whole.steps
    for first, total in ((-1, 10), (7, 10)):
        with pytest.raises(ValueError, match=r"part: expected \(first, total\) that 4 steps fit"):
            replace(part, part=(first, total))


def test_a_part_carried_over():
    plan = made()
    part = replace(
        plan,
        times=TIMES[4:],
        steps=(None, None, (1.5, -0.5), (1.5, -0.5), None, (1.5, -0.5)),
        gram=tuple(row[4:] for row in plan.gram[4:]),
        part=(4, 10),
    )
    times = tuple(float(t) for t in np.linspace(1000, 50, 20))
    whole = part.on(times, 9)
    assert len(whole.steps) == 20
    skipped = [i for i, own in enumerate(whole.steps) if own is not None]
    assert min(times[i] for i in skipped) <= 150
    assert max(times[i] for i in skipped) < 600
    assert len(skipped) == 8
    with pytest.raises(ValueError, match="expected a grid with steps from 600 to 100"):
        part.on(tuple(np.linspace(1000, 700, 10)), 0)


def test_the_plan_for_the_start_comes_first():
    whole = made()
    part = replace(whole, times=TIMES[4:], steps=(None, *[(1.0,)] * 5), gram=None, part=(4, 10))
    choice = PlanChoice((whole, part), psnr=30)
    assert choice.on(TIMES, 4).steps == part.on(TIMES, 4).steps
    assert choice.on(TIMES, 0) is whole
    assert PlanChoice((part,), psnr=30).on(TIMES, 0).steps == part.on(TIMES).steps
    assert choice.on(TIMES[:5], 0) is None


def test_the_plan_of_the_nearest_count_is_carried_over():
    def plan(count, psnr, **change):
        times = tuple(float(t) for t in np.linspace(1000, 100, count))
        steps = (None,) * (count // 2) + ((1.0,),) * (count - count // 2)
        gram = tuple(map(tuple, np.exp(-np.abs(np.subtract.outer(times, times)) / 500)))
        return replace(Plan(times, steps, gram=gram, predicted={"psnr": psnr}), **change)

    def source(choice, count):
        found = choice.on(tuple(float(t) for t in np.linspace(1000, 100, count)), 0)
        return found and found.made.get("carried_over_from")

    choice = PlanChoice((plan(10, 50.0), plan(20, 50.0), plan(16, 30.0)), psnr=40)
    assert [source(choice, count) for count in (10, 12, 15, 24, 40)] == [None, 10, 20, 20, 20]
    assert choice.on(tuple(np.linspace(1000, 100, 41)), 0) is None
    # Where the grid's own plan is known to miss the target, steps run in full.
    assert choice.on(choice.plans[2].times, 0) is None
    assert source(PlanChoice((plan(10, 50.0), plan(20, 50.0, gram=None)), psnr=40), 18) == 10
