"""Caches on a GPU: steps of a known grid have the host wait for nothing, and repeat to the bit."""

import contextlib

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import fewstep
from fewstep.caching import FasterDiffusion, Fora, Ras, Taylor
from patching.tiny_pipelines import build, denoiser

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
STEPS = 7


@contextlib.contextmanager
def nothing_waits():
    """Raise where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(autouse=True)
def _float32(monkeypatch):
    """Convolutions in float32, not in TF32, so that batches of any size give nearly the same."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_device(name):
    """Return a pipeline, its model on the device, with a scheduler that counts its steps."""
    pipe = build(name)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    denoiser(pipe).to(DEVICE)
    return pipe


def given(name):
    """Return what the model gets beside the time; the same tensors on every step."""
    torch.manual_seed(0)
    text = torch.randn(2, 6, 16)
    tensors = {
        "digits": {
            "hidden_states": torch.randn(2, 1, 16, 16),
            "class_labels": torch.tensor([3, 7]),
        },
        "sd3": {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "encoder_hidden_states": text,
            "pooled_projections": torch.randn(2, 8),
        },
        "sd-unet": {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": text},
    }[name]
    return {key: value.to(DEVICE) for key, value in tensors.items()}


@torch.no_grad()
def loop(pipe, tensors, strict=()):
    """Return the outputs on the grid that is set; steps in `strict` may wait for nothing."""
    outputs = []
    for index, time in enumerate(pipe.scheduler.timesteps):
        pipe.scheduler._step_index = index
        with nothing_waits() if index in strict else contextlib.nullcontext():
            outputs.append(denoiser(pipe)(timestep=time.expand(2), **tensors).sample)
    return torch.stack(outputs)


def twice(name, policy):
    """Return the outputs of a second run, which waits for nothing, and the report.

    The first one reads the grid's times, copies tables, and has kernels built and checked.
    """
    pipe, tensors = on_device(name), given(name)
    pipe.scheduler.set_timesteps(STEPS, device=DEVICE)
    plain = loop(pipe, tensors)
    with fewstep.patch(pipe, cache=policy) as patch:
        first = loop(pipe, tensors)
        second = loop(pipe, tensors, strict=range(STEPS))
        assert torch.equal(first, second)
        return second, plain, patch.report()["cache"]


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_a_share_of_the_tokens(name):
    found, plain, numbers = twice(name, Ras(share=0.5, warmup=2, every=4))
    assert numbers["partly"] == 4
    assert not torch.equal(found, plain)
    found, plain, numbers = twice(name, Ras(share=1.0, warmup=2, every=4))
    assert numbers["partly"] == 4
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("snapshots", [None, "int8", "fp8"])
@pytest.mark.parametrize("scope", ["block", "module"])
@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_a_forecast_for_every_module(name, scope, snapshots):
    policy = Taylor(every=3, warmup=2, degree=1, scope=scope, snapshots=snapshots)
    found, plain, numbers = twice(name, policy)
    assert numbers["skipped"] == 4
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    found, plain, numbers = twice(name, Fora(every=1, scope=scope, snapshots=snapshots))
    assert numbers["skipped"] == 0
    assert torch.equal(found, plain)


@pytest.mark.parametrize("snapshots", [None, "int8"])
def test_a_unets_encoder_on_key_steps(snapshots):
    found, plain, numbers = twice("sd-unet", FasterDiffusion(every=3, snapshots=snapshots))
    assert numbers["skipped"] == 4
    assert not torch.equal(found, plain)
    if snapshots is None:
        policy = FasterDiffusion(every=3, parallel=True)
        parallel, _, numbers = twice("sd-unet", policy)
        assert numbers["ahead"] == 4
        torch.testing.assert_close(parallel, found, rtol=1e-4, atol=1e-4)


def test_decoders_that_ran_ahead_of_times_on_the_host():
    """What a model with such times does at key steps waits by itself; handing out does not."""
    pipe, tensors = on_device("sd-unet"), given("sd-unet")
    pipe.scheduler.set_timesteps(STEPS)
    with fewstep.patch(pipe, cache=FasterDiffusion(every=3, parallel=True)) as patch:
        loop(pipe, tensors, strict=(1, 2, 4, 5))
        assert patch.report()["cache"]["ahead"] == 4
