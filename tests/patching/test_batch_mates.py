"""Decisions per sample on pipelines: no bit of an image depends on its batch-mates."""

import pytest
import torch

import fewstep
from patching.tiny_pipelines import build, call, denoiser


class Dice:
    """Skips by a digit of a sample's change: as good as chance, and of this sample alone."""

    first, last, measures = 1, 0, True

    def must_run(self, step, since_full):
        return None

    def small_change(self, change):
        return (change * 1e4).long() % 4 != 0


@pytest.mark.parametrize("name", ["flux", "sd3", "sd-unet"])
def test_batch_mates_change_no_bit(name):
    pipe = build(name)
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape),
        with_kwargs=True,
    )
    call(pipe, num_inference_steps=1, batch=2)
    handle.remove()
    shape = (2, *seen[0][1:])  # without what guidance joins to the batch
    generator = torch.Generator().manual_seed(7)
    mine, quiet, wild = (
        size * torch.randn(1, *shape[1:], generator=generator) for size in (1.0, 1.0, 30.0)
    )

    def run(*latents):
        images = call(pipe, num_inference_steps=10, batch=2, latents=torch.cat(latents))
        return images[0], patch.report()["cache"]

    with fewstep.patch(pipe, cache=Dice()) as patch:
        alone, same = run(mine, mine)
        first, one = run(mine, quiet)
        second, other = run(mine, wild)
    assert torch.equal(first, alone)
    assert torch.equal(second, alone)
    assert one["blended"] > 0
    assert other["blended"] > 0
    assert same["skipped"] > 0
