"""allocate: measured errors, an integer programme, and plans that beat uniform ones."""

import itertools
import math
import sys

import pytest
import torch
from torch import nn

from fewstep.assets.digits import load_digits_pipeline
from fewstep.quantization import Plan, Scheme, allocate, calibrate, quantize
from fewstep.quantization.allocate import (
    OBJECTIVES,
    Choice,
    measure,
    solve,
    weight_bytes,
)
from fewstep.quantization.calibration import first_tensor
from fewstep.quantization.errors import content, output_error, split_error, sqnr
from fewstep.quantization.recipe import Recipe
from fewstep.quantization.samples import splits

allocation = sys.modules[allocate.__module__]  # the name is the function's


def skip(name, linear):
    """Two blocks are enough."""
    return None if name.startswith(("transformer_blocks.0.", "transformer_blocks.5.")) else "no"


def skip_more(name, linear):
    """One block is enough."""
    return None if name.startswith("transformer_blocks.5.") else "no"


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


@pytest.fixture(scope="module")
def choices(pipe, calibration):
    return measure(pipe.transformer, calibration, candidates=CANDIDATES, skip=skip)


def total_error(model, calibration, plan_or_scheme, **given):
    """The error of the whole model at its output."""

    def run():
        with torch.no_grad():
            return [first_tensor(model(*a, **k)) for a, k in calibration.evaluations]

    want = run()
    is_plan = isinstance(plan_or_scheme, Plan)
    how = {"plan": plan_or_scheme} if is_plan else {"scheme": plan_or_scheme, "skip": skip}
    with quantize(model, **how, **given) as handle:
        got = run()
        moved = sum(weight_bytes(layer) for layer in handle.replaced.values())
        left = [n for n, s in handle.plan().layers.items() if s is None and n not in handle.skipped]
        assert not left
    return sum(map(output_error, got, want)), moved


def test_plans_beat_uniform_schemes_at_equal_bytes(pipe, calibration, choices, tmp_path):
    model = pipe.transformer
    state = {name: value.clone() for name, value in model.state_dict().items()}
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
    again = measure(model, calibration, candidates=CANDIDATES, skip=skip_more)
    assert again == {name: choices[name] for name in again}
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


def test_noise_counts_where_there_is_no_signal():
    want = torch.ones(1, 1, 8, 8)  # all content, no quality
    noise = torch.zeros_like(want)
    noise[..., ::2], noise[..., 1::2] = 0.1, -0.1
    found = split_error(want + noise, want)
    assert found == pytest.approx((0, 0.01), abs=1e-8)


def test_what_is_measured_of_each_layer(choices):
    for name, (plain, int8, *rest) in choices.items():
        assert (plain.error, plain.sqnr) == (0, math.inf)
        assert [c.scheme.kind for c in rest] == ["w4a8"] * len(rest), name
        for choice in (int8, *rest):
            assert choice.error == choice.content + choice.quality
            assert min(choice.content, choice.quality) > 0
        # Half a unit of 4 bits is 16 times that of 8: 24 dB, less what rounding x costs.
        assert int8.sqnr >= 30
        assert int8.sqnr - rest[0].sqnr > 10
        assert rest[1].sqnr > rest[0].sqnr


def test_objectives_weigh_what_they_say():
    sixteenth = Choice(Scheme("w8a8"), 1 / 16, 1, 1.0, 20.0, 1 / 64, 3 / 64)
    found = {name: [f(name, sixteenth) for f in OBJECTIVES] for name in ("a.ff.net.2", "a.attn1.q")}
    powers = [1 / 16, 1 / 8, 1 / 4]
    assert found["a.ff.net.2"] == pytest.approx([*powers, 1 / 64, 0.01])
    assert found["a.attn1.q"] == pytest.approx([*powers, 3 / 64, 0.01])
    for name in ("attn2.to_k", "b.0.cross_attn.q", "b.mlp.fc1", "b.ff_context.net.0.proj", "x.ffn"):
        assert OBJECTIVES[3](name, sixteenth) == 1 / 64
    dead = Choice(Scheme("w8a8"), 0.0, 1, 1.0, -math.inf)
    assert solve({"a": [dead]}, {"bytes": 1.0}, OBJECTIVES[4])["a"] == dead


def test_candidates_with_smoothing(pipe, calibration):
    names = ("w8a8", "w8a8-smooth")
    choices = measure(pipe.transformer, calibration, candidates=names, skip=skip_more)
    gains = [smooth.sqnr - plain.sqnr for _, plain, smooth in choices.values()]
    assert max(gains) > 1
    budget = {"bytes": 0.52}
    plan = allocate(pipe, calibration, budget, candidates=names, skip=skip_more)
    assert any(scheme.smooth for scheme in plan.layers.values() if scheme)
    with pytest.raises(ValueError, match=r"smooth: expected a calibration for w8a8-smooth"):
        quantize(pipe.transformer, plan=plan)
    with quantize(pipe.transformer, plan=plan, smooth=calibration) as handle:
        assert handle.plan() == plan


