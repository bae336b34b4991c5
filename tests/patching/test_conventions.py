"""The checks of diffusers' CacheTesterMixin (tests/models/testing_utils/cache.py), by its names, on
caches of this package; and what the mixin leaves out: outputs, batches, steps of a scheduler.

enable_disable_state, double_enable_raises_error, hooks_registered, inference, context_manager,
reset_stateful_cache.
"""

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import HookRegistry, ModelHook, apply_first_block_cache

import fewstep
from fewstep.caching import EasyCache, FirstBlock, Fora, Interval, TeaCache
from fewstep.patching import PatchError
from patching.tiny_models import FAMILIES, OTHERS, inputs, model
from patching.tiny_pipelines import build, call

NAME = "fewstep_cache"
POLICIES = {
    "first-block": FirstBlock(threshold=1e9),
    "interval": Interval(every=3),
    "teacache": TeaCache(threshold=1e9),
}
WHOLE = EasyCache(threshold=1e9, warmup=1)  # for models whose blocks are not known
WITH_MIXIN = {"flux": POLICIES["first-block"], "wan": WHOLE, "qwen": WHOLE}  # diffusers' CacheMixin


def hooks(denoiser):
    registries = [m._diffusers_hook for m in denoiser.modules() if hasattr(m, "_diffusers_hook")]
    return [registry.get_hook(NAME) for registry in registries if registry.get_hook(NAME)]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def moved(given):
    generator = torch.Generator().manual_seed(7)
    latents = given["hidden_states"]
    noise = torch.randn(latents.shape, generator=generator)
    return {**given, "hidden_states": latents + noise}


def output(denoiser, given):
    return denoiser(**given, return_dict=False)[0]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_enable_disable_state(name):
    denoiser = model(name)
    before = {id(m): dict(m.__dict__) for m in denoiser.modules()}
    fewstep.apply_cache(denoiser, "first-block" if name in FAMILIES else WHOLE)
    if name in WITH_MIXIN:
        assert denoiser.is_cache_enabled
        denoiser.disable_cache()
        assert not denoiser.is_cache_enabled
    else:
        assert fewstep.remove_cache(denoiser)
    assert not fewstep.remove_cache(denoiser)
    assert {id(m): dict(m.__dict__) for m in denoiser.modules()} == before


def test_double_enable_raises_error():
    denoiser = model("flux")
    theirs = FirstBlockCacheConfig(threshold=0.1)
    patch = fewstep.apply_cache(denoiser, "interval")
    with pytest.raises(ValueError, match="Caching has already been enabled"):
        denoiser.enable_cache(theirs)
    with pytest.raises(PatchError, match="without a cache"):
        fewstep.apply_cache(denoiser, "interval")
    patch.undo()

    denoiser.enable_cache(theirs)
    with pytest.raises(PatchError, match="disable_cache"):
        fewstep.apply_cache(denoiser, "interval")
    denoiser.disable_cache()

    apply_first_block_cache(denoiser, theirs)  # leaves no config behind
    with pytest.raises(PatchError, match="fbc_leader_block_hook"):
        fewstep.apply_cache(denoiser, "interval")


