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


def _unet():
    from diffusers import UNet2DConditionModel

    config = build("sd-unet").unet.config
    return UNet2DConditionModel.from_config(config, time_cond_proj_dim=6).eval()


def test_on_a_device_guidance_is_known_by_its_tensor(reads):
    pipe = build("sd-unet")
    pipe.unet = _unet()
    pipe.scheduler.set_timesteps(3)
    given = (torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16))
    guidance = torch.randn(1, 6)

    @torch.no_grad()
    def evaluate():
        x, text = given
        return [
            pipe.unet(x, t, text, timestep_cond=guidance).sample for t in pipe.scheduler.timesteps
        ]

    plain = evaluate()
    with fewstep.patch(pipe, time="cache") as patch:
        for _ in range(2):
            assert all(map(torch.equal, evaluate(), plain))
        report = patch.report()["time"]
        assert (report["evaluated"], report["saved"]) == (6, 10)  # four steps, of three times
        guidance.fill_(1.0)
        other = evaluate()
    assert all(map(torch.equal, other, evaluate()))
    assert not torch.equal(other[0], plain[0])


def _late_time(model):
    model.register_forward_pre_hook(lambda _, args: (args[0], args[1] * 0.5, *args[2:]))


def _late_time_in_the_grid(model):
    """Another step's time, as a view of the same grid."""
    model.register_forward_pre_hook(lambda _, args: (args[0], args[1]._base[-1], *args[2:]))


def _sincos(model):
    model.time_proj.register_forward_hook(lambda _, args, output: output * 0.5)


def _sincos_in(model):
    model.time_proj.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,))


def _sincos_scale(model):
    model.time_proj.scale = 2


def _sincos_forward(model):
    below = model.time_proj.forward
    model.time_proj.forward = lambda *args: below(*args) * 0.5


def _embedding_in(model):
    model.time_embedding.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))


def _embedding_forward(model):
    below = model.time_embedding.forward
    model.time_embedding.forward = lambda x, *rest: below(x * 0.5, *rest)


CHANGES = [
    _late_time,
    _late_time_in_the_grid,
    _sincos,
    _sincos_in,
    _sincos_scale,
    _sincos_forward,
    _embedding_in,
    _embedding_forward,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_device_what_comes_between_the_grid_and_the_embedding_is_seen(change, dtype, reads):
    """With bfloat16 the model casts between sine and cosine and the layers behind."""
    pipe = build("sd-unet")
    pipe.unet.to(dtype)
    pipe.scheduler.set_timesteps(3)
    given = (torch.randn(2, 4, 8, 8, dtype=dtype), torch.randn(2, 6, 16, dtype=dtype))

    @torch.no_grad()
    def evaluate():
        x, text = given
        return [pipe.unet(x, t, text).sample for t in pipe.scheduler.timesteps]

    patch = fewstep.patch(pipe, time="cache")
    plain = evaluate()
    assert all(map(torch.equal, evaluate(), plain))
    report = patch.report()["time"]
    assert (report["evaluated"], report["saved"]) == (6, 10)  # four steps, of three times
    change(pipe.unet)
    images = [evaluate(), evaluate()]
    patch.undo(force=True)
    expected = evaluate()
    assert not torch.equal(expected[0], plain[0])
    assert all(map(torch.equal, images[0], expected))
    assert all(map(torch.equal, images[1], expected))
