"""SeaCache: its filter, noise levels of schedulers, decisions as diffusers' hook, samples apart."""

import diffusers
import numpy as np
import pytest
import torch

import fewstep
from fewstep.caching import PRESETS, SeaCache, seacache
from fewstep.caching.calls import Branch, Call
from fewstep.caching.seacache import (
    SeaMemory,
    expect_noise_levels,
    noise_ratios,
    token_grid,
    wiener,
)
from patching.tiny_pipelines import build, call, digits

STEPS = 8


def test_the_filter_is_its_formula():
    x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0)).double()
    ratio, power = 2.5, 3.0
    gain = np.ones((8, 5))
    for axis, size in enumerate((8, 5)):
        f = np.abs(np.fft.fftfreq(size)).reshape([-1, 1] if axis == 0 else [1, -1])
        gain = gain / (1 + ratio**2 * f**power)
    gain /= gain.mean()
    want = np.fft.ifft2(np.fft.fft2(x.numpy()) * gain).real
    np.testing.assert_allclose(wiener(x, (2, 3), ratio, power).numpy(), want, atol=1e-13)
    assert torch.allclose(wiener(x, (2, 3), 0.0, power), x, atol=1e-13)  # nothing is noise
    blurred = wiener(x, (2, 3), 1e6, power)  # all of it is: the mean is left, times its gain
    assert torch.allclose(blurred, x.mean((2, 3), keepdim=True) * 40, atol=1e-5)
    assert wiener(x.half(), (2, 3), ratio, power).dtype == torch.float32


@pytest.mark.parametrize("scheme", ["calls", "batch"])
def test_what_a_run_filters(monkeypatch, scheme):
    """Gains once a grid, latents once a step for all passes, and not on the last step."""
    made, filtered = [], []
    real = seacache.gains, seacache._filtered
    monkeypatch.setattr(seacache, "gains", lambda *a: made.append(a[0]) or real[0](*a))
    monkeypatch.setattr(seacache, "_filtered", lambda *a: filtered.append(1) or real[1](*a))
    pipe = digits(layers=2) if scheme == "calls" else build("sd-unet")
    steps = {"num_inference_steps": STEPS}
    with fewstep.patch(pipe, cache=SeaCache(threshold=0.5)) as patch:
        image = call(pipe, guidance_scale=2.0, **steps)
        evaluated = max(map(len, patch.report()["cache"]["branches"].values()))
        assert len(filtered) == evaluated - 1
        assert len(made) == 1  # both axes are equally long
        assert torch.equal(call(pipe, guidance_scale=2.0, **steps), image)
        assert len(made) == 1
        call(pipe, num_inference_steps=STEPS + 1)
        assert len(made) == 2


def test_filtered_latents_are_those_of_the_present_input():
    policy, scheduler = SeaCache(), diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    session = policy.session(policy, lambda: scheduler)
    ratios = noise_ratios(scheduler)
    x = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0))
    for step in (0, 1, 3):
        session._clock = step, None
        now = Call(Branch("call"), step)
        found = session.seen(now, x)
        torch.testing.assert_close(found, wiener(x, (2, 3), ratios[step], policy.power))
        assert session.seen(now, x) is found
        assert session.seen(now, x.clone()) is not found
    x.add_(1)
    want = wiener(x, (2, 3), ratios[3], policy.power)
    torch.testing.assert_close(session.seen(now, x), want)
    with torch.inference_mode():
        y = x.clone()
        session.seen(now, y)
        y.add_(1)
        want = wiener(y, (2, 3), ratios[3], policy.power)
        torch.testing.assert_close(session.seen(now, y), want)


def test_noise_levels_of_schedulers():
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(4)
    want = [s / (1 - s) for s in flow.sigmas.tolist()[1:]]
    assert noise_ratios(flow) == pytest.approx([1e6, *want])
    shifted = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True)
    shifted.set_timesteps(4)
    assert noise_ratios(shifted)[1] == pytest.approx(1 / (1 / shifted.sigmas[1].item() - 1))
    exploding = diffusers.EulerDiscreteScheduler()
    exploding.set_timesteps(4)
    assert noise_ratios(exploding) == pytest.approx(exploding.sigmas.tolist())
    for kind in (diffusers.DDIMScheduler, diffusers.DDPMScheduler):
        preserving = kind()
        preserving.set_timesteps(4)
        alphas = preserving.alphas_cumprod[preserving.timesteps]
        assert noise_ratios(preserving) == pytest.approx(((1 - alphas) / alphas).sqrt().tolist())
    with pytest.raises(ValueError, match="sigmas or alphas_cumprod"):
        noise_ratios(object())


