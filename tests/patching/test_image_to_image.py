"""steps=n on image-to-image pipelines: n evaluations whatever the strength, never silently none."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    LCMScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
)

import fewstep
from patching.snapshot import snapshot
from patching.tiny_pipelines import Counter, arguments, build, call, denoiser

CLASSES = {
    "sd-unet": StableDiffusionImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}
NAMES = sorted(CLASSES)


def image_to_image(source, name):
    parts = dict(source.components)
    extra = {"requires_safety_checker": False} if name == "sd-unet" else {}
    pipe = CLASSES[name](**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edit(pipe, source, strength=None, **kwargs):
    given = arguments(source)
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        del given["height"], given["width"]
    given["image"] = torch.linspace(0, 1, 16 * 16 * 3).reshape(1, 3, 16, 16)
    if strength is not None:
        given["strength"] = strength
    generator = torch.Generator().manual_seed(0)
    return pipe(generator=generator, output_type="latent", return_dict=False, **given, **kwargs)[0]


def evaluations(pipe, source, **kwargs):
    per_step = 2 if "Flux" in type(pipe).__name__ else 1
    with Counter(denoiser(pipe)) as counter:
        result = edit(pipe, source, **kwargs)
    assert result.isfinite().all()
    return counter.counts[0] / per_step


@pytest.mark.parametrize("name", NAMES)
def test_n_evaluations_whatever_the_strength(name):
    source = build(name)
    pipe = image_to_image(source, name)
    before = snapshot(pipe)
    fewstep.patch(pipe, steps=4).undo()
    assert snapshot(pipe) == before
    patch = fewstep.patch(pipe, steps=4)
    for strength in (None, 0.5, 0.99, 1.0):
        assert evaluations(pipe, source, strength=strength) == 4
    assert evaluations(pipe, source, strength=0.5, num_inference_steps=7) == 4
    patch.undo()
    assert "get_timesteps" not in pipe.__dict__
    with fewstep.patch(pipe, steps=1):
        assert evaluations(pipe, source, strength=0.5) == 1


def test_the_trajectory_starts_at_the_strength():
    source = build("sd3")
    pipe = image_to_image(source, "sd3")
    with fewstep.patch(pipe, steps=2) as patch:
        edit(pipe, source, strength=0.5)
        uniform = np.array([1, 0.75, 0.5, 0.25])
        shifted = [*(3 * uniform / (1 + 2 * uniform)), 0]
        np.testing.assert_allclose(pipe.scheduler.sigmas, shifted, rtol=1e-5)
        assert pipe.scheduler.begin_index == 2
        assert "the last 2 of 2 / strength steps" in patch.explain()


def test_it_is_what_diffusers_does_with_n_over_strength_steps():
    source = build("sd-unet")
    pipe = image_to_image(source, "sd-unet")
    with fewstep.patch(pipe, steps=3):
        patched = edit(pipe, source, strength=0.5)
        plain = image_to_image(source, "sd-unet")
        plain.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert torch.equal(edit(plain, source, strength=0.5, num_inference_steps=6), patched)


@pytest.mark.parametrize("name", NAMES)
def test_from_the_components_of_a_patched_pipeline(name):
    """Its own count rules there: an error that says what to do, and n steps once that is done."""
    source = build(name)
    with fewstep.patch(source, steps=4):
        pipe = image_to_image(source, name)
        with pytest.raises(ValueError, match=r"steps=4: call fewstep\.patch\(pipe"):
            edit(pipe, source, strength=0.5)
        assert call(source).isfinite().all()
        with fewstep.patch(pipe, steps=3):
            assert evaluations(pipe, source, strength=0.5) == 3
        with Counter(denoiser(source)) as counter:
            call(source)
        assert counter.counts[0] in (4, 8)


def test_a_callers_own_grid_is_sliced_as_in_diffusers():
    source = build("sd3")
    pipe = image_to_image(source, "sd3")
    with fewstep.patch(pipe, steps=4):
        assert evaluations(pipe, source, strength=0.5, sigmas=[1.0, 0.8, 0.5, 0.2]) == 2


def test_a_student_of_fifty_steps():
    source = build("sd-unet")
    pipe = image_to_image(source, "sd-unet")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    with fewstep.patch(pipe, steps=4):
        assert evaluations(pipe, source, strength=0.5) == 4
        message = (
            r"strength: expected one from which LCMScheduler can take 4 of 80 steps, got 0\.05"
        )
        with pytest.raises(ValueError, match=message):
            edit(pipe, source, strength=0.05)


def test_a_strength_that_leaves_too_little():
    source = build("sd-unet")
    pipe = image_to_image(source, "sd-unet")
    message = r"strength: expected at least 0\.004 for steps=4, got 0\.001"
    with fewstep.patch(pipe, steps=4), pytest.raises(ValueError, match=message):
        edit(pipe, source, strength=0.001)


def test_a_deep_copy_has_its_own_count():
    source = build("sd3")
    pipe = image_to_image(source, "sd3")
    patch = fewstep.patch(pipe, steps=2)
    twin = copy.deepcopy(pipe)
    patch.undo()
    assert evaluations(twin, source, strength=0.5) == 2
    assert twin.scheduler is not pipe.scheduler
