"""Adapters that come, go and change strength under a cache."""

import pytest
import torch

import fewstep
from fewstep.caching import Fingerprint, FirstBlock, Fora, Plan
from patching.tiny_pipelines import build, call

peft = pytest.importorskip("peft")

STEPS = 6
CACHES = {
    "first-block": FirstBlock(threshold=1e9, max_skips=1),
    "output": Fora(every=2),
    "module": Fora(every=2, scope="module"),
}


def add(pipe, name="one", seed=1):
    torch.manual_seed(seed)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, adapter_name=name)


def run(pipe, **options):
    return call(pipe, num_inference_steps=STEPS, **options)


@pytest.mark.parametrize("cache", CACHES)
def test_loaded_and_unloaded_between_runs(cache):
    pipe, with_adapter = build("flux"), build("flux")
    add(with_adapter)
    policy = CACHES[cache]
    with fewstep.patch(pipe, cache=policy):
        without = run(pipe)
    with fewstep.patch(with_adapter, cache=policy):
        want = run(with_adapter)
    patch = fewstep.patch(pipe, cache=policy)
    assert torch.equal(run(pipe), without)
    add(pipe)
    assert torch.equal(run(pipe), want)
    pipe.transformer.disable_adapters()
    assert torch.equal(run(pipe), without)
    pipe.transformer.enable_adapters()
    assert torch.equal(run(pipe), want)
    pipe.transformer.delete_adapters("one")
    assert torch.equal(run(pipe), without)
    patch.undo()
    assert torch.equal(run(pipe), run(build("flux")))


@pytest.mark.parametrize("cache", CACHES)
def test_in_the_middle_of_a_run(cache):
    """What was kept goes on to be used; the next run is as if nothing had been."""
    pipe = build("flux")

    def switch(pipe, step, time, tensors):
        if step == 2:
            add(pipe)
        if step == 3:
            pipe.transformer.delete_adapters("one")
        return {}

    with fewstep.patch(pipe, cache=CACHES[cache]) as patch:
        want = run(pipe)
        assert run(pipe, callback_on_step_end=switch).isfinite().all()
        assert patch.report()["cache"]["skipped"] > 0
        assert torch.equal(run(pipe), want)


def test_a_plan_is_for_its_adapters():
    """Without those that it was calibrated with it runs in full and says why."""
    pipe = build("flux")
    add(pipe)
    pipe.transformer.set_adapters(["one"])
    plain = run(pipe)
    mark = Fingerprint.of(pipe.transformer, pipe.scheduler)
    times = tuple(float(t) for t in pipe.scheduler.timesteps)
    forecasts = (None, None, (1.0,), None, (1.0,), None)
    patch = fewstep.patch(pipe, cache=Plan(times, forecasts, fingerprint=mark))

    def numbers():
        image = run(pipe)
        return image, patch.report()["cache"]

    cached, seen = numbers()
    assert seen["skipped"] == 4
    assert not torch.equal(cached, plain)
    add(pipe, "two", seed=2)
    pipe.transformer.set_adapters(["one", "two"])
    _, seen = numbers()
    assert seen["skipped"] == 0
    assert set(seen["why_full"]) == {"other adapters"}
    pipe.transformer.delete_adapters("two")
    pipe.transformer.set_adapters(["one"])
    again, seen = numbers()
    assert seen["skipped"] == 4
    assert torch.equal(again, cached)
    pipe.transformer.set_adapters(["one"], [0.5])
    assert set(numbers()[1]["why_full"]) == {"other adapters"}
    pipe.transformer.set_adapters(["one"])
    pipe.transformer.disable_adapters()
    assert set(numbers()[1]["why_full"]) == {"other adapters"}
