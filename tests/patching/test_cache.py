"""cache= on pipelines: exact where nothing is skipped, fresh for every image, apart per branch."""

import copy

import pytest
import torch

import fewstep
from fewstep.caching import FirstBlock, Interval
from fewstep.patching import PatchError, active_patches
from patching.tiny_pipelines import BUILDERS, Counter, build, call, denoiser, inner

STEPS = 6
ALL = sorted(BUILDERS)
SKIP_ALWAYS = FirstBlock(threshold=1e9, max_skips=2)


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


@pytest.mark.parametrize("name", ALL)
def test_nothing_skipped_is_bit_identical(name):
    pipe = build(name)
    plain = run(pipe)
    for policy in (FirstBlock(threshold=0), Interval(every=1)):
        with fewstep.patch(pipe, cache=policy) as patch:
            assert torch.equal(run(pipe), plain)
            numbers = patch.report()["cache"]
        assert numbers["skipped"] == 0
        assert numbers["full"] >= STEPS


@pytest.mark.parametrize("name", ALL)
def test_interval_skips_every_other_step(name):
    pipe = build(name)
    plain = run(pipe)
    with Counter(*inner(pipe)) as unpatched:
        run(pipe)
    with fewstep.patch(pipe, cache="interval") as patch:
        with Counter(*inner(pipe)) as counter:
            image = run(pipe)
        for decisions in patch.report()["cache"]["branches"].values():
            if len(decisions) == STEPS:  # PNDM evaluates its second step twice
                assert decisions == ["full", "skip", "full", "skip", "full", "full"]
        numbers = patch.report()["cache"]
    evaluations = numbers["full"] + numbers["skipped"]
    per_call = unpatched.counts[0] // evaluations
    assert counter.counts == [per_call * evaluations, per_call * numbers["full"]]
    assert image.isfinite().all()
    assert not torch.equal(image, plain)


@pytest.mark.parametrize("name", ALL)
def test_first_block_skips_when_little_changes(name):
    pipe = build(name)
    with fewstep.patch(pipe, cache=SKIP_ALWAYS) as patch:
        run(pipe)
        numbers = patch.report()["cache"]
    for decisions in numbers["branches"].values():
        if len(decisions) == STEPS:
            assert decisions == ["full", "skip", "skip", "full", "skip", "full"]
    assert numbers["why_full"]["max_skips reached"] >= 1


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("policy", [SKIP_ALWAYS, Interval()], ids=["first-block", "interval"])
def test_images_do_not_depend_on_earlier_ones(name, policy):
    pipe = build(name)
    with fewstep.patch(pipe, cache=policy):
        fresh = run(pipe)
        run(pipe, seed=1)
        call(pipe, num_inference_steps=3, seed=2)
        assert torch.equal(run(pipe), fresh)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ALL)
def test_an_exception_leaves_no_state(name):
    pipe = build(name)

    def stop(pipe, step, timestep, tensors):
        if step == 3:
            raise Stop
        return {}

    with fewstep.patch(pipe, cache=SKIP_ALWAYS) as patch:
        fresh = run(pipe)
        # between two calls of the denoiser ...
        if "callback_on_step_end" in type(pipe).__call__.__code__.co_varnames:
            with pytest.raises(Stop):
                run(pipe, callback_on_step_end=stop)
            assert torch.equal(run(pipe), fresh)
        # ... and in the middle of one, in a block that every step runs
        seen = 0

        def fail(*_):
            nonlocal seen
            seen += 1
            if seen == 3:
                raise Stop

        handle = inner(pipe)[0].register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            run(pipe)
        handle.remove()
        assert torch.equal(run(pipe), fresh)
        assert patch.report()["cache"]["skipped"] > 0


@pytest.mark.parametrize(
    ("name", "branches"), [("flux", {"cond", "uncond"}), ("digits", {"call 0", "call 1"})]
)
def test_guided_and_unguided_pass_have_their_own_state(name, branches):
    pipe = build(name)
    with fewstep.patch(pipe, cache="interval") as patch:
        run(pipe)
        assert set(patch.report()["cache"]["branches"]) == branches