def test_theirs_applied_over_ours_is_found_when_a_run_starts():
    denoiser = model("flux")
    fewstep.apply_cache(denoiser, "interval")
    apply_first_block_cache(denoiser, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(PatchError, match="fbc_leader_block_hook"):
        output(denoiser, inputs("flux"))


@pytest.mark.parametrize("name", FAMILIES)
def test_hooks_registered(name):
    denoiser = model(name)
    given = inputs(name)
    plain = output(denoiser, given)
    patch = fewstep.apply_cache(denoiser, "interval")
    assert len(hooks(denoiser)) > 1
    assert all(isinstance(hook, ModelHook) for hook in hooks(denoiser))
    HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook(NAME)
    assert hooks(denoiser) == []
    assert not any("forward" in m.__dict__ for m in denoiser.modules())
    assert torch.equal(output(denoiser, given), plain)
    assert patch.features == ()
    assert "taken off since" in patch.explain()
    patch.undo()
    assert not any("_diffusers_hook" in m.__dict__ for m in denoiser.modules())
    fewstep.apply_cache(denoiser, "interval").undo()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_inference(name, policy):
    denoiser, given = model(name), inputs(name)
    fewstep.apply_cache(denoiser, POLICIES[policy])
    first = output(denoiser, given)
    second = output(denoiser, moved(given))
    assert second.isfinite().all()
    fewstep.remove_cache(denoiser)
    assert torch.equal(output(denoiser, given), first)
    assert not torch.allclose(output(denoiser, moved(given)), second, atol=1e-5)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_inference_on_a_schedule(name):
    """Caches of the whole output serve models of no known family."""
    denoiser, given = model(name), inputs(name)
    scheduler = FlowMatchEulerDiscreteScheduler()
    patch = fewstep.apply_cache(denoiser, Fora(every=3), scheduler=scheduler)
    for _ in range(2):
        scheduler.set_timesteps(6)
        outputs = []
        for time in scheduler.timesteps:
            step = {**given, "timestep": time.expand(1), "hidden_states": given["hidden_states"]}
            outputs.append(output(denoiser, step))
            scheduler.step(torch.zeros(1), time, torch.zeros(1))
        assert patch.report()["cache"]["skipped"] == 4
        for step in (1, 2, 4, 5):
            assert torch.equal(outputs[step], outputs[step - step % 3])
        assert not torch.equal(outputs[3], outputs[0])


@pytest.mark.parametrize("name", WITH_MIXIN)
def test_context_manager(name):
    denoiser, given = model(name), inputs(name)
    patch = fewstep.apply_cache(denoiser, WITH_MIXIN[name])
    with denoiser.cache_context("context_1"):
        one = output(denoiser, given)
    with denoiser.cache_context("context_2"):
        two = output(denoiser, given)
    assert torch.equal(one, two)
    for _ in range(2):
        with denoiser.cache_context("context_1"):
            output(denoiser, moved(given))
    branches = patch.report()["cache"]["branches"]
    assert branches["context_1"][-1] == "skip"
    assert branches["context_2"] == ["full"]
    denoiser.disable_cache()


@pytest.mark.parametrize("name", WITH_MIXIN)
def test_reset_stateful_cache(name):
    denoiser, given = model(name), inputs(name)
    patch = fewstep.apply_cache(denoiser, WITH_MIXIN[name])
    session = hooks(denoiser)[0].session
    output(denoiser, given)
    assert any(branch.kept for branch in session._branches.values())
    denoiser._reset_stateful_cache()
    assert not any(branch.kept for branch in session._branches.values())
    assert patch.report()["cache"]["full"] == 1
    assert torch.equal(output(denoiser, given), output(model(name), given))
    numbers = patch.report()["cache"]
    assert (numbers["full"], numbers["skipped"]) == (1, 0)
    denoiser.disable_cache()


def test_a_pipelines_own_reset_keeps_the_report_and_frees_the_tensors():
    pipe = build("flux")
    with fewstep.patch(pipe, cache="interval") as patch:
        call(pipe, num_inference_steps=6)
        assert patch.report()["cache"]["skipped"] == 4
        session = hooks(pipe.transformer)[0].session
        assert not any(branch.kept for branch in session._branches.values())


def test_disable_cache_on_a_patched_pipeline():
    pipe = build("flux")
    plain = call(pipe, num_inference_steps=4)
    patch = fewstep.patch(pipe, steps=4, cache="interval")
    call(pipe)
    pipe.transformer.disable_cache()
    assert patch.features == ("steps",)
    assert torch.equal(call(pipe), plain)
    again = fewstep.patch(pipe, cache="interval")
    assert not torch.equal(call(pipe), plain)
    again.undo()
    patch.undo()
    assert torch.equal(call(pipe, num_inference_steps=4), plain)


def test_hooks_of_others_below_and_above_come_and_go():
    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return (2 * output[0], *output[1:])

    denoiser, given = model("flux"), inputs("flux")
    plain = output(denoiser, given)
    registry = HookRegistry.check_if_exists_or_initialize(denoiser)
    registry.register_hook(Doubled(), "below")
    patch = fewstep.apply_cache(denoiser, FirstBlock(threshold=0))
    registry.register_hook(Doubled(), "above")
    assert torch.equal(output(denoiser, given), 4 * plain)
    registry.remove_hook("below")
    assert torch.equal(output(denoiser, given), 2 * plain)
    assert registry._hook_order == ["above", NAME]  # a run has started in between
    patch.undo()
    assert torch.equal(output(denoiser, given), 2 * plain)
    registry.remove_hook("above")
    assert torch.equal(output(denoiser, given), plain)


def test_what_a_bare_model_can_not_have():
    denoiser = model("flux")
    with pytest.raises(ValueError, match=r"scheduler: expected the one that steps"):
        fewstep.apply_cache(denoiser, Fora(every=3))
    with pytest.raises(TypeError, match="pipeline or its denoiser"):
        fewstep.apply_cache("flux", "interval")
    with pytest.raises(ValueError, match="which has its own"):
        fewstep.apply_cache(build("flux"), "interval", FlowMatchEulerDiscreteScheduler())
    assert hooks(denoiser) == []
    assert not denoiser.is_cache_enabled
    for bare in (denoiser, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"expected a model loaded from a folder.*from None"):
            fewstep.apply_cache(bare, "auto")
