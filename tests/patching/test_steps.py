"""steps=n: exactly n evaluations from every pipeline and scheduler, on the grid that fits."""

import copy

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SCMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
    VQDiffusionScheduler,
)

import fewstep
from patching.tiny_pipelines import BUILDERS, Counter, build, call, denoiser, digits_student


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_exactly_n_evaluations(name, steps):
    pipe = build(name)
    per_step = 2 if name in ("flux", "digits") else 1
    before = pipe.scheduler
    with fewstep.patch(pipe, steps=steps), Counter(denoiser(pipe)) as counter:
        image = call(pipe)
        assert image.isfinite().all()
        assert torch.equal(call(pipe, num_inference_steps=11), image)
    assert counter.counts == [2 * steps * per_step]
    assert pipe.scheduler is before


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler,
        EulerDiscreteScheduler,
        EulerAncestralDiscreteScheduler,
        HeunDiscreteScheduler,
        LCMScheduler,
        TCDScheduler,
        UniPCMultistepScheduler,
        DPMSolverMultistepScheduler,
    ],
)
def test_every_noise_scheduler(scheduler):
    pipe = build("sd-unet")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    for steps in (1, 2, 3, 4, 8):
        with fewstep.patch(pipe, steps=steps), Counter(pipe.unet) as counter:
            assert call(pipe).isfinite().all()
        assert counter.counts == [steps]


def test_trailing_grids_have_n_steps_whatever_n():
    pipe = build("pixart")
    for steps in range(1, 51):
        with fewstep.patch(pipe, steps=steps):
            pipe.scheduler.set_timesteps(50)
            assert len(pipe.scheduler.timesteps) == steps


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EulerAncestralDiscreteScheduler])
def test_a_few_step_students_own_sampler_is_kept(scheduler):
    pipe = build("sd-unet")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    with fewstep.patch(pipe, steps=4) as patch:
        assert type(pipe.scheduler) is scheduler
        assert "trailing spacing is what few-step students ship with" in patch.explain()


def test_scm_takes_any_step_count():
    """Its own defaults raise for every count but 2."""
    pipe = build("sana")
    pipe.scheduler = SCMScheduler()
    for steps in (1, 2, 4):
        with fewstep.patch(pipe, steps=steps):
            pipe.scheduler.set_timesteps(20, max_timesteps=1.57, intermediate_timesteps=1.3)
            assert len(pipe.scheduler.timesteps) == steps + 1
            assert (steps == 2) == bool((pipe.scheduler.timesteps == 1.3).any())


def test_flow_grid_has_no_wasted_evaluation():
    pipe = build("sd3")
    pipe.scheduler.set_timesteps(4)
    assert pipe.scheduler.sigmas[3] < 0.01  # what is repaired
    with fewstep.patch(pipe, steps=4):
        call(pipe)
        uniform = np.array([1, 0.75, 0.5, 0.25])
        shifted = 3 * uniform / (1 + 2 * uniform)
        np.testing.assert_allclose(pipe.scheduler.sigmas, [*shifted, 0], rtol=1e-5)


def test_flux_keeps_its_dynamic_shift():
    pipe = build("flux")
    call(pipe, num_inference_steps=4)
    stock = pipe.scheduler.sigmas
    with fewstep.patch(pipe, steps=4):
        call(pipe)
        torch.testing.assert_close(pipe.scheduler.sigmas, stock)


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchLCMScheduler(),
        UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
    ids=lambda s: type(s).__name__,
)
def test_every_flow_scheduler(scheduler):
    pipe = build("sana")
    pipe.scheduler = scheduler
    for steps in (1, 2, 4):
        with fewstep.patch(pipe, steps=steps), Counter(pipe.transformer) as counter:
            assert call(pipe).isfinite().all()
            assert pipe.scheduler.sigmas[steps - 1] > 0.1
        assert counter.counts == [steps]


def test_a_student_uses_the_grid_stored_with_it():
    pipe = digits_student()
    pipe.set_progress_bar_config(disable=True)
    with fewstep.patch(pipe, steps=2) as patch:
        call(pipe)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.6, 0.0])
        assert "stored with it" in patch.explain()
        assert "nothing marks" not in patch.explain()
    with fewstep.patch(pipe, steps=4) as patch:
        call(pipe)
        assert pipe.scheduler.sigmas.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
        assert "none stored for 4" in patch.explain()


def test_a_callers_own_grid_counts():
    pipe = build("flux")
    with fewstep.patch(pipe, steps=2):
        call(pipe, sigmas=[1.0, 0.3])
        assert len(pipe.scheduler.timesteps) == 2
        with pytest.raises(ValueError, match=r"sigmas: expected 2 values.*steps=2, got 3"):
            call(pipe, sigmas=[1.0, 0.3, 0.1])


def test_the_saved_config_names_the_scheduler_in_use():
    pipe = build("sd-unet")
    config = pipe.config
    with fewstep.patch(pipe, steps=2):
        assert tuple(pipe.config["scheduler"]) == ("diffusers", "DPMSolverMultistepScheduler")
    assert pipe.config is config


def test_a_deep_copy_of_the_scheduler_keeps_the_count():
    pipe = build("sd3")
    with fewstep.patch(pipe, steps=2):
        twin = copy.deepcopy(pipe.scheduler)
        twin.set_timesteps(9)
        assert len(twin.timesteps) == 2
        assert len(pipe.scheduler.timesteps) != 2


def test_unknown_scheduler_is_refused():
    pipe = build("sd-unet")
    pipe.scheduler = VQDiffusionScheduler(num_vec_classes=4)
    with pytest.raises(ValueError, match=r"steps: expected a scheduler of .*; got VQDiffusion"):
        fewstep.patch(pipe, steps=2)


def test_student_with_noise_stays_seeded():
    pipe = digits_student()
    pipe.set_progress_bar_config(disable=True)
    with fewstep.patch(pipe, steps=2):
        assert torch.equal(call(pipe, seed=3), call(pipe, seed=3))
    assert isinstance(build("digits").scheduler, FlowMatchEulerDiscreteScheduler)
