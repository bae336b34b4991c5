"""Runs that something is trained on, of a pipeline of one layer."""

from types import SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from fewstep.caching.quality import psnr
from fewstep.caching.rollouts import Rollout, Runs, standing


class Video:
    """Returns frames [B, F, H, W] in [0, 1], as video pipelines do."""

    def __init__(self):
        self.transformer = torch.nn.Linear(4, 4).requires_grad_(False)
        self.scheduler = FlowMatchEulerDiscreteScheduler()

    def __call__(self, generator=None):
        self.scheduler.set_timesteps(3)
        x = torch.randn(2, 5, 3, 4, generator=generator)
        for time in self.scheduler.timesteps:
            x = self.scheduler.step(self.transformer(x), time, x, return_dict=False)[0]
        return SimpleNamespace(frames=x.sigmoid())


def test_videos_are_measured_by_their_frames():
    pipe = Video()
    rollout = Rollout(pipe)
    with standing(pipe.transformer, rollout):
        runs = Runs(rollout, [{"generator": torch.Generator().manual_seed(0)}], 0)
        full = runs.full[0][1]
        pipe.transformer.bias.add_(0.1)
        found = runs.quality()
        levels = psnr([full], [runs.draw(0)[1]])
    assert full.shape == (2, 5, 3, 4)
    assert (found["of"], found["samples"]) == ("images", 2)
    assert found["psnr"] == sum(levels) / 2