@pytest.mark.parametrize("kind", ["IPNDMScheduler", "DDPMWuerstchenScheduler"])
def test_a_scheduler_without_noise_levels_is_refused_at_patch(kind):
    pipe = digits(layers=1)
    plain = call(pipe, num_inference_steps=4)
    scheduler, pipe.scheduler = pipe.scheduler, getattr(diffusers, kind)()
    with pytest.raises(ValueError, match=f"sigmas or alphas_cumprod, .* got {kind}"):
        fewstep.patch(pipe, cache="seacache")
    pipe.scheduler = scheduler
    assert torch.equal(call(pipe, num_inference_steps=4), plain)


def test_schedulers_whose_noise_levels_come_with_the_timesteps_are_not_refused():
    late = diffusers.LTXEulerAncestralRFScheduler()
    with pytest.raises(ValueError, match="sigmas or alphas_cumprod"):
        noise_ratios(late)
    expect_noise_levels(late)

    class Homemade:
        def set_timesteps(self, count):
            self.sigmas = torch.linspace(1, 0, count + 1)

    class Demanding:
        def set_timesteps(self, count, *, mu):
            self.sigmas = mu * torch.linspace(1, 0, count + 1)

    for scheduler in (Homemade(), Demanding()):
        expect_noise_levels(scheduler)
        assert not hasattr(scheduler, "sigmas")
    with pytest.raises(ValueError, match="got NoneType"):
        expect_noise_levels(None)


def test_grids_of_tokens():
    ids = torch.cartesian_prod(torch.tensor([0]), torch.arange(2), torch.arange(3))
    assert token_grid({"img_ids": ids}, 6) == (2, 3)
    assert token_grid({"img_ids": ids[None].float()}, 6) == (2, 3)
    assert token_grid({"img_shapes": [[(1, 2, 3)]] * 2}, 6) == (2, 3)
    assert token_grid({"num_frames": 2, "height": 3, "width": 4}, 24) == (2, 3, 4)
    assert token_grid({"img_shapes": [[(1, 2, 3)]], "height": 3}, 7) == (7,)
    assert token_grid({}, 7) == (7,)


def contexts(pipe):
    """Tell diffusers' hook what the calls are; the pipeline doesn't."""
    from diffusers.hooks import HookRegistry
    from diffusers.hooks.hooks import CacheContext, _set_cache_context

    scheduler = pipe.scheduler

    def tell(module, args, kwargs):
        index = scheduler.step_index or 0
        name = "uncond" if int(kwargs["class_labels"][0]) == pipe.num_classes else "cond"
        if index == 0 and name == "cond":
            HookRegistry.check_if_exists_or_initialize(module).reset_stateful_hooks(recurse=True)
        sigma = float(scheduler.sigmas[index])
        total = len(scheduler.timesteps)
        _set_cache_context(module, CacheContext(name, index, total, None, sigma))

    pipe.transformer.register_forward_pre_hook(tell, with_kwargs=True)


