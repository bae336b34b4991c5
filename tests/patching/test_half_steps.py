"""Half steps: the guided pass computed, the unguided one forecast, in two calls or in a batch."""

import json

import pytest
import torch

import fewstep
from fewstep.caching import GuidanceReuse, Plan, calibrate
from fewstep.caching.half_steps import Guidance, Passes, find_guidance
from patching.tiny_pipelines import call, denoiser
from patching.tiny_pipelines import digits as digits_pipeline

STEPS, SCALE = 6, 2.0
PASSES = ("calls", "first half", "second half")
# F full, h half, - skipped
ROW = "FhF-h-"
GUIDED = (None, None, None, (0.75, 0.5, -0.25), None, (1.5, -0.5))
DIFFERENCE = (None, (1.0,), None, (1.25, -0.25), (1.5, -0.5), (0.5, 0.5))


def pipeline(passes):
    pipe = digits_pipeline(layers=1)
    pipe.set_progress_bar_config(disable=True)
    if passes != "calls":
        pipe._velocity = lambda *given: _in_a_batch(pipe, passes, *given)
    return pipe


def _in_a_batch(pipe, passes, latents, time, labels):
    if pipe.guidance_scale <= 1:
        return pipe.transformer(latents, timestep=time, class_labels=labels, return_dict=False)[0]
    pair = [labels, torch.full_like(labels, pipe.num_classes)]
    both = torch.cat(pair if passes == "first half" else pair[::-1])
    given = {"timestep": torch.cat([time] * 2), "class_labels": both}
    parts = pipe.transformer(torch.cat([latents] * 2), **given, return_dict=False)[0].chunk(2)
    guided, other = parts if passes == "first half" else parts[::-1]
    return other + pipe.guidance_scale * (guided - other)


def plan_of(pipe, passes):
    call(pipe, num_inference_steps=STEPS)
    times = tuple(pipe.scheduler.timesteps.tolist())
    return Plan(times, GUIDED, guidance=DIFFERENCE, passes=passes)


def by_hand(pipe, batch):
    """What the plan says, in a loop of its own."""
    found, guided, differences = [], [], []
    transformer = pipe.transformer

    def velocity(latents, time, labels):
        step = len(found)
        found.append(None)
        run = {"timestep": time, "return_dict": False}
        if ROW[step] == "-":
            c = sum(w * x for w, x in zip(GUIDED[step], guided, strict=False))
        else:
            c = transformer(latents, class_labels=labels, **run)[0]
            guided.insert(0, c)
        if ROW[step] == "F":
            null = torch.full_like(labels, pipe.num_classes)
            d = c - transformer(latents, class_labels=null, **run)[0]
            differences.insert(0, d)
        else:
            d = sum(w * x for w, x in zip(DIFFERENCE[step], differences, strict=False))
        return c + (SCALE - 1) * d

    before, pipe._velocity = pipe._velocity, velocity
    try:
        return call(pipe, batch=batch, num_inference_steps=STEPS)
    finally:
        pipe._velocity = before


def rows_computed(pipe):
    rows = []
    handle = denoiser(pipe).pos_embed.register_forward_hook(lambda m, a, y: rows.append(len(y)))
    return rows, handle


@pytest.mark.parametrize("passes", PASSES)
def test_what_the_plan_says(passes):
    pipe = pipeline(passes)
    plan, want = plan_of(pipe, passes), by_hand(pipe, 2)
    plain = call(pipe, batch=2, num_inference_steps=STEPS)
    assert (plan.full, plan.half, plan.speedup) == ((0, 2), (1, 4), 2.0)
    with fewstep.patch(pipe, cache=plan) as patch:
        rows, handle = rows_computed(pipe)
        found = call(pipe, batch=2, num_inference_steps=STEPS)
        again = call(pipe, batch=2, num_inference_steps=STEPS)
        report = patch.report()["cache"]
        handle.remove()
    assert sum(rows) == 2 * 2 * (2 * 2 + 2)  # images x runs x passes
    assert torch.equal(found, again)
    # Sums of a few float32 products in another order, amplified by the later steps of a model
    # whose output is as large as its input: far less than what a wrong pass would make.
    assert (found - want).abs().max() < 1e-3 * (plain - want).abs().max()
    if passes == "calls":
        assert report["branches"] == {
            "call 0": ["full", "full", "full", "skip", "full", "skip"],
            "call 1": ["full", "skip", "full", "skip", "skip", "skip"],
        }
    else:
        words = {"F": "full", "h": "half", "-": "skip"}
        assert report["branches"] == {"call 0": [words[mark] for mark in ROW]}
        assert report["half"] == 2
    assert torch.equal(call(pipe, batch=2, num_inference_steps=STEPS), plain)


