"""What calibration asks of calls, on a model of one layer and a loop of its own."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from torch import nn

from fewstep.caching import Plan, calibrate
from fewstep.caching.record import record
from fewstep.caching.runs import mean_squares

STEPS = 6


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.3 * torch.randn(4, 4, generator=generator))

    def forward(self, hidden_states, timestep):
        return torch.tanh(hidden_states @ self.weight * (1 + timestep / 1000))


class Pipeline:
    """Steps latents of any shape; `second` says how another tensor is stepped beside them."""

    def __init__(self, scheduler=None, second=None, shape=(2, 3, 4)):
        self.transformer, self.second, self.shape = Model(), second, shape
        self.scheduler = scheduler or FlowMatchEulerDiscreteScheduler()

    def __call__(self, generator=None):
        self.scheduler.set_timesteps(STEPS)
        other = copy.deepcopy(self.scheduler) if self.second == "copy" else self.scheduler
        x = torch.randn(self.shape, generator=generator)
        y = torch.randn(2, 4, generator=generator)
        for time in self.scheduler.timesteps:
            v = self.transformer(x, time)
            given = (x,) if self.second == "tuple" else x
            x = self.scheduler.step(v, time, given, return_dict=False)[0]
            if self.second is not None:
                y = other.step(y.tanh(), time, y, return_dict=False)[0]
        return (x,)


class ScmPipeline(Pipeline):
    """SCM lists the final 0 as one more timestep."""

    def __call__(self, generator=None):
        self.scheduler.set_timesteps(STEPS, intermediate_timesteps=None)
        x = torch.randn(self.shape, generator=generator)
        for time in self.scheduler.timesteps[:-1]:
            v = self.transformer(x, time)
            x = self.scheduler.step(v, time, x, generator=generator, return_dict=False)[0]
        return (x,)


def calls():
    return [{"generator": torch.Generator().manual_seed(seed)} for seed in range(2)]


@pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (2, 2, 3, 4), (1, 2, 2, 3, 4)])
def test_latents_of_any_rank(shape):
    plan = calibrate(Pipeline(shape=shape), calls(), full_steps=4)
    assert plan.predicted["samples"] == 2 * shape[0]
    assert plan.made["size"] == list(shape[1:])


def test_a_second_tensor_on_a_copy_of_the_scheduler():
    """As pipelines of video and sound do: the plan is that of the first, for both."""
    alone = calibrate(Pipeline(), calls()[:1], full_steps=4)
    both = calibrate(Pipeline(second="copy"), calls()[:1], full_steps=4)
    assert both == alone


def test_a_grid_that_lists_its_end():
    plan = calibrate(ScmPipeline(SCMScheduler()), calls(), full_steps=4)
    assert (len(plan.times), plan.part, len(plan.full)) == (STEPS, (0, STEPS + 1), 4)
    # What was predicted is of a run that skipped steps.
    errors = plan.predicted["step_error"]
    skipped = [i for i, own in enumerate(plan.steps) if own is not None]
    assert all(errors[i] > 0 for i in skipped)
    assert errors[: skipped[0]] == [0.0] * skipped[0]


def test_a_copy_of_a_recorded_scheduler_is_not_recorded():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(STEPS)
    with record(scheduler, values=8, seed=0) as run:
        twin = copy.deepcopy(scheduler)
        x = torch.ones(1, 4)
        twin.step(x, twin.timesteps[0], x)
        assert (twin.step_index, scheduler.step_index, len(run.outputs)) == (1, None, 0)
        scheduler.step(x, scheduler.timesteps[0], x)
        assert len(run.outputs) == 1
    assert "step" not in vars(scheduler)


def test_two_tensors_on_one_scheduler():
    pipe = Pipeline(DDIMScheduler(clip_sample=False), second="same")
    with pytest.raises(ValueError, match=r"one tensor .* got latents of \[3, 4\] and \[4\]"):
        calibrate(pipe, calls()[:1], full_steps=3)
    pipe.shape = (2, 4)
    with pytest.raises(ValueError, match=r"or a pipeline that steps several tensors with it"):
        calibrate(pipe, calls()[:1], full_steps=3)
    with pytest.raises(ValueError, match=r"step takes one tensor of latents, got .* with tuple"):
        calibrate(Pipeline(second="tuple"), calls()[:1], full_steps=3)


def test_progress(capsys):
    silent = calibrate(Pipeline(), calls(), full_steps=4, passes=1)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "")
    assert calibrate(Pipeline(), calls(), full_steps=4, passes=1, progress=True) == silent
    out, err = capsys.readouterr()
    assert out == ""
    assert "in full" in err
    assert err.count("4 of 6 steps in full") == 2


def testmean_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 3, 7, generator=generator)
    assert torch.allclose(mean_squares(x), x.double().square().mean((1, 2)))
    assert torch.allclose(mean_squares(x, y), (x - y).double().square().mean((1, 2)))


def test_plans_of_both_say_what_they_were_made_with(tmp_path):
    pipe = Pipeline()
    pipe.guidance_scale = 3.5
    plan = calibrate(pipe, calls(), full_steps=4)
    assert plan.made["guidance"] == [3.5, 3.5]
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