@pytest.mark.parametrize("threshold", [0.3, 1.0])
def test_it_is_diffusers_hook(threshold):
    """One image: the same steps run, and what stands for the others is the same."""
    hooks = pytest.importorskip("diffusers.hooks.sea_cache")
    given = {"num_inference_steps": 20, "guidance_scale": 2.0}
    pipe = digits(layers=2)
    with fewstep.patch(pipe, cache=SeaCache(threshold=threshold)) as patch:
        ours = call(pipe, **given)
        first, second = patch.report()["cache"]["branches"].values()
    assert first == second
    assert 4 <= first.count("skip") <= 16
    ran = []
    pipe.transformer.transformer_blocks[1].attn1.register_forward_pre_hook(lambda *_: ran.append(1))
    config = hooks.SeaCacheConfig(
        threshold=threshold, raw_vision_callback=lambda module, args, kwargs: [args[0][0][:, None]]
    )
    hooks.apply_sea_cache(pipe.transformer, config)
    contexts(pipe)
    theirs = call(pipe, **given)
    assert len(ran) == 2 * first.count("full")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("digits", "blocks"),
        ("flux", "blocks"),
        ("sd-unet", "blocks"),
        ("flux", "output"),
        ("pixart", "output"),
    ],
)
def test_on_pipelines(name, scope):
    pipe = build(name)
    plain = call(pipe, num_inference_steps=STEPS)
    with fewstep.patch(pipe, cache=SeaCache(threshold=0.0, scope=scope)) as patch:
        assert torch.equal(call(pipe, num_inference_steps=STEPS), plain)
        assert patch.report()["cache"]["skipped"] == 0
    with fewstep.patch(pipe, cache=SeaCache(threshold=1e9, scope=scope)) as patch:
        image = call(pipe, num_inference_steps=STEPS)
        for decisions in patch.report()["cache"]["branches"].values():
            if len(decisions) == STEPS:  # PNDM evaluates its second step twice
                assert "".join(d[0] for d in decisions) == "fssfssff"
        assert image.isfinite().all()
        call(pipe, num_inference_steps=5, seed=3)
        assert torch.equal(call(pipe, num_inference_steps=STEPS), image)
    assert torch.equal(call(pipe, num_inference_steps=STEPS), plain)


class Dice(SeaCache):
    def small_change(self, change):
        return (change * 1e5).long() % 3 != 0


@pytest.mark.parametrize("scope", ["output", "blocks"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_batch_mates_change_no_bit(scope, guidance):
    pipe = digits(layers=2)
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [noise[[0, 0, 0]], noise, torch.cat([noise[:1], noise[1:] * 9])]
    images, blended = [], 0
    with fewstep.patch(pipe, cache=Dice(scope=scope)) as patch:
        for latents in batches:
            given = {"latents": latents, "num_inference_steps": 12, "guidance_scale": guidance}
            images.append(pipe([4, 4, 4], output_type="latent", **given).images[0])
            blended += patch.report()["cache"]["blended"]
    assert blended > 0
    assert torch.equal(images[1], images[0])
    assert torch.equal(images[2], images[0])


def test_every_sample_goes_on_along_its_own_line():
    """Samples whose last full steps differ: each is carried on by its own two."""
    policy = SeaCache()
    memory = SeaMemory(torch.zeros(2, 1), torch.zeros(2))
    slope = torch.tensor([[1.0], [10.0]])
    for step, since in ((0, (0, 0)), (1, (1, 1)), (4, (1, 4)), (5, (5, 4))):
        stays = None
        if step > 1:
            stays = torch.tensor([at != step for at in since])
        full = Call(Branch("call"), step, stays=stays, since=since)
        policy.learn(memory, full, (slope * step,))
    found = policy.carry(memory, None, Call(Branch("call"), 7))
    assert torch.allclose(found, slope * 7)
    assert memory.at == (5, 4)
    assert memory.before == (1, 1)


def test_samples_on_one_line_copy_nothing_to_the_device(monkeypatch):
    policy, memory = SeaCache(), SeaMemory(torch.zeros(2, 1), torch.zeros(2))
    slope = torch.tensor([[1.0], [10.0]])
    for step in (1, 4):
        policy.learn(memory, Call(Branch("call"), step), (slope * step,))
    monkeypatch.setattr(torch, "tensor", None)
    assert torch.allclose(policy.carry(memory, None, Call(Branch("call"), 7)), slope * 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SeaCache(threshold=-1), "threshold: expected a finite number >= 0"),
        (lambda: SeaCache(degree=2), "degree: expected 0 or 1, got 2"),
        (lambda: SeaCache(power=0), "power: expected a finite number > 0"),
        (lambda: SeaCache(scope="tokens"), "scope: expected 'output' or 'blocks'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_preset():
    assert PRESETS["seacache"]() == SeaCache()
