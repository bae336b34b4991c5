"""cache="auto": plans beside the checkpoint, targets, verification and the guard."""

import math

import pytest
import torch

import fewstep
from fewstep.assets.digits import DigitsPipeline, load_digits_pipeline
from fewstep.caching import Plan, calibrate, plot_report
from fewstep.caching.plans import FOLDER
from fewstep.caching.quality import psnr
from patching.tiny_pipelines import arguments, call
from patching.tiny_pipelines import digits as digits_pipeline

STEPS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A saved pipeline with plans of 3 and 6 of 8 steps."""
    path = tmp_path_factory.mktemp("checkpoint")
    pipe = digits_pipeline(layers=1)
    pipe.save_pretrained(path)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": STEPS}
    (path / FOLDER).mkdir()
    for full in (3, 6):
        plan = calibrate(pipe, [given], full_steps=full, passes=1)
        plan.save(path / FOLDER / f"8-{full}.json")
    return path


def load(checkpoint):
    return DigitsPipeline.from_pretrained(checkpoint)


def skipped(pipe, cache="auto", **options):
    with fewstep.patch(pipe, cache=cache, **options) as patch:
        call(pipe, num_inference_steps=STEPS)
        return patch.report()["cache"]["skipped"] // 2


def test_the_fastest_that_reaches_the_target(checkpoint):
    pipe = load(checkpoint)
    assert skipped(pipe, target="psnr>=1") == 5
    assert skipped(pipe, speedup=2.0) == 5
    best = max(map(Plan.load, (checkpoint / FOLDER).iterdir()), key=lambda p: p.predicted["psnr"])
    assert skipped(pipe, speedup=1.1) == STEPS - len(best.full)
    assert skipped(pipe, speedup=2.0, cache=checkpoint / FOLDER) == 5


def test_a_target_that_no_plan_meets(checkpoint):
    pipe = load(checkpoint)
    before = dict(vars(pipe.transformer))
    with pytest.raises(ValueError, match=r"expected 149 dB, got plans of .*x at .* dB \(8 steps\)"):
        fewstep.patch(pipe, cache="auto", target="psnr>=149")
    with pytest.raises(ValueError, match="expected 7x, got plans of"):
        fewstep.patch(pipe, cache="auto", speedup=7)
    with pytest.raises(ValueError, match="speedup: expected a finite number of at least 1"):
        fewstep.patch(pipe, cache="auto", speedup=0.5)
    with pytest.raises(ValueError, match='target: expected such as "psnr>=30"'):
        fewstep.patch(pipe, cache="auto", target="good")
    assert dict(vars(pipe.transformer)) == before


def test_a_grid_without_a_plan_runs_in_full(checkpoint):
    pipe = load(checkpoint)
    plain = call(pipe, num_inference_steps=3)
    with fewstep.patch(pipe, cache="auto", target="psnr>=1") as patch:
        assert torch.equal(call(pipe, num_inference_steps=3), plain)
        numbers = patch.report()["cache"]
    assert numbers["skipped"] == 0
    assert numbers["why_full"] == {"no plan for this grid": 6}


def test_a_plan_is_carried_over_to_a_grid_without_one(checkpoint):
    pipe = load(checkpoint)
    with fewstep.patch(pipe, cache=checkpoint / FOLDER / "8-3.json"):
        wanted = call(pipe, num_inference_steps=12)
    with fewstep.patch(pipe, cache="auto", target="psnr>=1") as patch:
        assert torch.equal(call(pipe, num_inference_steps=12), wanted)
        numbers, said = patch.report()["cache"], patch.explain()
    assert (numbers["full"], numbers["skipped"]) == (2 * 3, 2 * 9)
    assert numbers["plan"]["carried_over_from"] == STEPS
    assert "carried over to 12: what that loses has not been measured" in said


def test_no_plan_there(checkpoint, tmp_path):
    pipe = digits_pipeline(layers=1)
    with pytest.raises(ValueError, match=r'cache="auto": expected a pipeline loaded from a folder'):
        fewstep.patch(pipe, cache="auto")
    (tmp_path / "stray.json").write_text("{}")
    with pytest.raises(ValueError, match=r"got none \(stray.json: .*expected a fewstep cache plan"):
        fewstep.patch(pipe, cache=tmp_path)
    with pytest.raises(ValueError, match=r"cache: expected a file with a plan, got 'none\.json'"):
        fewstep.patch(pipe, cache="none.json")
    with pytest.raises(ValueError, match=r"a plan's \.json file or a policy object, got 'plan'"):
        fewstep.patch(pipe, cache="plan")
    pipe = load(checkpoint)
    with torch.no_grad():
        next(pipe.transformer.parameters()).mul_(2)
    with pytest.raises(ValueError, match=r"got none \(8-3.json: weights: expected"):
        fewstep.patch(pipe, cache="auto")


@pytest.mark.parametrize("option", [{"target": "psnr>=30"}, {"speedup": 2}, {"verify": True}])
def test_options_that_belong_to_something_else(option):
    pipe = digits_pipeline()
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}: expected cache beside it"):
        fewstep.patch(pipe, quantize="w8a8", **option)
    with pytest.raises(ValueError, match=f"{name}: expected"):
        fewstep.patch(pipe, cache="interval", **option)


@pytest.fixture(scope="module")
def teacher_plan():
    pipe = load_digits_pipeline("teacher")
    pipe.set_progress_bar_config(disable=True)
    plan = calibrate(pipe, [given(0)], full_steps=6, passes=1)
    return pipe, plan


def given(seed, labels=6):
    return {
        "class_labels": list(range(labels)),
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        "num_inference_steps": 12,
        "guidance_scale": 1.0,
    }


def test_verify_measures_what_is_used_all_the_same(teacher_plan):
    pipe, plan = teacher_plan
    with fewstep.patch(pipe, cache=plan):
        cached = pipe(**given(0)).images
    with fewstep.patch(pipe, cache=plan, verify=True) as patch:
        verified = pipe(**given(0)).images
        numbers = patch.report()["cache"]
    assert torch.equal(cached, verified)
    (errors,) = numbers["measured_error"].values()
    measured = [step for step in errors if step not in plan.full]
    assert measured == [step for step in range(12) if step not in plan.full]
    for step in measured:
        assert len(errors[step]) == 6
        expected = numbers["step_error"][step]
        # Relative L1 of each sample against relative RMS of all; calibrated on this very call.
        assert expected / 3 < sum(errors[step]) / 6 < expected * 3


def test_the_report_as_a_picture(teacher_plan, tmp_path):
    pipe, plan = teacher_plan
    with fewstep.patch(pipe, cache=plan, verify=True) as patch:
        with pytest.raises(ValueError, match="one without steps"):
            plot_report(patch.report()["cache"], tmp_path / "none.png")
        pipe(**given(0))
        assert "relative error of forecasts: 0.0" in patch.explain()
        plot_report(patch.report()["cache"], tmp_path / "cache.png")
    with fewstep.patch(pipe, cache="interval") as patch:
        pipe(**given(0))
        plot_report(patch.report()["cache"], tmp_path / "interval.svg")
    assert (tmp_path / "cache.png").read_bytes().startswith(b"\x89PNG")
    assert "full" in (tmp_path / "interval.svg").read_text()
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="numbers: expected"):
        plot_report({"full": 1}, tmp_path / "none.png")


def test_the_guard_computes_what_is_off(teacher_plan):
    pipe, plan = teacher_plan
    plain = pipe(**given(1)).images
    never, always = plan.guarded(1e6), plan.guarded(1e-6)
    images = {}
    for key, policy in (("none", plan), ("never", never), ("always", always)):
        with fewstep.patch(pipe, cache=policy) as patch:
            images[key] = pipe(**given(1)).images
            images[key + "_why"] = patch.report()["cache"]["why_full"]
    assert torch.equal(images["none"], images["never"])
    assert "guard" not in images["never_why"]
    assert images["always_why"]["guard"] > 0
    # The gap before the first check is forecast all the same; everything behind it is computed.
    none, always = (psnr([plain], [images[key]]) for key in ("none", "always"))
    assert all(guarded > plainly for plainly, guarded in zip(none, always, strict=True))
    assert sum(always) / 6 > sum(none) / 6 + 3  # it was 5.5 dB


def test_the_guard_keeps_batch_mates_apart(teacher_plan):
    """The bits of a sample don't depend on whether another one trips."""
    pipe, plan = teacher_plan
    noise = torch.randn(6, 1, 16, 16, generator=torch.Generator().manual_seed(4))

    def draw(policy, rows):
        options = {**given(1, 2), "class_labels": rows, "latents": noise[rows]}
        with fewstep.patch(pipe, cache=policy) as patch:
            return pipe(**options).images, patch.report()["cache"]

    never = plan.guarded(1e9)
    (errors,) = draw(never, list(range(6)))[1]["measured_error"].values()
    expected = {i: check.expected for i, check in enumerate(plan.lookback) if check}
    ratios = torch.tensor([[e / expected[i] for e in found] for i, found in errors.items()])
    order = ratios.amax(0).argsort().tolist()
    calm, next_calm, wild = order[0], order[1], order[-1]
    limit = (ratios.amax(0)[next_calm] * ratios.amax(0)[wild]).sqrt().item()
    guarded = plan.guarded(limit)
    alone, numbers = draw(guarded, [calm, next_calm])
    assert "guard" not in numbers["why_full"]
    beside, numbers = draw(guarded, [calm, wild])
    assert numbers["why_full"]["guard"] > 0
    assert torch.equal(alone[0], beside[0])


def test_guard_of_what(teacher_plan):
    from dataclasses import replace

    _, plan = teacher_plan
    for factor in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="guard: expected None, or a finite factor above 0"):
            plan.guarded(factor)
    with pytest.raises(ValueError, match="without"):
        replace(plan, lookback=(), guard=2.0)
    with pytest.raises(ValueError, match="lookback: expected one entry per time"):
        replace(plan, lookback=plan.lookback[:3])


def test_the_guard_is_saved(teacher_plan, tmp_path):
    _, plan = teacher_plan
    guarded = plan.guarded(1.5)
    guarded.save(tmp_path / "plan.json")
    assert type(plan).load(tmp_path / "plan.json") == guarded
