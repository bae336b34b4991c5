"""Plans on pipelines: what is skipped, exactness without skips, errors that change nothing."""

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverSinglestepScheduler

import fewstep
from fewstep.caching import Plan, calibrate
from fewstep.caching.quality import psnr
from fewstep.patching import PatchError
from patching.tiny_pipelines import BUILDERS, Counter, arguments, build, call, denoiser
from patching.tiny_pipelines import digits as digits_pipeline

STEPS = 6
FIVE = {"num_inference_steps": 5}
# PNDM evaluates its second step twice: it is in test_plan_samplers.
ALL = sorted(set(BUILDERS) - {"sd-unet", "digits_student"})


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


def schedule(pipe, *skipped):
    """A plan that reuses the newest output, on the pipeline's own grid."""
    times = []
    step = pipe.scheduler.step

    def watch(output, timestep, *args, **kwargs):
        times.append(float(timestep))
        return step(output, timestep, *args, **kwargs)

    pipe.scheduler.step = watch
    run(pipe)
    del pipe.scheduler.step
    return Plan(tuple(times), tuple((1.0,) if i in skipped else None for i in range(len(times))))


@pytest.mark.parametrize("name", ALL)
def test_nothing_skipped_is_bit_identical(name):
    pipe = build(name)
    plain = run(pipe)
    with fewstep.patch(pipe, cache=schedule(pipe)) as patch:
        assert torch.equal(run(pipe), plain)
        assert patch.report()["cache"]["skipped"] == 0


@pytest.mark.parametrize("name", ALL)
def test_skipped_steps_run_nothing_of_the_model(name):
    pipe = build(name)
    plain = run(pipe)
    model = denoiser(pipe)
    part = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
    with Counter(part) as unpatched:
        run(pipe)
    with fewstep.patch(pipe, cache=schedule(pipe, 2, 3, 5)) as patch:
        with Counter(part) as counter:
            image = run(pipe)
        for decisions in patch.report()["cache"]["branches"].values():
            assert decisions == ["full", "full", "skip", "skip", "full", "skip"]
        assert torch.equal(run(pipe), image)  # a second image starts anew
    assert counter.counts[0] * 2 == unpatched.counts[0]
    assert image.isfinite().all()
    assert not torch.equal(image, plain)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["digits", "flux", "sana"])
def test_calibrated(name):
    pipe = build(name)
    run(pipe)
    before = set(vars(denoiser(pipe)))
    generator = torch.Generator().manual_seed(3)
    state = generator.get_state()
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": 8}
    rng = torch.get_rng_state()
    plan = calibrate(pipe, [{**given, "generator": generator}, given], full_steps=5)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), rng)
    assert "step" not in vars(pipe.scheduler)
    assert set(vars(denoiser(pipe))) == before
    assert len(plan.full) == 5
    assert plan.full[0] == 0
    assert plan.predicted["psnr"] > 25
    errors = plan.predicted["step_error"]
    assert [error > 0 for error in errors] == [i >= first_skipped(plan) for i in range(8)]
    alone = calibrate(pipe, [{**given, "generator": generator}], full_steps=5)
    plain = pipe(**given, generator=generator).images
    generator.set_state(state)
    with fewstep.patch(pipe, cache=alone):
        cached = pipe(**given, generator=generator).images
    assert psnr([plain], [cached]) == pytest.approx([alone.predicted["psnr"]], abs=1e-3)


def first_skipped(plan):
    return next(i for i, weights in enumerate(plan.steps) if weights is not None)


def test_calls_that_share_a_generator_draw_one_after_the_other():
    pipe = digits_pipeline(layers=1)
    generator = torch.Generator().manual_seed(3)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": 6}
    state = generator.get_state()
    plan = calibrate(pipe, [{**given, "generator": generator}] * 2, full_steps=4, passes=0)
    assert torch.equal(generator.get_state(), state)
    plain = [pipe(**given, generator=generator).images for _ in range(2)]
    assert not torch.equal(*plain)
    generator.set_state(state)
    with fewstep.patch(pipe, cache=plan):
        cached = [pipe(**given, generator=generator).images for _ in range(2)]
    found = psnr(plain, cached)
    assert plan.predicted["psnr"] == pytest.approx(sum(found) / 2, abs=1e-3)
    assert plan.predicted["psnr_min"] == pytest.approx(min(found), abs=1e-3)
    assert found[0] != pytest.approx(found[1], abs=0.01)


