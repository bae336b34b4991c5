"""Group offloading and caches in either order: equal results, and what is skipped isn't uploaded.

Both devices are the CPU, so that an upload is told by the call of its group alone.
"""

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup

import fewstep
from fewstep.caching import Fora, Interval
from patching.tiny_pipelines import build, call, denoiser

STEPS = 6
CACHES = {
    "blocks": Interval(every=2, first=1, last=1),
    "output": Fora(every=2),
    "module": Fora(every=2, scope="module"),
}


@pytest.fixture
def uploads(monkeypatch):
    """Count uploads by the first module of a group."""
    counts = {}
    upload = ModuleGroup.onload_

    def counted(group):
        key = group.modules[0] if group.modules else group.offload_leader
        counts[key] = counts.get(key, 0) + 1
        return upload(group)

    monkeypatch.setattr(ModuleGroup, "onload_", counted)
    return counts


def offload(pipe, **options):
    settings = {"offload_type": "block_level", "num_blocks_per_group": 1, **options}
    denoiser(pipe).enable_group_offload(onload_device=torch.device("cpu"), **settings)


def run(pipe):
    return call(pipe, num_inference_steps=STEPS)


@pytest.mark.parametrize("first", ["cache", "offload"])
@pytest.mark.parametrize("cache", ["blocks", "output"])
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_what_is_skipped_is_not_uploaded(name, cache, first, uploads):
    pipe = build(name)
    plain = run(pipe)
    with fewstep.patch(pipe, cache=CACHES[cache]):
        want = run(pipe)
    if first == "offload":
        offload(pipe)
    patch = fewstep.patch(pipe, cache=CACHES[cache])
    if first == "cache":
        offload(pipe)
        run(pipe)  # the order is looked after as a run starts, of the denoiser's own from then on
    uploads.clear()
    assert torch.equal(run(pipe), want)
    numbers = patch.report()["cache"]
    every, full = numbers["full"] + numbers["skipped"], numbers["full"]
    blocks = list(denoiser(pipe).transformer_blocks)
    if cache == "blocks":
        assert uploads[blocks[0]] == every
        assert uploads[blocks[1]] == full < every
        last = [*blocks, *getattr(denoiser(pipe), "single_transformer_blocks", [])][-1]
        assert uploads[last] == every
    else:
        assert set(uploads.values()) == {full}
    patch.undo()
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("first", ["cache", "offload"])
def test_blocks_that_are_uploaded_together(first, uploads):
    """Of four blocks in two groups, the middle two are skipped: each shares its upload."""
    pipe = build("sd3")
    with fewstep.patch(pipe, cache=CACHES["blocks"]):
        want = run(pipe)
    if first == "offload":
        offload(pipe, num_blocks_per_group=2)
    with fewstep.patch(pipe, cache=CACHES["blocks"]) as patch:
        if first == "cache":
            offload(pipe, num_blocks_per_group=2)
        assert torch.equal(run(pipe), want)
        numbers = patch.report()["cache"]
        every = numbers["full"] + numbers["skipped"]
        blocks = denoiser(pipe).transformer_blocks
        assert uploads[blocks[0]] == uploads[blocks[2]] == every


@pytest.mark.parametrize("first", ["cache", "offload"])
@pytest.mark.parametrize("cache", ["blocks", "module"])
def test_leaves_that_are_uploaded_one_by_one(cache, first, uploads):
    pipe = build("flux")
    with fewstep.patch(pipe, cache=CACHES[cache]):
        want = run(pipe)
    if first == "offload":
        offload(pipe, offload_type="leaf_level")
    with fewstep.patch(pipe, cache=CACHES[cache]) as patch:
        if first == "cache":
            offload(pipe, offload_type="leaf_level")
        uploads.clear()
        assert torch.equal(run(pipe), want)
        numbers = patch.report()["cache"]
        blocks = denoiser(pipe).transformer_blocks
        assert uploads[blocks[1].attn.to_q] == numbers["full"]
        assert uploads[denoiser(pipe).proj_out] == numbers["full"] + numbers["skipped"]


def test_a_unet(uploads):
    pipe = build("sd-unet")
    with fewstep.patch(pipe, cache="interval"):
        want = run(pipe)
    patch = fewstep.patch(pipe, cache="interval")
    offload(pipe)
    assert torch.equal(run(pipe), want)
    numbers = patch.report()["cache"]
    unet = pipe.unet
    assert uploads[unet.down_blocks[0]] == numbers["full"] + numbers["skipped"]
    assert uploads[unet.down_blocks[1]] == numbers["full"]
