"""The handle: what it says, and that features work together."""

import pytest
import torch
from diffusers import DiffusionPipeline

import fewstep
from fewstep.patching import Patch, active_patches
from patching.tiny_pipelines import BUILDERS, Counter, build, call, denoiser


def test_repr_and_explain_say_what_was_done():
    pipe = build("flux")
    patch = fewstep.patch(pipe, steps=4, cache="first-block")
    assert repr(patch) == (
        "<Patch on FluxPipeline, active: steps: 4 steps, FlowMatchEulerDiscreteScheduler; cache: "
        "FirstBlock(threshold=0.08, max_skips=3, warmup=1, first=1, last=0)>"
    )
    text = patch.explain()
    for expected in (
        "fewstep patch on FluxPipeline (active)",
        "recognised: FLUX: FluxTransformer2DModel in `transformer`",
        "`num_inference_steps` of a call has no effect",
        "a skipped step leaves out blocks 1 to 3 of 4",
        "left alone: quantize, time, text, guidance: not asked for",
        "left alone: vae: not part of the denoising loop",
    ):
        assert expected in text
    assert all(len(line) < 160 for line in text.splitlines())
    patch.undo()
    assert "undone" in repr(patch)
    assert "(undone)" in patch.explain()


def test_explain_shows_what_the_last_image_did():
    pipe = build("digits")
    with fewstep.patch(pipe, cache="interval") as patch:
        assert patch.report() == {
            "cache": {
                "full": 0,
                "skipped": 0,
                "blended": 0,
                "branches": {},
                "why": {},
                "why_full": {},
            }
        }
        call(pipe)
        text = patch.explain()
    assert "seen: call 0: F-F-FF (2 of 6 steps skipped)" in text
    assert "in full because of: first step 2, interval 4, last step 2" in text


def test_nothing_is_printed(capsys):
    pipe = build("digits")
    with fewstep.patch(pipe, steps=2, cache="interval") as patch:
        call(pipe)
        patch.explain()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_separate_patches_equal_one(name):
    pipe = build(name)
    with fewstep.patch(pipe, steps=6, cache="interval"):
        together = call(pipe)
    cache = fewstep.patch(pipe, cache="interval")
    steps = fewstep.patch(pipe, steps=6)
    assert active_patches(pipe) == [cache, steps]
    assert torch.equal(call(pipe), together)
    assert cache.report()["cache"]["skipped"] > 0
    cache.undo()
    steps.undo()
    assert active_patches(pipe) == []


def test_guidance_off_halves_the_evaluations():
    pipe = build("digits")
    without = call(pipe, guidance_scale=1.0)
    with fewstep.patch(pipe, guidance="off", steps=6), Counter(denoiser(pipe)) as counter:
        assert torch.equal(call(pipe), without)
        assert counter.counts == [6]
        call(pipe, guidance_scale=2.0)
        assert counter.counts == [18]
    with fewstep.patch(pipe, guidance=3):
        stronger = call(pipe)
    assert torch.equal(call(pipe, guidance_scale=3.0), stronger)


def test_the_handle_is_exported():
    assert isinstance(fewstep.patch(build("digits"), steps=1), Patch)
    assert fewstep.Patch is Patch


def test_explain_says_that_a_cache_can_not_act_at_two_steps():
    pipe = build("digits")
    cache = fewstep.patch(pipe, cache="interval")
    assert "never act" not in cache.explain()
    for steps, said in ((1, True), (2, True), (3, False)):
        with fewstep.patch(pipe, steps=steps):
            assert ("never act" in cache.explain()) == said
            call(pipe)
            assert cache.report()["cache"]["skipped"] == 0 or not said
    assert "never act" not in cache.explain()


class Wider(DiffusionPipeline):
    """With the components that other pipelines have."""

    def __init__(self, transformer, scheduler, transformer_2, controlnet, vae):
        super().__init__()
        self.register_modules(
            transformer=transformer,
            scheduler=scheduler,
            transformer_2=transformer_2,
            controlnet=controlnet,
            vae=vae,
        )


def test_explain_claims_only_what_is_known():
    source, extra = build("digits"), torch.nn.Identity()
    pipe = Wider(source.transformer, source.scheduler, None, extra, extra)
    with fewstep.patch(pipe, cache="interval") as patch:
        text = patch.explain()
    assert "left alone: vae: not part of the denoising loop" in text
    assert "left alone: controlnet: not recognised, left as it is" in text


def test_a_second_denoiser_is_not_left_out_silently():
    source = build("digits")
    pipe = Wider(source.transformer, source.scheduler, build("digits").transformer, None, None)
    both = "one denoiser, got one with `transformer`, `transformer_2`"
    for feature, way_out in (
        ({"cache": "interval"}, 'scope="output"'),
        ({"quantize": "w8a8"}, "can have steps only"),
    ):
        with pytest.raises(ValueError, match=f"{both}.*{way_out}"):
            fewstep.patch(pipe, **feature)
    with fewstep.patch(pipe, steps=2) as patch:
        assert "transformer_2: not recognised" in patch.explain()