def test_passes_correct_what_the_plan_itself_leads_to():
    from fewstep.assets.digits import load_digits_pipeline

    pipe = load_digits_pipeline("teacher")
    pipe.set_progress_bar_config(disable=True)

    def calls(seed):
        generator = torch.Generator().manual_seed(seed)
        return [{"class_labels": list(range(6)), "generator": generator, "output_type": "latent"}]

    given = {**calls(0)[0], "num_inference_steps": 16, "guidance_scale": 1.0}
    open_loop = calibrate(pipe, [given], full_steps=6, passes=0)
    closed = calibrate(pipe, [given], full_steps=6, passes=2)
    assert closed.predicted["psnr"] > open_loop.predicted["psnr"] + 3
    held_out = {**calls(1)[0], "num_inference_steps": 16, "guidance_scale": 1.0}
    plain = pipe(**held_out).images
    errors = []
    for plan in (open_loop, closed):
        held_out["generator"].manual_seed(1)
        with fewstep.patch(pipe, cache=plan):
            errors.append((pipe(**held_out).images - plain).square().mean())
    assert errors[1] < errors[0] / 2


def test_target_and_speedup():
    pipe = digits_pipeline(layers=2)
    given = [{**arguments(pipe), "output_type": "pt", "num_inference_steps": 8}]
    fast = calibrate(pipe, given, speedup=4, passes=0)
    assert len(fast.full) == 2
    reached = fast.predicted["psnr"] + 3
    good = calibrate(pipe, given, target=f"psnr>={reached:.2f}", passes=0)
    assert good.predicted["psnr"] >= reached
    assert 2 < len(good.full) <= 8
    everything = calibrate(pipe, given, target="psnr>=150", passes=2)
    assert (len(everything.full), everything.predicted["psnr"]) == (8, 150)
    assert len(calibrate(pipe, given, passes=0).full) == 2  # a quarter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"full_steps": 0}, "full_steps: expected at least 1, got 0"),
        ({"full_steps": 9}, "full_steps: expected at most the calls' 8 steps, got 9"),
        ({"order": 0}, "order: expected at least 1"),
        ({"order": 9}, "order: expected at most 8, got 9"),
        ({"passes": -1}, "passes: expected at least 0"),
        ({"tail": 0.5}, "tail: expected a finite number of at least 1"),
        ({"speedup": 0.5}, "speedup: expected a finite number"),
        ({"speedup": True}, "speedup: expected a finite number of at least 1, got True"),
        ({"speedup": 9}, "speedup: expected at most 8, the calls' steps, got 9"),
        ({"tail": True}, "tail: expected a finite number of at least 1, got True"),
        ({"target": "psnr>=151"}, "target: expected at most 150 dB"),
        (
            {"full_steps": 4, "speedup": 2},
            "speedup: expected one of .*, got full_steps and speedup",
        ),
        ({"speedup": 2, "target": "psnr>=30"}, "target: expected one of .*, got speedup and targ"),
        ({"target": "ssim>=1"}, "target: expected such as \"psnr>=30\", got 'ssim>=1'"),
    ],
)
def test_bad_options(options, message):
    pipe = digits_pipeline(layers=1)
    given = [{**arguments(pipe), "output_type": "latent", "num_inference_steps": 8}]
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, given, **options)


def test_bad_calls():
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent"}
    with pytest.raises(ValueError, match="calls: expected at least one dict"):
        calibrate(pipe, [])
    with pytest.raises(ValueError, match=r"expected one grid in all calls, 8 steps.*got 6"):
        calibrate(pipe, [{**given, "num_inference_steps": n} for n in (8, 6)])
    with pytest.raises(TypeError, match="pipe: expected a pipeline with a scheduler"):
        calibrate(torch.nn.Linear(2, 2), [given])
    unet = build("sd-unet")
    sizes = [
        {**arguments(unet), "output_type": "latent", "height": 16, "width": w} for w in (16, 8)
    ]
    unet.scheduler = DDIMScheduler.from_config(unet.scheduler.config)
    for values in (4, 65536):  # cut to a few values, two sizes would look alike
        with pytest.raises(ValueError, match=r"one size of latents, \[4, .*, got .* in call 1"):
            calibrate(unet, sizes, values=values)
    refused = pytest.raises(ValueError, match="got one that is cached")
    with fewstep.patch(pipe, cache=schedule(pipe, 2)), refused:
        calibrate(pipe, [given])


