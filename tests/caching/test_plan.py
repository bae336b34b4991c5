"""Plans: checked when made, the same after a file, carried over to other grids."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from fewstep.caching import Fingerprint, Plan

TIMES = tuple(float(t) for t in np.linspace(1000, 20, 50))


def plan(**changes):
    every = tuple(None if i % 3 == 0 else (1.0,) for i in range(50))
    given = {"times": TIMES, "steps": every, "gram": None, **changes}
    return Plan(**given)


def test_what_it_says_of_itself():
    steps = (None, None, (1.5, -0.5), None, (1.0,))
    made = Plan((5.0, 4.0, 3.0, 2.0, 1.0), steps, predicted={"psnr": 41.25})
    assert (made.order, made.full, made.scope) == (2, (0, 1, 3), "output")
    assert made.speedup == pytest.approx(5 / 3)
    assert repr(made) == "Plan(3 of 5 steps in full, 1.67x, 41.2 dB expected)"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (((1.0,), None), "expected 1 to 0 weights at step 0"),
        ((None, (0.5, 0.5)), "expected 1 to 1 weights at step 1"),
        ((None, ()), "expected 1 to 1 weights at step 1"),
        ((None, (0.7,)), "sum to 1 at step 1"),
        ((None, (float("nan"),)), "finite weights"),
        ((None,), r"one entry per time \(2"),
    ],
)
def test_no_schedule(steps, message):
    with pytest.raises(ValueError, match=message):
        Plan((2.0, 1.0), steps)


def test_file(tmp_path):
    mark = Fingerprint.of(nn.Linear(3, 2), Scheduler(shift=3.0, betas=[0.5] * 50))
    made = plan(fingerprint=mark, gram=((1.0, 0.5), (0.5, 1.0)), predicted={"psnr": 30.0})
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize("spoil", ["cut", "version", "steps", "list"])
def test_no_plan_in_the_file(tmp_path, spoil):
    path = tmp_path / "plan.json"
    plan().save(path)
    text = path.read_text()
    if spoil == "cut":
        path.write_text(text[: len(text) // 2])
    elif spoil == "list":
        path.write_text("[1]")
    else:
        data = json.loads(text)
        data["version"] = 1 if spoil == "version" else 2
        if spoil == "steps":
            del data["steps"]
        path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="expected a fewstep cache plan of version 3"):
        Plan.load(path)


def smooth_gram(times):
    """Of outputs that are a quadratic in time."""
    powers = (np.asarray(times)[:, None] / 1000) ** np.arange(3)
    return powers @ np.diag([1.0, 0.5, 0.25]) @ powers.T


def test_its_own_grid_gives_its_own_steps():
    made = plan()
    assert made.forecasts(TIMES) is made.steps
    assert made.forecasts([t + 0.1 for t in TIMES]) is made.steps


@pytest.mark.parametrize("count", [30, 90])
def test_carried_over(count):
    made = plan(gram=tuple(map(tuple, smooth_gram(TIMES))), steps=plan_of_order(3))
    times = np.linspace(1000, 1000 / count, count)
    other = made.at(times, corrected=False)
    assert other.made["carried_over_from"] == 50
    assert len(other.full) == len(made.full)
    outputs = (times[:, None] / 1000) ** np.arange(3)
    for index, weights in enumerate(other.steps):
        if weights is not None and len(weights) == 3:
            known = [f for f in reversed(other.full) if f < index][:3]
            # The Gram matrix between the plan's times is interpolated linearly.
            assert np.abs(weights @ outputs[known] - outputs[index]).max() < 0.05


def test_carried_over_with_its_corrections():
    """On its own grid that is the plan itself; on another each gap has its own shift."""
    gram = tuple(map(tuple, smooth_gram(TIMES)))
    open_loop = plan(gram=gram, steps=plan_of_order(2)).at(TIMES, corrected=False)
    shift = np.array([0.25, -0.25])
    moved = tuple(
        own if own is None or len(own) < 2 or index > 30 else tuple((own + shift).tolist())
        for index, own in enumerate(open_loop.steps)
    )
    made = plan(gram=gram, steps=moved)
    for own, found in zip(made.steps, made.at(TIMES).steps, strict=True):
        assert (own is None) == (found is None)
        assert own is None or np.allclose(own, found, atol=1e-5)
    times = np.linspace(1000, 1000 / 90, 90)
    without, corrected = (made.at(times, corrected=how).steps for how in (False, True))
    for index, (own, found) in enumerate(zip(without, corrected, strict=True)):
        if own is not None and len(own) == 2 and not 52 <= index <= 56:
            expected = shift if index < 54 else 0 * shift
            assert np.allclose(np.subtract(found, own), expected, atol=1e-4)


def plan_of_order(order):
    steps, known = [], 0
    for index in range(50):
        full = index % 3 == 0
        known += full
        count = min(order, known)
        steps.append(None if full else (1 / count,) * count)
    return tuple(steps)


def test_not_carried_over():
    with pytest.raises(ValueError, match="no Gram matrix"):
        plan().forecasts(TIMES[:40])
    made = plan(gram=tuple(map(tuple, smooth_gram(TIMES))))
    with pytest.raises(ValueError, match=r"expected 25 to 100 steps, which .* for 50 .* got 8$"):
        made.forecasts(np.linspace(1000, 125, 8))
    for first, last in ((500, 20), (1000, 500), (20, 1000)):
        message = rf"expected times from 1000 to 20, .* got {first} to {last}"
        with pytest.raises(ValueError, match=message):
            made.forecasts(np.linspace(first, last, 40))
    with pytest.raises(ValueError, match=r"got 0$"):
        made.forecasts([])


def grid(scheduler, count):
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):  # as pipelines of flows do
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / count, count))
    else:
        scheduler.set_timesteps(count)
    return tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("counts", [(20, 10), (10, 20), (50, 28), (8, 4)])
@pytest.mark.parametrize(
    "scheduler",
    [
        *(DDIMScheduler(timestep_spacing=how) for how in ("leading", "trailing", "linspace")),
        FlowMatchEulerDiscreteScheduler(shift=1.0),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        EulerDiscreteScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_grids_of_one_scheduler_lie_in_one_range(scheduler, counts):
    mine, other = (grid(scheduler, count) for count in counts)
    steps = tuple(None if i % 3 == 0 else (1.0,) for i in range(len(mine)))
    made = Plan(mine, steps, gram=tuple(map(tuple, smooth_gram(mine))))
    assert made.at(other).times == other


class Scheduler:
    def __init__(self, **config):
        self.config = config


def test_fingerprint_tells_models_weights_and_schedulers_apart():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    mark = Fingerprint.of(model, Scheduler(shift=3.0))
    assert mark.differences(model, Scheduler(shift=3.0)) == []
    assert mark.differences(model.to(torch.bfloat16), Scheduler(shift=3.0)) == []
    assert mark.differences(model, Scheduler(shift=3.0, since="a newer version")) == []
    assert mark.differences(model, Scheduler(shift=1.0)) == [
        "scheduler configuration: expected shift 3.0, got 1.0"
    ]
    assert mark.differences(model, Scheduler()) == [
        "scheduler configuration: expected shift 3.0, got none"
    ]
    assert "model: expected 'Sequential', got 'Linear'" in mark.differences(
        nn.Linear(4, 4), Scheduler(shift=3.0)
    )
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    assert mark.differences(model, Scheduler(shift=3.0))[0].startswith("weights: expected 0.weight")


def test_fingerprint_keeps_to_what_is_left_of_quantised_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    mark = Fingerprint.of(model, Scheduler())
    model[0].weight = None
    assert mark.differences(model, Scheduler()) == []


class Adapted(nn.Module):
    """What peft makes of a layer."""

    def __init__(self, **scaling):
        super().__init__()
        self.base_layer, self.scaling = nn.Linear(2, 2), scaling
        self.active_adapters = list(scaling)


def test_fingerprint_knows_adapters_and_their_scales():
    model = nn.Sequential(Adapted(style=0.5, speed=1.0), Adapted(style=0.5))
    mark = Fingerprint.of(model, Scheduler())
    assert mark.adapters == ("speed@1", "style@0.5")
    assert mark.differences(model, Scheduler()) == []
    unscaled = replace(mark, adapters=("speed", "style"))  # of before scales were kept
    assert unscaled.differences(model, Scheduler()) == []
    for layer in model:
        layer.scaling["style"] = 0.8
    assert mark.differences(model, Scheduler()) == [
        "adapters: expected ('speed@1', 'style@0.5'), got ('speed@1', 'style@0.8')"
    ]
    assert unscaled.differences(model, Scheduler()) == []
    model[0].active_adapters = ["style"]
    assert unscaled.differences(model, Scheduler())[0].startswith("adapters: expected")
