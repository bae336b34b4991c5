"""Copies of cached models: pickled, saved with torch.save, sent to another process."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import fewstep
from fewstep.caching import FirstBlock, Interval, Taylor
from fewstep.patching import active_patches
from patching.tiny_pipelines import build, call, denoiser

SKIP_ALWAYS = FirstBlock(threshold=1e9, max_skips=2)
CACHES = {"first-block": SKIP_ALWAYS, "interval": Interval(), "taylor": Taylor(every=3)}


def run(pipe):
    return call(pipe, num_inference_steps=6)


def pickled(value):
    return pickle.loads(pickle.dumps(value))


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def sent(value):
    """As multiprocessing sends it to a process that it spawns."""
    return pickle.loads(ForkingPickler.dumps(value))


@pytest.mark.parametrize(
    ("name", "cache", "copied"),
    [
        ("flux", "first-block", pickled),
        ("flux", "taylor", sent),
        ("sd-unet", "interval", saved),
        ("digits", "interval", sent),
        ("digits", "taylor", saved),
    ],
)
def test_a_pickled_pipeline_stays_cached_and_can_be_rid_of_it(name, cache, copied):
    pipe = build(name)
    plain = run(pipe)
    with fewstep.patch(pipe, cache=CACHES[cache]) as patch:
        cached = run(pipe)
        assert not torch.equal(cached, plain)
        twin = copied(pipe)
        assert torch.equal(run(pipe), cached)
        assert patch.report()["cache"]["skipped"]
    assert active_patches(twin) == []
    assert torch.equal(run(twin), cached)
    assert fewstep.remove_cache(twin)
    assert torch.equal(run(twin), plain)
    for module in denoiser(twin).modules():
        assert "forward" not in module.__dict__
    with fewstep.patch(twin, cache=CACHES[cache]):
        assert torch.equal(run(twin), cached)


@pytest.mark.parametrize("name", ["flux", "sd-unet"])
def test_a_pickled_model_holds_no_pipeline_and_no_features(name):
    pipe = build(name)
    model = denoiser(pipe)
    alone = len(pickle.dumps(model))
    with fewstep.patch(pipe, cache=SKIP_ALWAYS):
        call(pipe, num_inference_steps=6, batch=4)
        assert len(pickle.dumps(model)) < alone + 60_000  # the scheduler and the wrappers
        # Another order: a block first, from which the model is reached.
        block = next(m for m in model.modules() if type(m).__name__.endswith("Block"))
        pickled(block)
        pickled([m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__])


def test_a_deep_copy_can_be_rid_of_its_cache():
    pipe = build("flux")
    plain = run(pipe)
    patch = fewstep.patch(pipe, cache="interval")
    cached = run(pipe)
    twin = copy.deepcopy(pipe)
    twin.transformer.disable_cache()
    assert torch.equal(run(twin), plain)
    assert torch.equal(run(pipe), cached)
    patch.undo()
    assert torch.equal(run(pipe), plain)