def test_dropping_guidance_in_mid_run_keeps_the_branches_apart():
    pipe = build("digits")
    seen = []

    def drop(pipe, step, timestep, tensors):
        if step == 2:
            pipe._guidance_scale = 1.0
        return {}

    with fewstep.patch(pipe, cache=SKIP_ALWAYS) as patch:
        run(pipe, callback_on_step_end=drop)
        seen = patch.report()["cache"]["branches"]
    assert len(seen["call 0"]) == STEPS
    assert len(seen["call 1"]) == 3


@pytest.mark.parametrize("name", ["digits", "sd3", "sd-unet"])
def test_batch_mates_do_not_change_a_sample(name):
    """Where the decisions agree, a sample differs by the rounding of batched products only."""
    pipe = build(name)
    model = denoiser(pipe)
    shape = (2, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    with fewstep.patch(pipe, cache="interval"):
        both = run(pipe, latents=latents, batch=2)
        alone = run(pipe, latents=latents[:1], batch=1)
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-3)


def test_skip_layer_guidance_runs_uncached():
    pipe = build("sd3")
    options = {
        "skip_guidance_layers": [1],
        "skip_layer_guidance_start": 0.0,
        "skip_layer_guidance_stop": 1.0,
    }
    plain = run(pipe, **options)
    with fewstep.patch(pipe, cache=FirstBlock(threshold=0)) as patch:
        assert torch.equal(run(pipe, **options), plain)
        assert patch.report()["cache"]["full"] == STEPS


def test_a_unet_with_controlnet_residuals_can_skip():
    unet = build("sd-unet").unet
    pipe = build("sd-unet")
    pipe.unet.load_state_dict(unet.state_dict())
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16)
    shapes = [(4, 8, 8), (4, 8, 8), (4, 4, 4), (8, 4, 4), (8, 2, 2), (8, 2, 2)]
    extra = {
        "down_block_additional_residuals": tuple(torch.randn(1, *shape) for shape in shapes),
        "mid_block_additional_residual": torch.randn(1, 8, 2, 2),
    }
    with torch.no_grad(), fewstep.patch(pipe, cache=Interval(every=2)) as patch:
        pipe.scheduler.set_timesteps(5)
        outputs = [
            pipe.unet(x, t, encoder_hidden_states=text, **extra).sample for t in (900, 700, 500)
        ]
        decisions = patch.report()["cache"]["branches"]["call 0"]
    assert decisions == ["full", "skip", "full"]
    assert all(output.isfinite().all() for output in outputs)


def test_gradients_switch_the_cache_off():
    pipe = build("digits")
    model = pipe.transformer
    with fewstep.patch(pipe, cache=SKIP_ALWAYS) as patch:
        for time in (16.0, 8.0, 4.0):
            out = model(torch.randn(1, 1, 16, 16), torch.tensor([time]), torch.tensor([3])).sample
            out.sum().backward()
        assert patch.report()["cache"]["why_full"] == {"gradients wanted": 3}
    assert all(p.grad is not None for p in model.transformer_blocks.parameters())


def test_a_cached_model_shared_with_another_pipeline_is_refused():
    pipe = build("digits")
    other = type(pipe)(pipe.transformer, pipe.scheduler)
    with fewstep.patch(pipe, cache="interval"), pytest.raises(PatchError, match="another pipeline"):
        fewstep.patch(other, cache="interval")


def test_diffusers_own_cache_is_refused():
    from diffusers import FirstBlockCacheConfig

    pipe = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PatchError, match="disable_cache"):
        fewstep.patch(pipe, cache="interval")


@pytest.mark.parametrize("policy", [SKIP_ALWAYS, Interval()], ids=["first-block", "interval"])
@pytest.mark.parametrize("whole", [True, False], ids=["model", "blocks"])
def test_compiled_once_and_equal(policy, whole):
    """torch.compile sees the blocks and never the decisions: no compilation after one image."""
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    pipe, compiler = build("digits"), CompileCounter()
    with fewstep.patch(pipe, cache=policy):
        eager = run(pipe)
        if whole:
            pipe.transformer = torch.compile(pipe.transformer, backend=compiler)
        else:
            for block in pipe.transformer.transformer_blocks:
                block.compile(backend=compiler)
        assert torch.equal(run(pipe), eager)
        compiled = compiler.frame_count
        assert torch.equal(run(pipe), eager)
        assert compiler.frame_count == compiled > 0
    torch.compiler.reset()