def test_outputs_that_are_not_finite():
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": 4}

    def break_down(model, inputs, output):
        nonlocal count
        count += 1
        output[0][:] = output[0] * (float("nan") if count > 14 else 1)

    count = 0
    handle = pipe.transformer.register_forward_hook(break_down)
    with pytest.raises(ValueError, match="expected finite outputs, got NaN at step 3 of call 1"):
        calibrate(pipe, [given, given])  # two calls of the model per step
    handle.remove()


def test_a_compiled_model_is_refused_before_it_is_called():
    pipe = digits_pipeline(layers=1)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match=r"uncompiled model in pipe.transformer, got OptimizedMod"):
        calibrate(pipe, [{"no such argument": 0}])


def test_a_plan_of_another_pipeline_is_refused(tmp_path):
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": 6}
    plan = calibrate(pipe, [given], full_steps=4, passes=0)
    other = build("sana")
    before = dict(vars(other.transformer))
    with pytest.raises(ValueError, match="model: expected 'DiTTransformer2DModel', got 'Sana"):
        fewstep.patch(other, cache=plan)
    assert dict(vars(other.transformer)) == before
    plan.save(tmp_path / "plan.json")
    with torch.no_grad():
        next(pipe.transformer.parameters()).mul_(2)
    with pytest.raises(ValueError, match="weights: expected"):
        fewstep.patch(pipe, cache=tmp_path / "plan.json")


def test_a_scheduler_that_rewrites_its_configuration():
    """A plan fits before and after the run that makes the scheduler do so."""
    pipe = build("pixart")
    pipe.scheduler = DPMSolverSinglestepScheduler(final_sigmas_type="sigma_min")
    plan = calibrate(pipe, [{**arguments(pipe), "output_type": "latent", **FIVE}], full_steps=4)
    assert pipe.scheduler.config.lower_order_final is False
    for _ in range(2):
        with fewstep.patch(pipe, cache=plan) as patch:
            call(pipe, **FIVE)
            assert patch.report()["cache"]["skipped"] > 0
        call(pipe, **FIVE)
        assert pipe.scheduler.config.lower_order_final is True
    pipe.scheduler.register_to_config(solver_order=3)
    with pytest.raises(ValueError, match="configuration: expected solver_order 2, got 3"):
        fewstep.patch(pipe, cache=plan)


def test_other_step_counts():
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent"}
    plan = calibrate(pipe, [{**given, "num_inference_steps": 12}], full_steps=6, passes=0)
    with fewstep.patch(pipe, cache=plan) as patch:
        image = call(pipe, num_inference_steps=10)  # carried over
        assert image.isfinite().all()
        assert patch.report()["cache"]["skipped"] > 0
        with pytest.raises(ValueError, match="expected 6 to 24 steps"):
            call(pipe, num_inference_steps=3)
        assert torch.equal(call(pipe, num_inference_steps=10), image)


def test_an_exception_leaves_nothing_behind():
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe, 2, 3, 5)
    with fewstep.patch(pipe, cache=plan):
        image = run(pipe)

        def stop(pipe, step, timestep, values):
            if step == 2:
                raise KeyboardInterrupt
            return values

        with pytest.raises(KeyboardInterrupt):
            run(pipe, seed=5, callback_on_step_end=stop)
        assert torch.equal(run(pipe), image)


def test_an_image_does_not_depend_on_its_batch_mates():
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe, 2, 3, 5)
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    others = torch.cat([noise[:1], noise[1:] * 3])
    with fewstep.patch(pipe, cache=plan):
        first, second = (
            pipe([4, 1, 2], num_inference_steps=STEPS, latents=x, output_type="latent").images[0]
            for x in (noise, others)
        )
    assert torch.equal(first, second)


def test_gradients_are_never_cut_off():
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe, 2, 3)
    model = pipe.transformer
    with fewstep.patch(pipe, cache=plan) as patch:
        pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
        x = torch.randn(1, 1, 16, 16, requires_grad=True)
        for time in pipe.scheduler.timesteps:
            out = model(x, timestep=time.reshape(1), class_labels=torch.tensor([3])).sample
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert gradient.abs().sum() > 0
            pipe.scheduler.step(out.detach(), time, x.detach())
        assert patch.report()["cache"]["skipped"] == 0
        assert patch.report()["cache"]["why_full"]["gradients wanted"] == 3  # before the last skip


def test_refused_on_top_of_another_cache():
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe, 2)
    with fewstep.patch(pipe, cache=plan), pytest.raises(PatchError, match="not yet patched"):
        fewstep.patch(pipe, cache="interval")


