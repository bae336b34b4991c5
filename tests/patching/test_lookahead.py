"""Look-ahead blocks: the plan while they are untrained, what training does to a run, and files."""

import dataclasses
import functools

import pytest
import torch

import fewstep
from fewstep.caching import LookAhead, LookAheadBlocks, Plan, train_lookahead
from fewstep.caching.quality import psnr
from fewstep.caching.ring import Ring
from patching.tiny_pipelines import digits

STEPS = 4
TRAINING = "fewstep.caching.train_lookahead"


def calls(count=3):
    return [
        {
            "class_labels": [index, index + 1],
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(index),
            "output_type": "pt",
        }
        for index in range(count)
    ]


def draw(pipe):
    return [pipe(**call).images for call in calls()]


def pipeline():
    pipe = digits(layers=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reuse(pipe):
    """Full, skipped, full, skipped: no good forecasts."""
    pipe(**calls()[0])
    times = tuple(float(time) for time in pipe.scheduler.timesteps)
    return Plan(times, (None, (1.0,), None, (0.7, 0.3)))


@pytest.fixture(scope="module")
def trained():
    pipe = pipeline()
    return pipe, train_lookahead(pipe, calls(), plan=reuse(pipe), iterations=24)


def test_untrained_blocks_are_the_plan(trained):
    pipe, _ = trained
    plan = reuse(pipe)
    blocks = LookAheadBlocks((0, 2), entry=1, channels=1, order=2, hidden=4, kernel=3)
    with fewstep.patch(pipe, cache=plan):
        wanted = draw(pipe)
    with fewstep.patch(pipe, cache=LookAhead(plan, blocks)):
        assert all(map(torch.equal, draw(pipe), wanted))


def test_training_lowers_the_error_of_calls_that_it_did_not_see(trained):
    _, cache = trained
    assert cache.blocks is not None
    assert cache.made["held_out_db"] > cache.made["plan_held_out_db"] + 0.1
    assert 0 < cache.made["cost"] < 1


def test_patched_runs_are_those_that_training_measured(trained):
    pipe, cache = trained
    full = draw(pipe)
    with fewstep.patch(pipe, cache=cache) as patch:
        levels = psnr(full, draw(pipe))
        decisions = patch.report()["cache"]["branches"]
    assert sum(levels) / len(levels) == pytest.approx(cache.predicted["psnr"], abs=1e-2)
    assert min(levels) == pytest.approx(cache.predicted["psnr_min"], abs=1e-2)
    assert set(map(tuple, decisions.values())) == {("full", "skip", "full", "skip")}


def test_training_sums_in_half_precision_as_patched_runs_do():
    import sys

    weights = torch.tensor([1.7012, -1.1034, 0.4022], dtype=torch.float64)
    parts = [x.bfloat16() for x in torch.randn(3, 2, 1, 8, 8, generator=torch.manual_seed(0))]
    ring = Ring(3)
    for rank, part in enumerate(parts[::-1]):
        ring.push((part,), rank, "form")
    (wanted,) = ring.forecast(weights.flip(0).float())
    found = sys.modules[TRAINING]._sum(weights, tuple(parts))
    assert found.dtype == torch.bfloat16
    # Sums in another order may fall on the other side of a rounding.
    assert (found != wanted).float().mean() < 0.02


def test_training_leaves_the_pipeline_as_it_was():
    pipe = pipeline()
    flags = [parameter.requires_grad for parameter in pipe.transformer.parameters()]
    before, given = set(pipe.transformer.__dict__), calls()
    states = [call["generator"].get_state() for call in given]
    train_lookahead(pipe, given, plan=reuse(pipe), iterations=1)
    assert set(pipe.transformer.__dict__) == before
    assert "step" not in pipe.scheduler.__dict__
    assert [parameter.requires_grad for parameter in pipe.transformer.parameters()] == flags
    states_now = [call["generator"].get_state() for call in given]
    assert all(map(torch.equal, states_now, states))


def test_what_is_no_better_on_held_out_calls_is_not_taken(monkeypatch):
    import sys

    module = sys.modules[TRAINING]
    monkeypatch.setattr(module, "_SHIFT_RATE", 1e3)
    monkeypatch.setattr(module, "_BLOCK_RATE", 1e3)
    pipe = pipeline()
    plan = reuse(pipe)
    cache = train_lookahead(pipe, calls(), plan=plan, iterations=3)
    assert cache.blocks is None
    assert cache.plan.steps == plan.steps
    assert cache.made["held_out_db"] == cache.made["plan_held_out_db"]


def test_gradients_go_through_the_whole_run():
    """Of a shift in the first gap, against finite differences, checkpointed or not."""
    import sys

    from fewstep.caching.rollouts import Runs, standing

    pipe = pipeline()
    pipe.transformer.double()
    plan = Plan(reuse(pipe).times, (None, None, (0.5, 0.5), None))
    ahead = sys.modules[TRAINING]._Ahead(pipe)
    with standing(pipe.transformer, ahead):
        runs = Runs(ahead, calls(1), 0)
        ahead.plan = plan
        shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        ahead.shifts = {1: shift}
        found = []
        for ahead.checkpointed in (False, True):
            shift.grad = None
            runs.loss(0, gradient=True).backward()
            found.append(shift.grad.clone())
        with torch.no_grad():
            losses = []
            for size in (1e-4, -1e-4):
                shift.copy_(torch.tensor([size, -size]))
                losses.append(runs.loss(0).item())
    slope = (losses[0] - losses[1]) / 2e-4
    for gradient in found:
        # The loss is taken in float32, whose rounding the difference divides by 2e-4.
        assert (gradient[0] - gradient[1]).item() == pytest.approx(slope, rel=2e-2)


def test_files(trained, tmp_path):
    pipe, cache = trained
    path = tmp_path / "ahead.json"
    cache.save(path)
    with fewstep.patch(pipe, cache=cache):
        wanted = draw(pipe)
    with fewstep.patch(pipe, cache=path):
        assert all(map(torch.equal, draw(pipe), wanted))
    assert LookAhead.load(path).made == cache.made
    path.with_suffix(".safetensors").unlink()
    with pytest.raises(ValueError, match="the files beside it"):
        LookAhead.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="expected a fewstep look-ahead cache"):
        LookAhead.load(path)


