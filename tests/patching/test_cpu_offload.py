"""accelerate's hooks, which a pipeline takes off and puts on again after every image, and caches in
either order. Both devices are the CPU.
"""

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

import fewstep
from fewstep.caching import Fora, Interval
from fewstep.patching.hooks import NAME
from patching.tiny_pipelines import Counter, build, call, denoiser, inner

accelerate = pytest.importorskip("accelerate")

STEPS = 6
CACHES = {"blocks": Interval(every=2), "output": Fora(every=2)}


def run(pipe):
    return call(pipe, num_inference_steps=STEPS)


def patched(pipe, cache, first, offload):
    """Return the patch of an offloaded pipeline."""
    if first == "offload":
        offload()
    patch = fewstep.patch(pipe, cache=cache)
    if first == "cache":
        offload()
    return patch


@pytest.mark.parametrize("first", ["cache", "offload"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", ["flux", "sd-unet"])
def test_every_image_is_cached_and_undo_finds_it(name, cache, first):
    pipe = build(name)
    plain = run(pipe)
    with Counter(inner(pipe)[1]) as counter:
        run(pipe)
    every = counter.counts[0]
    with fewstep.patch(pipe, cache=CACHES[cache]):
        want = run(pipe)
    patch = patched(pipe, CACHES[cache], first, lambda: pipe.enable_model_cpu_offload(device="cpu"))
    model = denoiser(pipe)
    for _ in range(3):
        with Counter(inner(pipe)[1]) as counter:
            assert torch.equal(run(pipe), want)
        numbers = patch.report()["cache"]
        assert numbers["skipped"] > 0
        share = numbers["full"] / (numbers["full"] + numbers["skipped"])
        assert counter.counts[0] == every * share
        assert patch.features == ("cache",)
        assert hasattr(model, "_hf_hook")
    patch.undo()
    assert torch.equal(run(pipe), plain)
    assert hasattr(model, "_hf_hook")
    again = fewstep.patch(pipe, cache=CACHES[cache])
    assert torch.equal(run(pipe), want)
    pipe.remove_all_hooks()
    assert torch.equal(run(pipe), want)
    again.undo()
    assert torch.equal(run(pipe), plain)
    assert not any("_old_forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("by", ["disable_cache", "remove_hook"])
@pytest.mark.parametrize("first", ["cache", "offload"])
def test_removed_by_others(first, by):
    pipe = build("flux")
    plain = run(pipe)
    patch = patched(
        pipe, CACHES["blocks"], first, lambda: pipe.enable_model_cpu_offload(device="cpu")
    )
    assert not torch.equal(run(pipe), plain)
    if by == "disable_cache":
        pipe.transformer.disable_cache()
    else:
        pipe.transformer._diffusers_hook.remove_hook(NAME)
    for _ in range(2):
        assert torch.equal(run(pipe), plain)
    assert patch.features == ()
    patch.undo()
    pipe.remove_all_hooks()
    assert not any("_old_forward" in m.__dict__ for m in pipe.transformer.modules())
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("first", ["cache", "offload"])
def test_hooks_on_blocks(first):
    """As of `enable_sequential_cpu_offload` and `device_map`, on every module."""
    pipe = build("flux")
    plain = run(pipe)

    def offload():
        for module in pipe.transformer.modules():
            hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True)
            accelerate.hooks.add_hook_to_module(module, hook)

    with fewstep.patch(pipe, cache=CACHES["blocks"]):
        want = run(pipe)
    patch = patched(pipe, CACHES["blocks"], first, offload)
    for _ in range(2):
        assert torch.equal(run(pipe), want)
    accelerate.hooks.remove_hook_from_module(pipe.transformer, recurse=True)
    assert torch.equal(run(pipe), want)
    offload()
    assert torch.equal(run(pipe), want)
    patch.undo()
    assert torch.equal(run(pipe), plain)


def test_between_hooks_of_diffusers():
    class Doubled(ModelHook):
        def post_forward(self, module, output):
            return (2 * output[0], *output[1:])

    pipe = build("flux")
    model = pipe.transformer
    accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
    patch = fewstep.patch(pipe, cache="interval")
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.register_hook(Doubled(), "theirs")
    cached = run(pipe)
    assert patch.report()["cache"]["skipped"] == 4
    assert torch.equal(run(pipe), cached)
    patch.undo()
    registry.remove_hook("theirs")
    accelerate.hooks.remove_hook_from_module(model)
    assert torch.equal(run(pipe), run(build("flux")))


def test_a_forward_that_was_put_back_is_said():
    pipe = build("flux")
    plain = run(pipe)
    patch = fewstep.patch(pipe, cache="interval")
    del pipe.transformer.__dict__["forward"]
    assert torch.equal(run(pipe), plain)
    assert patch.features == ()
    assert "taken off since" in patch.explain()
    patch.undo()
    assert torch.equal(run(pipe), plain)