def test_a_pass_that_was_away_at_a_full_step(monkeypatch):
    """Its older snapshots are not taken for those of the steps that it missed."""
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe)
    full = (0, 2, 4)
    steps = tuple(None if i in full else (1.0,) if i == 1 else (0.5, 0.5) for i in range(STEPS))
    plan = Plan(plan.times, steps)
    real = torch.Tensor.new_empty

    def poisoned(tensor, *args, **kwargs):
        found = real(tensor, *args, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    scales = {0: 1.0, 1: 1.0, 2: 2.0}  # of the next step: the unguided pass is away at 1 and 2

    def guide(pipe, step, timestep, values):
        pipe._guidance_scale = scales.get(step, 2.0)
        return values

    with fewstep.patch(pipe, cache=plan) as patch:
        image = run(pipe, callback_on_step_end=guide)
        decisions = patch.report()["cache"]["branches"]["call 1"]
    assert image.isfinite().all()
    # Steps 0, 3, 4, 5: one snapshot of two at 3 and 5.
    assert decisions == ["full"] * 4


def test_snapshots_go_with_the_image():
    pipe = digits_pipeline(layers=1)
    plan = schedule(pipe, 2, 3, 5)
    with fewstep.patch(pipe, cache=plan):
        run(pipe)
        session = pipe.transformer.forward.session
        rings = [branch.ring for branch in session._branches.values()]
        assert len(rings) == 2
        assert all(ring.count(rank) == 0 for ring in rings for rank in range(STEPS))
        assert not any(ring._slots for ring in rings)


def test_what_changes_after_the_patch_is_noticed():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": STEPS}
    plan = calibrate(pipe, [given], full_steps=3, passes=0)
    with fewstep.patch(pipe, cache=plan) as patch:
        run(pipe)
        assert patch.report()["cache"]["skipped"] > 0
        scheduler = pipe.scheduler
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()
        pipe(**{**given, "num_inference_steps": 3})
        assert set(patch.report()["cache"]["why_full"]) == {"another scheduler"}
        pipe.scheduler = scheduler
        run(pipe)
        assert patch.report()["cache"]["skipped"] > 0


def test_carried_over_is_said():
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent"}
    plan = calibrate(pipe, [{**given, "num_inference_steps": 12}], full_steps=6, passes=0)
    with fewstep.patch(pipe, cache=plan) as patch:
        call(pipe, num_inference_steps=10)
        numbers = patch.report()["cache"]
        assert numbers["plan"]["carried_over_from"] == 12
        assert "step_error" not in numbers
        assert "a plan for 12 steps, carried over to 10" in patch.explain()


def test_runs_unlike_the_calibration_are_said():
    pipe = digits_pipeline(layers=1)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": STEPS}
    plan = calibrate(pipe, [given], full_steps=3, passes=0)
    assert plan.made["guidance"] == [2.0, 2.0]
    with fewstep.patch(pipe, cache=plan) as patch:
        run(pipe)
        assert patch.report()["cache"]["plan"]["remarks"] == []
        run(pipe, guidance_scale=4.0)
        said = patch.report()["cache"]["plan"]["remarks"]
        assert said == ["guidance 4, calibrated with 2"]
        assert "unlike the plan's calibration: guidance 4" in patch.explain()
    unet = build("sd-unet")
    given = {**arguments(unet), "output_type": "latent", "num_inference_steps": 4}
    plan = calibrate(unet, [given], full_steps=3, passes=0)
    with fewstep.patch(unet, cache=plan) as patch:
        unet(**{**given, "width": 8})
        (said,) = patch.report()["cache"]["plan"]["remarks"]
        assert said == "latents of [4, 8, 4], calibrated with [4, 8, 8]"


def test_image_to_image_without_a_step_index():
    """Where the scheduler counts no steps, the model's time says where in the schedule a run is."""
    from diffusers import DDIMScheduler

    from fewstep.caching import OutputStack, ScheduledSession

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    times = tuple(float(t) for t in scheduler.timesteps)
    plan = Plan(times, tuple((1.0,) if 1 <= i <= 4 or i == 7 else None for i in range(10)))
    model = torch.nn.Identity()
    session = ScheduledSession(plan, lambda: scheduler)
    model.forward = lambda sample, timestep: sample.clone()
    for module, name, value in OutputStack(model).replacements(session):
        setattr(module, name, value)
    for time in scheduler.timesteps[5:]:
        model(torch.randn(1, 3), timestep=time)
    (decisions,) = session.report()["branches"].values()
    assert decisions == ["full", "full", "skip", "full", "full"]
