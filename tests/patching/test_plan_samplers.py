"""Plans on samplers of every kind that a tiny Stable Diffusion (or, of flows, a DiT) runs.

With a history, with noise, with two stages per step, and those that count no steps.

Predicted quality is that of the very same calls with the plan: in calibration and behind patch()
the same decisions are taken and the same numbers drawn.
"""

import diffusers
import pytest
import torch

import fewstep
from fewstep.caching import Plan, Taylor, calibrate
from fewstep.caching.quality import psnr
from patching.tiny_pipelines import arguments, build

STEPS = 4
# Steps that the scheduler takes where they aren't those asked for.
TWICE = {
    "HeunDiscreteScheduler": 7,
    "KDPM2AncestralDiscreteScheduler": 7,
    "FlowMatchHeunDiscreteScheduler": 7,
    "PNDMScheduler": 5,
    "PNDMScheduler, Runge-Kutta": 13,
}
NAMES = [
    *TWICE,
    "CMStochasticIterativeScheduler",
    "DDIMScheduler",
    "DDIMInverseScheduler",  # its time rises
    "DDPMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EDMEulerScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "IPNDMScheduler",
    "LCMScheduler",  # draws noise between its steps
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]


def sampled(name):
    pipe = build("digits" if name.startswith("Flow") else "sd-unet")
    kind, *runge_kutta = name.split(", ")
    options = {"skip_prk_steps": False} if runge_kutta else {}
    pipe.scheduler = getattr(diffusers, kind).from_config(pipe.scheduler.config, **options)
    generator = torch.Generator().manual_seed(3)
    given = {**arguments(pipe), "output_type": "latent", "num_inference_steps": STEPS}
    return pipe, {**given, "generator": generator}


def run(pipe, given, cache=None):
    given["generator"].manual_seed(3)
    if cache is None:
        return pipe(**given).images, None
    with fewstep.patch(pipe, cache=cache) as patch:
        return pipe(**given).images, patch.report()["cache"]


@pytest.mark.parametrize("name", NAMES)
def test_predicted_is_what_the_patch_gives(name):
    pipe, given = sampled(name)
    plan = calibrate(pipe, [given], full_steps=3, passes=0)
    assert len(plan.times) == TWICE.get(name, STEPS)
    assert (len(plan.full), plan.part) == (3, None)
    assert plan.predicted["final_mse"] > 0
    plain, _ = run(pipe, given)
    cached, numbers = run(pipe, given, plan)
    for decisions in numbers["branches"].values():
        assert decisions == ["full" if weights is None else "skip" for weights in plan.steps]
    assert psnr([plain], [cached]) == pytest.approx([plan.predicted["psnr"]], abs=1e-3)
    nothing = Plan(plan.times, (None,) * len(plan.times))
    assert torch.equal(run(pipe, given, nothing)[0], plain)


@pytest.mark.parametrize("name", TWICE)
def test_published_schedules_where_a_time_is_there_twice(name):
    pipe, given = sampled(name)
    image, numbers = run(pipe, given, Taylor(every=3, degree=1, warmup=2))
    assert image.isfinite().all()
    steps = TWICE[name]
    full = [i < 2 or (i - 1) % 3 == 0 for i in range(steps)]
    for decisions in numbers["branches"].values():
        assert decisions == ["full" if own else "skip" for own in full]