def test_compensated_layers_are_measured_and_planned(pipe, calibration):
    kept = "transformer_blocks.5.ff.net.2"
    given = {"candidates": ["w4a8"], "skip": lambda name, _: None if name == kept else "no"}
    rounded, found = (
        measure(pipe.transformer, calibration, compensate=compensate, **given)
        for compensate in (False, True)
    )
    # On rows that were not fitted to, a few of those the layer saw.
    assert found[kept][1].sqnr > rounded[kept][1].sqnr + 3
    linear = pipe.transformer.get_submodule(kept)
    ways = splits(calibration.inputs[kept], calibration.runs[kept])
    held = ways[0].held_out.all_rows()
    seen = {"compensate": calibration, "skip": given["skip"]}
    with torch.no_grad(), quantize(pipe.transformer, "w4a8", **seen) as handle:
        own = sqnr(handle.replaced[kept](held), linear(held))
    assert found[kept][1].sqnr == pytest.approx(own, abs=1e-6)
    plan = allocate(pipe, calibration, {"bytes": 0.3}, compensate=True, **given)
    assert "with rounding compensated" in plan.explain()
    error, _ = total_error(pipe.transformer, calibration, plan, compensate=calibration)
    assert error == pytest.approx(2 * plan.notes["error"], rel=1e-6)


def test_compensated_layers_are_made_once_while_there_is_room(pipe, calibration, monkeypatch):
    model = pipe.transformer
    names = [f"transformer_blocks.5.attn1.{n}" for n in ("to_q", "to_k", "to_v")]
    given = {
        "candidates": ["w4a8", "w4a8-g32"],
        "skip": lambda name, _: None if name in names else "no",
        "compensate": True,
    }
    made = []
    make = Recipe.make
    monkeypatch.setattr(
        Recipe, "make", lambda self, *args: (made.append(self.schemes), make(self, *args))[1]
    )
    plan = allocate(pipe, calibration, {"bytes": 0.3}, **given)
    assert len(made) == len(names) * 2
    made.clear()
    layers = allocation._Layers(model, calibration, True)
    layers._room = 0
    pairs = [layers(names[0], Scheme("w4a8")).state_dict() for _ in range(2)]
    assert len(made) == 2
    kept = allocation._Layers(model, calibration, True)
    pairs += [kept(names[0], Scheme("w4a8")).state_dict() for _ in range(2)]
    assert len(made) == 3
    assert all(torch.equal(v, p[n]) for p in pairs[1:] for n, v in pairs[0].items())
    assert {str(plan.layers[n]) for n in names} <= {"w4a8-g64", "w4a8-g32"}


def test_plans_tell_what_was_measured(pipe, calibration, tmp_path):
    plan = allocate(pipe, calibration, {"bytes": 0.52}, candidates=["w8a8"], skip=skip)
    text = plan.explain()
    lines = text.splitlines()
    count = sum(scheme is not None for scheme in plan.layers.values())
    assert f"  {count} w8a8" in lines[1:3]
    assert "of bytes, error" in lines[3]
    errors = {n: m["content"] + m["quality"] for n, m in plan.notes["layers"].items()}
    worst = max(errors, key=errors.get)
    decibels = plan.notes["layers"][worst]["sqnr_db"]
    assert lines[4].startswith(f"  {worst} in w8a8: {decibels:.1f} dB")
    assert lines[-1] == f"  and {count - 10} layers that err less"
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json").explain() == text
    assert "as it is" in Plan.of(pipe.transformer, {}).explain()


def test_layers_of_one_shape_are_timed_once(pipe, calibration, monkeypatch):
    shapes = []

    def time_all(layers, x):
        shapes.append((tuple(layers[0].weight.shape), x.shape[0]))
        return [1.0 / (1 + i) for i in range(len(layers))]

    monkeypatch.setattr(allocation, "_time_all", time_all)
    choices = measure(pipe, calibration, candidates=["w8a8"], skip=skip, timed=True)
    assert len(shapes) == len(set(shapes)) == 8 < len(choices)
    for options in choices.values():
        assert [c.seconds for c in options] == [1, 1 / 2]


def test_times_are_measured_where_they_are_asked_for(pipe, calibration):
    plan = allocate(
        pipe, calibration, {"time": 1.5, "bytes": 0.9}, candidates=["w8a8"], skip=skip_more
    )
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
