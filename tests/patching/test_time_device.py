"""time="cache" on a device: times are known without waiting for it. CPU tensors stand for its."""

import pytest
import torch

import fewstep
from fewstep.caching import clock
from patching.timed import evaluations, run
from patching.tiny_pipelines import build


@pytest.fixture
def reads(monkeypatch):
    """Take CPU tensors for those of a device: their values may be read once per grid."""
    shapes = []
    monkeypatch.setattr(clock, "on_host", lambda x: False)
    own = clock._bytes

    def read(x):
        shapes.append(x.shape)
        return own(x)

    monkeypatch.setattr(clock, "_bytes", read)
    return shapes


@pytest.mark.parametrize("name", ["digits", "sd3", "pixart", "sd-unet", "sana", "flux"])
def test_on_a_device_a_step_is_known_by_its_place_in_the_grid(name, reads):
    pipe = build(name)
    plain = run(pipe)
    with fewstep.patch(pipe, time="cache") as patch:
        assert torch.equal(run(pipe), plain)
        first = evaluations(patch)
        assert torch.equal(run(pipe), plain)
        report = patch.report()["time"]
    if name in ("sd3", "pixart", "sd-unet"):
        assert report["evaluated"] == first
        assert len(reads) == 2  # one read per image
    else:  # their pipelines compute the time that the model gets, on the device
        assert "times on a device that are not the scheduler's own" in report["not_kept"]
        assert report["saved"] == 0
        assert not reads


def test_on_a_device_a_grid_that_is_written_to_is_read_again(reads):
    pipe = build("sd3")
    model, scheduler = pipe.transformer, pipe.scheduler
    scheduler.set_timesteps(3)
    given = (torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16), torch.randn(1, 8))

    @torch.no_grad()
    def evaluate():
        return [model(*given, timestep=t.expand(1)).sample for t in scheduler.timesteps]

    plain = evaluate()
    with fewstep.patch(pipe, time="cache") as patch:
        for _ in range(2):
            assert all(map(torch.equal, evaluate(), plain))
        with torch.no_grad():
            scheduler.timesteps.mul_(0.5)
        after = evaluate()
        assert patch.report()["time"]["saved"] > 0
        assert len(reads) == 2
    assert all(map(torch.equal, after, evaluate()))
    assert not torch.equal(after[0], plain[0])


def test_on_a_device_guidance_is_known_by_its_tensor(reads):
    from diffusers import FluxTransformer2DModel

    pipe = build("flux")
    config = pipe.transformer.config
    pipe.transformer = FluxTransformer2DModel.from_config(config, guidance_embeds=True).eval()
    given = {
        "hidden_states": torch.randn(1, 4, 16),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 8),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    guidance = torch.full((1,), 3.5)

    @torch.no_grad()
    def evaluate():
        times = torch.linspace(1, 0.5, 3)
        return [
            pipe.transformer(**given, timestep=t[None] / 1000, guidance=guidance).sample
            for t in times
        ]

    plain = evaluate()
    with fewstep.patch(pipe, time="cache") as patch:
        assert all(map(torch.equal, evaluate(), plain))
        assert (patch.report()["time"]["evaluated"], patch.report()["time"]["saved"]) == (1, 2)
        guidance.fill_(1.0)
        other = evaluate()
    assert all(map(torch.equal, other, evaluate()))
    assert not torch.equal(other[0], plain[0])
    assert not reads
