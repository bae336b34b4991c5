"""Whole runs held out: what judges a layer that is fitted to the rows of others."""

import pytest
import torch
from torch import nn

from fewstep.quantization import Calibration, QuantLinear, calibrate, quantize
from fewstep.quantization.compensation import quantize_compensated
from fewstep.quantization.errors import row_error
from fewstep.quantization.samples import FEWEST, Samples, splits

K = 128


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


def seeded(seed):
    return torch.Generator().manual_seed(seed)


class Modulated(nn.Module):
    """A layer that reads SiLU(step + condition), as modulation does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(K, K)

    def forward(self, x):
        return self.layer(nn.functional.silu(x))


class Pipe:
    """Runs `steps` evaluations: a vector of each step and one of each prompt or label."""

    def __init__(self, size):
        self.transformer, self.size = Modulated(), size
        self.steps = torch.randn(64, K, generator=seeded(1))
        self.conditions = torch.randn(64, K, generator=seeded(2))

    def __call__(self, *, steps=4, labels=(0,), prompt=(), generator=None):
        for step in self.steps[:steps]:
            chosen = [*map(int, labels), *(ord(letter) % 64 for letter in prompt)]
            self.transformer(step + self.size * self.conditions[chosen])


def rows_of(x, distinct):
    """Return rows [len(x)] that name which of `distinct` rows each is."""
    return torch.randn(distinct, 8, generator=seeded(0))[torch.tensor(x)]


def test_few_rows_are_judged_by_halves_of_the_runs_both_ways():
    # Row 9 comes in every run, the others in one.
    rows = rows_of([9, 0, 9, 1, 1, 9, 2, 9, 3, 3], 10)
    runs = torch.tensor([4, 4, 5, 5, 5, 7, 7, 8, 8, 8])
    first, second = splits(rows, runs)
    table = rows_of([*range(10)], 10)
    assert torch.equal(first.fitted.rows, table[[9, 0, 2]])
    assert first.fitted.counts.tolist() == [2, 1, 1]
    assert torch.equal(first.held_out.rows, table[[9, 1, 3]])
    assert first.held_out.counts.tolist() == [2, 2, 2]
    assert torch.equal(first.new.rows, table[[1, 3]])
    assert [len(x.rows) for x in first.judges()] == [3, 2]
    assert torch.equal(second.fitted.rows, first.held_out.rows)
    assert torch.equal(second.held_out.rows, first.fitted.rows)
    assert torch.equal(second.new.rows, table[[0, 2]])
    for known in (None, torch.zeros_like(runs)):  # nobody to judge
        assert splits(rows, known) == []


def test_many_rows_are_judged_by_one_of_eight_runs_if_these_bring_new_ones():
    rows = torch.randn(400, 8, generator=seeded(0))
    runs = torch.arange(400) % 10
    (split,) = splits(rows, runs)
    assert torch.equal(split.held_out.rows, rows[(runs == 0) | (runs == 8)])
    assert torch.equal(split.fitted.rows, rows[(runs != 0) & (runs != 8)])
    assert len(split.judges()) == 1
    # The same in every run: single rows are held out, with all their copies.
    same = rows[:FEWEST].repeat(4, 1)
    (split,) = splits(same, torch.arange(4).repeat_interleave(FEWEST))
    assert torch.equal(split.held_out.rows, rows[:FEWEST:8])
    assert set(split.held_out.counts.tolist()) == {4}


@pytest.mark.parametrize(
    ("sizes", "held"),
    [
        ((1000, 10), [1]),  # the first would leave 10 to fit to
        ((10, 1000), [0]),
        ((600, 50, 50), [1]),
    ],
)
def test_runs_that_are_held_out_leave_most_rows(sizes, held):
    runs = torch.cat([torch.full((size,), i) for i, size in enumerate(sizes)])
    rows = torch.randn(len(runs), 8, generator=seeded(0))
    (split,) = splits(rows, runs)
    mask = torch.isin(runs, torch.tensor(held))
    assert torch.equal(split.held_out.rows, rows[mask])
    assert torch.equal(split.fitted.rows, rows[~mask])
    assert split.fitted.enough


def test_runs_that_leave_few_rows_judge_each_other():
    # 30 rows in each of three runs: two runs are fewer than anything is fitted to by itself.
    rows = torch.randn(90, 8, generator=seeded(0))
    runs = torch.arange(3).repeat_interleave(30)
    first, second = splits(rows, runs)
    assert torch.equal(first.held_out.rows, rows[30:60])
    assert torch.equal(second.held_out.rows, first.fitted.rows)
    # Four rows of another run are too few to judge, and the others must be fitted to.
    (split,) = splits(rows, (torch.arange(90) > 85).long())
    assert torch.equal(split.held_out.rows, rows[::8])


def test_smoothing_goes_by_the_rows_that_it_may_see():
    linear = nn.Linear(K, K)
    rows = torch.randn(90, K, generator=seeded(0))
    rows[:, :4] *= 100
    runs = torch.arange(3).repeat_interleave(30)
    seen = Calibration({"0": rows}, {"0": 30.0}, [], {"0": rows.abs().amax(0)}, {"0": runs})
    for given, smoothed in (({}, 1), ({"compensate": seen}, 0)):
        with quantize(nn.Sequential(linear), "w8a8", smooth=seen, **given) as handle:
            assert sum(layer.smooth is not None for layer in handle.replaced.values()) == smoothed


def test_the_few_rows_of_every_run_are_compensated_for():
    pipe = Pipe(1.0)
    pipe.num_classes = 2
    seen = calibrate(pipe, [{"labels": (0, 1)} for _ in range(4)])
    assert len(Samples.of(seen.inputs["layer"]).rows) == 8
    assert seen.runs["layer"].unique().tolist() == [0, 1, 2, 3]
    x = pipe.steps[:4] + pipe.conditions[1]
    want, errors = pipe.transformer(x), []
    for given in (None, seen):
        with quantize(pipe.transformer, "w4a8", compensate=given) as handle:
            errors.append(row_error(pipe.transformer(x), want))
            text = handle.explain()
    assert errors[1] < 0.1 * errors[0]
    assert "layers that saw the same few rows in every run, compensated for these alone: 1" in text


@pytest.mark.parametrize(("size", "gains"), [(0.2, True), (8.0, False)])
def test_other_runs_judge_what_few_rows_carry_over(size, gains):
    # A condition that is small beside the step carries over to others, one that is all does not.
    pipe = Pipe(size)
    seen = calibrate(pipe, [{"labels": (label,), "steps": 8} for label in range(6)])
    others = pipe.steps[:8] + size * pipe.conditions[6:, None]
    want = pipe.transformer(others.flatten(0, 1))
    with quantize(pipe.transformer, "w4a8"):
        before = row_error(pipe.transformer(others.flatten(0, 1)), want)
    with quantize(pipe.transformer, "w4a8", compensate=seen) as handle:
        after = row_error(pipe.transformer(others.flatten(0, 1)), want)
        assert f"compensated in {int(gains)} of 1 layers" in handle.explain()
        assert "in every run" not in handle.explain()
    assert after < 0.5 * before if gains else after == before


def test_tokens_of_a_prompt_say_nothing_of_other_prompts():
    # 40 tokens of each of four prompts, each prompt nearly in six directions of its own. Other
    # tokens of the same prompts find a gain in what is a loss on the tokens of others.
    generator = seeded(0)

    def tokens():
        directions = torch.randn(6, K, generator=generator)
        of_prompt = torch.randn(40, 6, generator=generator) @ directions
        return of_prompt + 0.2 * torch.randn(40, K, generator=generator)

    linear = Modulated().layer
    rounded = QuantLinear.from_linear(linear, "w4a8")
    rows = torch.cat([tokens() for _ in range(4)])
    others = torch.cat([tokens() for _ in range(8)])
    layer, after, before = quantize_compensated(linear, rounded, splits(rows))
    assert after < 0.8 * before
    want = linear(others)
    assert row_error(layer(others), want) > 1.05 * row_error(rounded(others), want)
    runs = torch.arange(4).repeat_interleave(40)
    assert quantize_compensated(linear, rounded, splits(rows, runs))[0] is rounded


def test_both_halves_and_their_new_rows_must_gain(monkeypatch):
    linear = nn.Linear(K, 16)
    rounded = QuantLinear.from_linear(linear, "w4a8")
    rows = torch.randn(12, K, generator=seeded(0))
    ways = splits(torch.cat([rows, rows[:2]]), torch.tensor([0] * 6 + [1] * 6 + [1] * 2))
    assert [len(way.judges()) for way in ways] == [2, 2]
    gains = {}

    def errors(_, layer, split):
        return [1.0, 1.0] if layer is rounded else gains[split is ways[1]]

    monkeypatch.setattr("fewstep.quantization.compensation.held_out_errors", errors)
    good, bad = [0.5, 0.5], [0.5, 0.95]
    for first, second, kept in ((good, good, False), (bad, good, True), (good, bad, True)):
        gains.update({False: first, True: second})
        layer, after, before = quantize_compensated(linear, rounded, ways)
        assert (layer is rounded, after, before) == (kept, 1.0 if kept else 0.5, 1.0)


def test_calls_of_the_same_prompts_are_one_run():
    pipe = Pipe(1.0)
    calls = [{"prompt": p, "generator": seeded(i)} for i, p in enumerate(("ab", "ab", "c", "ab"))]
    assert calibrate(pipe, calls).runs["layer"].unique(return_counts=True)[1].tolist() == [36, 8]
    with quantize(pipe.transformer, "w4a8", compensate=calibrate(pipe, calls[:2])) as handle:
        assert "fewer than 64 different rows in one run, rounded to nearest: 1" in handle.explain()
    embeds = [torch.zeros(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16(), torch.ones(2, 3)]
    calls = [{"prompt_embeds": [x, "text", None]} for x in embeds]

    class Embedded(Pipe):
        def __call__(self, *, prompt_embeds):
            super().__call__()

    assert calibrate(Embedded(1.0), calls).runs["layer"].tolist() == [0] * 8 + [1] * 4


def runs_of(pipe, calls):
    found = calibrate(pipe, calls).runs["layer"]
    return found.unique_consecutive().tolist()


@pytest.mark.parametrize("labels", [(3,), [3, 4], torch.tensor([3])])
def test_calls_of_the_same_labels_are_one_run(labels):
    pipe = Pipe(1.0)
    calls = [{"labels": labels, "generator": seeded(i), "steps": 2 + i} for i in range(3)]
    assert runs_of(pipe, calls) == [0]
    assert runs_of(pipe, [*calls, {"labels": (5,)}]) == [0, 1]
    # All classes in each call: no other can come.
    pipe.num_classes = 5
    assert runs_of(pipe, calls) == [0]
    assert runs_of(pipe, [{"labels": [*range(5)] * 2}] * 3) == [0, 1, 2]


def test_settings_and_latents_are_no_condition():
    class Settable(Pipe):
        def __call__(self, *, output_type, sigmas, latents, guidance_scale, label=0):
            super().__call__(labels=(label,))

    settings = {"output_type": "latent", "sigmas": [1.0, 0.5], "guidance_scale": [2.0]}
    calls = [settings | {"latents": torch.zeros(2)}] * 2
    assert runs_of(Settable(1.0), calls) == [0, 1]
    assert runs_of(Settable(1.0), [call | {"label": 3} for call in calls]) == [0]


def test_runs_are_saved_and_files_without_them_judge_by_rows(tmp_path):
    pipe, path = Pipe(1.0), tmp_path / "seen.safetensors"
    seen = calibrate(pipe, [{"labels": (0,)}, {"labels": (1,)}])
    seen.save(path)
    assert torch.equal(Calibration.load(path).runs["layer"], seen.runs["layer"])
    whole, seen.runs = seen.runs, {}
    seen.save(path)
    assert Calibration.load(path).runs == {}
    with quantize(pipe.transformer, "w4a8", compensate=path) as handle:
        assert "fewer than 64 different rows in one run, rounded to nearest: 1" in handle.explain()
    for runs, named in ((whole["layer"][1:], r"\[7\]"), (whole["layer"].float(), r".*float32")):
        seen.runs = {"layer": runs}
        seen.save(path)
        with pytest.raises(ValueError, match=rf"save writes it, got .*runs.layer of {named}"):
            Calibration.load(path)


def test_a_model_by_itself_has_no_runs():
    # Its calls are evaluations: steps of one run, for all that is known.
    assert calibrate(Modulated(), [{"x": torch.randn(2, K)}] * 3).runs == {}


def test_the_draw_keeps_rows_and_their_runs_together():
    pipe = Pipe(1.0)
    found = calibrate(pipe, [{"labels": (label,), "steps": 40} for label in range(5)], rows=16)
    table = nn.functional.silu(pipe.steps[:40] + pipe.conditions[:5, None])
    for row, run in zip(found.inputs["layer"], found.runs["layer"], strict=True):
        assert (table[run] == row).all(-1).any()