def test_hooks_of_accelerate_and_diffusers():
    from accelerate.hooks import ModelHook as AccelerateHook
    from accelerate.hooks import add_hook_to_module, remove_hook_from_module
    from diffusers.hooks import HookRegistry, ModelHook

    pipe = build("flux")
    plain, model = run(pipe), pipe.transformer
    add_hook_to_module(model, AccelerateHook())
    below = model.__dict__["forward"]
    with fewstep.patch(pipe, cache="interval") as patch:
        cached = run(pipe)
        assert patch.report()["cache"]["skipped"] == 4
    assert model.__dict__["forward"] is below
    remove_hook_from_module(model)

    patch = fewstep.patch(pipe, cache="interval")
    add_hook_to_module(model, AccelerateHook())
    HookRegistry.check_if_exists_or_initialize(model).register_hook(ModelHook(), "theirs")
    assert torch.equal(run(pipe), cached)
    patch.undo()  # from below the others' hooks, which stay
    assert torch.equal(run(pipe), plain)
    registry = HookRegistry.check_if_exists_or_initialize(model)
    assert set(registry.hooks) == {"theirs"}
    assert hasattr(model, "_hf_hook")
    registry.remove_hook("theirs")
    remove_hook_from_module(model)
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["flux", "sd-unet", "digits"])
def test_a_deep_copy_runs_its_own_weights_with_its_own_state(name):
    pipe = build(name)
    patch = fewstep.patch(pipe, cache="interval")
    cached = run(pipe)
    twin = copy.deepcopy(pipe)
    assert active_patches(twin) == []
    assert torch.equal(run(twin), cached)
    with Counter(*inner(pipe)) as mine, Counter(*inner(twin)) as theirs:
        run(twin)
    assert mine.counts == [0, 0]
    assert theirs.counts[0] > theirs.counts[1] > 0
    with pytest.raises(PatchError, match="a deep copy of such a one"):
        fewstep.patch(twin, cache="interval")
    patch.undo()
    assert torch.equal(run(twin), cached)
    with torch.no_grad():
        for parameter in denoiser(twin).parameters():
            parameter.zero_()
    plain = run(pipe)
    assert not torch.equal(run(twin), plain)
    assert not torch.equal(cached, plain)


def test_a_deep_copy_of_the_model_alone_stays_cached():
    pipe = build("digits")
    with fewstep.patch(pipe, cache="interval"):
        cached = run(pipe)
        twin = copy.deepcopy(pipe.transformer)
    pipe.transformer = twin
    assert torch.equal(run(pipe), cached)
    assert copy.deepcopy(twin.transformer_blocks[1]).forward.below.__self__ is not twin


@pytest.mark.parametrize("policy", [SKIP_ALWAYS, Interval()], ids=["first-block", "interval"])
def test_another_pipeline_with_the_same_components(policy):
    """With the same scheduler it is cached; with its own it runs in full, also after a break."""
    pipe = build("digits")
    plain = run(pipe)
    shared = type(pipe)(**pipe.components)
    own = type(pipe)(pipe.transformer, type(pipe.scheduler).from_config(pipe.scheduler.config))
    for other in (shared, own):
        other.set_progress_bar_config(disable=True)
    wanted = {"guidance_scale": 2.0}

    def stop(pipe, step, timestep, tensors):
        if step == 2:
            raise Stop
        return {}

    with fewstep.patch(pipe, cache=policy):
        cached = run(pipe, **wanted)
        assert not torch.equal(cached, plain)
        assert torch.equal(run(shared, **wanted), cached)
        assert torch.equal(run(own, **wanted), plain)
        with pytest.raises(Stop):
            run(pipe, callback_on_step_end=stop)
        assert torch.equal(run(own, **wanted), plain)
        assert torch.equal(run(pipe, **wanted), cached)
