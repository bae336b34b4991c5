"""allocate: measured errors, an integer programme, and plans that beat uniform ones."""

import itertools

import pytest
import torch
from torch import nn

from fewstep.assets.digits import load_digits_pipeline
from fewstep.quantization import Plan, Scheme, allocate, calibrate, quantize
from fewstep.quantization.allocate import (
    Choice,
    _first_tensor,
    measure,
    solve,
    weight_bytes,
)
from fewstep.quantization.errors import content, output_error


def skip(name, linear):
    """Two blocks are enough."""
    return None if name.startswith(("transformer_blocks.0.", "transformer_blocks.5.")) else "no"


CANDIDATES = ("w8a8", "w4a8-g64", "w4a8-g64-r8")


@pytest.fixture(scope="module")
def pipe():
    return load_digits_pipeline()


@pytest.fixture(scope="module")
def calibration(pipe):
    calls = [
        {"class_labels": [i, i + 5], "num_inference_steps": 3, "generator": torch.Generator()}
        for i in range(2)
    ]
    return calibrate(pipe, calls, rows=64, evaluations=2)


def total_error(model, calibration, plan_or_scheme):
    """The error of the whole model at its output."""

    def run():
        with torch.no_grad():
            return [_first_tensor(model(*a, **k)) for a, k in calibration.evaluations]

    want = run()
    is_plan = isinstance(plan_or_scheme, Plan)
    how = {"plan": plan_or_scheme} if is_plan else {"scheme": plan_or_scheme, "skip": skip}
    with quantize(model, **how) as handle:
        got = run()
        moved = sum(weight_bytes(layer) for layer in handle.replaced.values())
        left = [n for n, s in handle.plan().layers.items() if s is None and n not in handle.skipped]
        assert not left
    return sum(map(output_error, got, want)), moved


def test_plans_beat_uniform_schemes_at_equal_bytes(pipe, calibration, tmp_path):
    model = pipe.transformer
    state = {name: value.clone() for name, value in model.state_dict().items()}
    choices = measure(model, calibration, candidates=CANDIDATES, skip=skip)
    whole = sum(options[0].bytes for options in choices.values())
    errors = {}
    for uniform in ("w8a8", "w4a8-g64-r8"):
        error, taken = total_error(model, calibration, uniform)
        budget = {"bytes": 1.0001 * taken / whole}
        plan = allocate(model, calibration, budget, candidates=CANDIDATES, skip=skip)
        assert plan.notes["bytes"] <= budget["bytes"]
        found, _ = total_error(model, calibration, plan)
        assert found == pytest.approx(2 * plan.notes["error"], rel=1e-6)
        assert found <= error
        errors[uniform] = found, error
    # Where the branch can go to the layers that need it, there is something to choose.
    found, error = errors["w4a8-g64-r8"]
    assert found < 0.8 * error
    assert solve(choices, budget) == solve(
        measure(model, calibration, candidates=CANDIDATES, skip=skip), budget
    )
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert all(torch.equal(state[n], value) for n, value in model.state_dict().items())


def test_the_programme_is_solved_exactly():
    torch.manual_seed(0)
    schemes = [None, Scheme("w8a8"), Scheme("w4a8")]
    choices = {
        f"layer{i}": [
            Choice(s, e, b, t)
            for s, e, b, t in zip(
                schemes,
                [0.0, *sorted(torch.rand(2).tolist())],
                [1000, 500, 280],
                [1.0, 0.5, 0.6],
                strict=True,
            )
        ]
        for i in range(6)
    }

    def brute(budget):
        best = None
        for picked in itertools.product(*choices.values()):
            if sum(c.bytes for c in picked) > budget.get("bytes", 9) * 6000 + 1e-6:
                continue
            if sum(c.seconds for c in picked) > budget.get("time", 9) * 6 + 1e-9:
                continue
            error = sum(c.error for c in picked)
            best = error if best is None else min(best, error)
        return best

    for budget in ({"bytes": 0.4}, {"time": 0.75}, {"bytes": 0.6, "time": 0.7}, {"bytes": 1.0}):
        found = solve(choices, budget)
        assert sum(c.error for c in found.values()) == pytest.approx(brute(budget), abs=1e-9)


def test_content_is_the_mean_over_blocks():
    y = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert content(y)[0, 0, :4, :4].unique().tolist() == [13.5]
    tokens = torch.randn(2, 10, 3)
    assert torch.allclose(
        content(tokens)[:, 8:], tokens[:, 8:].mean(1, keepdim=True).expand(2, 2, 3)
    )
    # A change of the mean alone is content, one without a mean is quality; both count the same.
    shift = output_error(y + 1, y)
    assert shift == pytest.approx(64 / float(content(y).square().sum()))


def test_times_are_measured_where_they_are_asked_for(pipe, calibration):
    plan = allocate(pipe, calibration, {"time": 1.5, "bytes": 0.9}, candidates=["w8a8"], skip=skip)
    assert 0 < plan.notes["time"] <= 1.5


def test_bad_input_is_named(pipe, calibration):
    for budget, message in (
        ({}, "budget: expected shares of bytes or time"),
        ({"seconds": 1.0}, "budget: expected shares of bytes or time"),
        ({"bytes": 0}, "budget: expected a share of bytes above 0, got 0"),
        ({"bytes": 0.01}, "budget: expected one that some choice fits"),
    ):
        with pytest.raises(ValueError, match=message):
            solve({"a": [Choice(None, 0.0, 10, 1.0), Choice(Scheme("w8a8"), 0.1, 5, 1.0)]}, budget)
    other = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128))
    with pytest.raises(ValueError, match="calibration: expected rows of 128 for 0, got none"):
        measure(other, calibration)
    found = calibrate(other, [{"input": torch.randn(4, 128)}])
    with pytest.raises(ValueError, match="expected linear layers that can be quantised"):
        measure(nn.Sequential(nn.Linear(4, 4)), found)