def test_blocks_know_their_grid_alone(trained):
    pipe, cache = trained
    with (
        fewstep.patch(pipe, cache=cache),
        pytest.raises(ValueError, match="grid of 4 steps that the look-ahead blocks"),
    ):
        pipe(**{**calls()[0], "num_inference_steps": 5})


@pytest.mark.parametrize(
    ("shape", "kernel"), [((2, 4, 6, 6), 3), ((2, 4, 3, 6, 6), 3), ((2, 9, 4), 1)]
)
def test_layouts(shape, kernel):
    torch.manual_seed(0)
    blocks = LookAheadBlocks((0,), entry=4, channels=4, order=2, hidden=3, kernel=kernel)
    torch.nn.init.normal_(blocks.gaps["0"].leave.weight)
    entry, newest = torch.randn(shape), torch.randn(shape)
    made = blocks(0, entry, [newest])
    assert made.shape == torch.Size(shape)
    if len(shape) == 5:  # frame by frame
        one = blocks(0, entry[:, :, 1], [newest[:, :, 1]])
        torch.testing.assert_close(made[:, :, 1], one)
    if len(shape) == 3:  # token by token
        torch.testing.assert_close(made[:, 2:3], blocks(0, entry[:, 2:3], [newest[:, 2:3]]))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"calls": 1}, ValueError, "calls: expected at least 2"),
        ({"hidden": 0}, ValueError, "hidden: expected at least 1"),
        ({"iterations": True}, TypeError, "iterations: expected an integer"),
        ({"full_steps": 2}, ValueError, "expected full_steps or plan, got both"),
        ({"plan": "taylor"}, TypeError, "plan: expected a Plan, got str"),
        ({"steps": 5}, ValueError, "plan: expected one of the calls' grid, 5 steps"),
        ({"half": True}, ValueError, "plan: expected one without half steps"),
        ({"full": True}, ValueError, "plan: expected one that skips steps"),
    ],
)
def test_errors(trained, change, error, said):
    pipe, _ = trained
    plan = change.pop("plan", None) or reuse(pipe)
    if change.pop("half", False):
        plan = dataclasses.replace(plan, guidance=(None, (1.0,), None, (1.0,)), passes="calls")
    if change.pop("full", False):
        plan = Plan(plan.times, (None,) * STEPS)
    given = calls(change.pop("calls", 3))
    steps = change.pop("steps", STEPS)
    train = functools.partial(train_lookahead, pipe, plan=plan, **change)
    with pytest.raises(error, match=said):
        train([{**call, "num_inference_steps": steps} for call in given])