@pytest.mark.parametrize("passes", PASSES[1:])
def test_a_batch_of_other_images_is_not_halved(passes):
    pipe = pipeline(passes)
    plan = plan_of(pipe, passes)
    with fewstep.patch(pipe, cache=plan) as patch:
        call(pipe, batch=2, num_inference_steps=STEPS)  # guided: what it has found is not kept
        found = call(pipe, batch=4, num_inference_steps=STEPS, guidance_scale=1.0)
        assert "no halves of guidance" in patch.report()["cache"]["why_full"]
    assert torch.equal(found, call(pipe, batch=4, num_inference_steps=STEPS, guidance_scale=1.0))


@pytest.mark.parametrize("passes", PASSES[1:])
@pytest.mark.parametrize("kind", ["plan", "rule"])
def test_images_on_the_same_noise_are_no_passes(passes, kind):
    """Their first step looks like guidance's, and neither may be made of the other."""
    pipe = pipeline(passes)
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    given = {"guidance_scale": 1.0, "num_inference_steps": STEPS, "output_type": "latent"}

    def images(labels):
        return pipe(labels, latents=noise.repeat(2, 1, 1, 1), **given).images

    plain = images([1, 7])
    assert (plain[0] - plain[1]).abs().max() > 0.1
    rule = GuidanceReuse(first=0.3, passes=passes)
    with fewstep.patch(pipe, cache=plan_of(pipe, passes) if kind == "plan" else rule) as patch:
        found = images([1, 7])
        report = patch.report()["cache"]
        assert torch.equal(found, plain)
        assert report["full"] == STEPS
        assert report["why_full"]["no halves of guidance"] >= 2
        assert sum(report["why_full"].values()) == STEPS
        assert report["why"]["call 0"][1 if kind == "plan" else 2] == "no halves of guidance"
        call(pipe, batch=2, num_inference_steps=STEPS)  # with guidance, and then without again
        assert patch.report()["cache"]["half"] > 0
        assert torch.equal(images([1, 7]), plain)


@pytest.mark.parametrize("kind", ["first half", "second half"])
def test_halves_are_read_back_twice(kind, monkeypatch):
    from fewstep.caching import guided

    looks = []
    halves = guided.halves
    monkeypatch.setattr(guided, "halves", lambda *given: looks.append(1) or halves(*given))
    pipe = pipeline(kind)
    with fewstep.patch(pipe, cache=plan_of(pipe, kind)):
        for _ in range(2):
            call(pipe, batch=2, num_inference_steps=STEPS)
            assert len(looks) == 2
            looks.clear()


def test_without_guidance_in_calls_the_guided_pass_follows_its_weights():
    pipe = pipeline("calls")
    plan = plan_of(pipe, "calls")
    with fewstep.patch(pipe, cache=plan) as patch:
        found = call(pipe, num_inference_steps=STEPS, guidance_scale=1.0)
        assert patch.report()["cache"]["full"] == 4
    with fewstep.patch(pipe, cache=Plan(plan.times, GUIDED)):
        assert torch.equal(found, call(pipe, num_inference_steps=STEPS, guidance_scale=1.0))


def test_after_an_error_a_run_starts_anew():
    pipe = pipeline("calls")
    with fewstep.patch(pipe, cache=plan_of(pipe, "calls")):
        want = call(pipe, num_inference_steps=STEPS)

        def stop(pipe, step, *rest):
            if step == 3:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            call(pipe, num_inference_steps=STEPS, callback_on_step_end=stop)
        assert torch.equal(call(pipe, num_inference_steps=STEPS), want)


@pytest.mark.parametrize("passes", PASSES)
def test_calibrated(passes):
    pipe = pipeline(passes)
    generator = torch.Generator().manual_seed(3)
    calls = [
        {
            "class_labels": [3, 7],
            "num_inference_steps": 8,
            "guidance_scale": 1.05,  # the difference counts little, so that half steps pay
            "generator": generator,
            "output_type": "latent",
        }
    ]
    off = calibrate(pipe, calls, full_steps=4, passes=1)
    plan = calibrate(pipe, calls, full_steps=4, passes=1, guidance="auto")
    assert (off.guidance, plan.passes) == ((), passes)
    assert plan.half
    assert plan.speedup == 2
    assert plan.made["scale"] == pytest.approx(1.05, abs=1e-3)
    assert plan.predicted["psnr"] > off.predicted["psnr"] + 1
    state = generator.get_state()
    plain = pipe(**calls[0]).images
    generator.set_state(state)
    with fewstep.patch(pipe, cache=plan):
        cached = pipe(**calls[0]).images
    assert (cached - plain).square().mean().item() == pytest.approx(
        plan.predicted["final_mse"], rel=1e-3
    )


def given(pipe, **change):
    return {
        "class_labels": [3, 7, 1, 4],
        "num_inference_steps": STEPS,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(3),
        "output_type": "latent",
        **change,
    }


def test_a_plan_says_why_it_has_no_half_steps():
    pipe = pipeline("calls")

    def why(full_steps=3, guidance="auto", **change):
        made = calibrate(
            pipe, [given(pipe, **change)], full_steps=full_steps, passes=0, guidance=guidance
        )
        assert not made.half
        return made.made.get("half_steps")

    assert why(guidance="off") is None
    assert "no two guidance passes at step 0" in why(guidance_scale=1.0)
    assert "every step runs in full" in why(full_steps=STEPS)
    assert "no split" in why(full_steps=1)
    assert "no better" in why(guidance_scale=30.0)


