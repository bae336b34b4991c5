"""Patches on the trained digits models: what they cost in quality, against fewer steps.

PSNR against the unpatched image of the same seed; measured at 24 steps on 4 labels: interval 43.5,
first-block 43, w8a8 56, half the steps 40 (dB).
"""

import torch

import fewstep
from fewstep.assets.digits import load_digits_pipeline
from patching.tiny_pipelines import Counter

STEPS = 24


def load(name):
    pipe = load_digits_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe([0, 3, 5, 8], generator=generator, output_type="pt", **kwargs).images


def psnr(a, b):
    return -10 * torch.log10((a - b).square().mean()).item()


def test_quality_per_work_beats_fewer_steps():
    pipe = load("teacher")
    plain = images(pipe, num_inference_steps=STEPS)
    quality = {}
    for key, wanted in {
        "interval": {"cache": "interval"},
        "first-block": {"cache": "first-block"},
        "w8a8": {"quantize": "w8a8"},
        "half": {"steps": STEPS // 2},
    }.items():
        with fewstep.patch(pipe, **wanted) as patch:
            quality[key] = psnr(images(pipe, num_inference_steps=STEPS), plain)
            if key == "interval":
                assert patch.report()["cache"]["skipped"] == 2 * (STEPS // 2 - 1)
            if key == "first-block":
                assert patch.report()["cache"]["skipped"] > STEPS // 2
    assert quality["interval"] > quality["half"] + 2
    assert quality["first-block"] > quality["half"] + 1
    assert quality["w8a8"] > 48
    assert torch.equal(images(pipe, num_inference_steps=STEPS), plain)


def test_student_in_one_and_two_steps():
    pipe = load("student")
    before = images(pipe)
    for steps in (1, 2):
        with fewstep.patch(pipe, steps=steps) as patch, Counter(pipe.transformer) as counter:
            image = images(pipe)
        assert counter.counts == [steps]
        assert "a few-step student" in patch.explain()
        assert "the grid stored with it" in patch.explain()
        assert image.std() > 0.2  # digits, not grey
    assert torch.equal(images(pipe), before)
