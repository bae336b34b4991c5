"""Calibrating on samplers with a history, with noise and with two stages per step.

Predicted quality is that of the very same calls with the plan: in calibration and behind patch()
the same decisions are taken and the same numbers drawn.
"""

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

import fewstep
from fewstep.caching import calibrate
from fewstep.caching.quality import psnr
from patching.tiny_pipelines import arguments, build

# Scheduler, steps asked for, times that it steps.
ZOO = {
    "dpm++ 2m": (DPMSolverMultistepScheduler, 7, 7),
    "unipc": (UniPCMultistepScheduler, 7, 7),
    "heun": (HeunDiscreteScheduler, 4, 7),
    "lcm": (LCMScheduler, 7, 7),  # draws noise between its steps
}


@pytest.mark.parametrize("name", ZOO)
def test_predicted_is_what_the_patch_gives(name):
    kind, asked, stepped = ZOO[name]
    pipe = build("sd-unet")
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    generator = torch.Generator().manual_seed(3)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": asked}
    given["generator"] = generator
    plan = calibrate(pipe, [given], full_steps=5)
    assert len(plan.times) == stepped
    assert len(plan.full) == 5
    assert plan.predicted["final_mse"] > 0
    images = []
    for cache in (None, plan):
        generator.manual_seed(3)
        if cache is None:
            images.append(pipe(**given).images)
            continue
        with fewstep.patch(pipe, cache=cache) as patch:
            images.append(pipe(**given).images)
            numbers = patch.report()["cache"]
    assert numbers["skipped"] == 2
    assert psnr(images[:1], images[1:]) == pytest.approx([plan.predicted["psnr"]], abs=1e-3)