def test_calibration_holds_no_second_copies_of_the_passes(monkeypatch):
    """No tensor of all runs in float64, and what is taken from the full runs is taken once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from fewstep.caching import half_steps

    largest, made = [], []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
                largest.append(output.numel())
            return output

    grams = half_steps.gram_matrices
    monkeypatch.setattr(half_steps, "gram_matrices", lambda x: made.append(x.shape) or grams(x))
    pipe = pipeline("calls")
    with Sizes():
        calibrate(pipe, [given(pipe)], target="psnr>=40", order=1, passes=1, guidance="auto")
    assert len(made) == 2
    assert max(largest) < STEPS * 4 * 256


def test_guidance_off_a_sum_has_no_half_steps():
    guided, other = torch.randn(2, 3, 2, 5, generator=torch.Generator().manual_seed(0))
    found = Passes()
    for step in range(3):
        found[step] = [guided[step], other[step]]
    mixed = list(other + 3.0 * (guided - other))
    made = find_guidance(torch.nn.Identity(), found, mixed)
    assert isinstance(made, Guidance)
    assert made.passes == "calls"
    assert made.scales == pytest.approx([3.0] * 3, abs=1e-4)
    swapped = list(guided + 3.0 * (other - guided))
    assert "computed first" in find_guidance(torch.nn.Identity(), found, swapped)
    rescaled = [mixed[0], mixed[1], mixed[2].relu()]
    assert "step 2 is no sum" in find_guidance(torch.nn.Identity(), found, rescaled)
    del found[1][1]
    assert "no two guidance passes at step 1" in find_guidance(torch.nn.Identity(), found, mixed)


def test_file(tmp_path):
    made = Plan(tuple(range(6, 0, -1)), GUIDED, guidance=DIFFERENCE, passes="calls")
    path = tmp_path / "plan.json"
    made.save(path)
    assert Plan.load(path) == made
    assert repr(made) == "Plan(2 of 6 steps in full, 2 in half, 2.00x)"
    data = json.loads(path.read_text())
    old = {k: v for k, v in data.items() if k not in ("guidance", "passes")} | {"version": 2}
    path.write_text(json.dumps(old))
    assert Plan.load(path) == made.without_half_steps()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passes": None}, "guidance: expected one entry per time"),
        ({"guidance": DIFFERENCE[:5]}, "guidance: expected one entry per time"),
        ({"guidance": (None,) * 6}, "guidance: expected weights at step 3"),
        ({"guidance": ((1.0,), *DIFFERENCE[1:])}, "guidance: expected 1 to 0 weights at step 0"),
    ],
)
def test_no_half_steps(change, message):
    given = {"guidance": DIFFERENCE, "passes": "calls", **change}
    with pytest.raises(ValueError, match=message):
        Plan(tuple(range(6, 0, -1)), GUIDED, **given)


def test_the_published_rule():
    pipe = pipeline("second half")
    policy = GuidanceReuse(first=0.5, every=2)
    with fewstep.patch(pipe, cache=policy) as patch:
        call(pipe, num_inference_steps=10)
        row = patch.report()["cache"]["branches"]["call 0"]
    assert row == ["full"] * 5 + ["half", "full"] * 2 + ["half"]
    assert policy.on(tuple(range(10, 0, -1))).guidance[5] == (1.0,)
    along = GuidanceReuse(first=0.5, every=2, degree=1).on(tuple(range(10, 0, -1)))
    assert along.guidance[5] == pytest.approx((2.0, -1.0))
    with pytest.raises(ValueError, match="passes: expected 'calls' or"):
        GuidanceReuse(passes="both")
    with pytest.raises(ValueError, match="first: expected a finite number >= 0 and <= 1"):
        GuidanceReuse(first=1.5)
    with pytest.raises(ValueError, match=r"degree: expected 0 or 1, got 1\.0"):
        GuidanceReuse(degree=1.0)


@pytest.mark.parametrize("passes", ["calls", "second half"])
def test_the_published_rule_finds_out_how_passes_are_computed(passes):
    pipe = pipeline(passes)

    def draw(cache, **given):
        with fewstep.patch(pipe, cache=cache) as patch:
            found = call(pipe, batch=2, num_inference_steps=10, **given)
            return found, patch.report()["cache"]

    wanted, said = draw(GuidanceReuse(passes=passes))
    found, numbers = draw("guidance-reuse")
    assert said["skipped"] + said["half"] == 5
    assert numbers == said
    assert torch.equal(found, wanted)
    # Equal noise, so that the halves of a call that computes one pass look like two passes.
    noise = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
    wanted, _ = draw(GuidanceReuse(passes=passes), latents=noise)
    found, numbers = draw("guidance-reuse", latents=noise)
    assert torch.equal(found, wanted)
    assert numbers["skipped"] + numbers["half"] == 5
