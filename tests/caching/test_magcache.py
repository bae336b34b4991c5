"""MagCache: the decisions of diffusers' hook, ratios measured on magnitudes that are known."""

from itertools import pairwise

import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig

import fewstep
from fewstep.caching import MagCache, MagnitudeRecorder, ScheduledPolicy
from patching.tiny_pipelines import build, call

FLUX = tuple(FLUX_MAG_RATIOS.tolist())


def diffusers_steps(config, steps):
    """What `MagCacheHeadHook.new_forward` decides, written out; the full steps."""
    product, error, skips, full = 1.0, 0.0, 0, []
    kept = int(config.retention_ratio * config.num_inference_steps + 0.5)
    for step in range(steps):
        compute = True
        if step >= kept:
            product *= config.mag_ratios[step].item()
            skips, error = skips + 1, error + abs(1 - product)
            if step > 0 and error <= config.threshold and skips <= config.max_skip_steps:
                compute = False
            else:
                product, error, skips = 1.0, 0.0, 0
        full += [step] if compute else []
    return tuple(full)


@pytest.mark.parametrize("steps", [28, 20, 9])
@pytest.mark.parametrize("threshold", [0.0, 0.03, 0.06, 0.2])
def test_schedules_are_those_of_diffusers(steps, threshold):
    config = MagCacheConfig(
        threshold=threshold, num_inference_steps=steps, mag_ratios=list(FLUX), max_skip_steps=3
    )
    policy = MagCache(FLUX, threshold=threshold)
    assert isinstance(policy, ScheduledPolicy)
    assert policy.full(steps) == diffusers_steps(config, steps)


def test_more_is_skipped_the_more_is_allowed():
    counts = [len(MagCache(FLUX, threshold=t).full(28)) for t in (0.02, 0.06, 0.2)]
    assert counts[0] > counts[1] > counts[2]
    assert MagCache((1.0,) * 8, max_skips=2, retention=0).full(8) == (0, 3, 6)


@pytest.mark.parametrize(("name", "scope"), [("flux", "blocks"), ("digits", "output")])
def test_ratios_are_those_of_magnitudes(name, scope):
    pipe = build(name)
    plain = call(pipe, num_inference_steps=6)
    recorder = MagnitudeRecorder(scope)
    with pytest.raises(ValueError, match="expected at least one run"):
        _ = recorder.ratios
    seen = []
    norm = torch.linalg.vector_norm
    step = pipe.scheduler.step

    def watch(output, *args, **kwargs):
        seen.append(norm(output.double(), dim=1 if output.dim() > 3 else -1))
        return step(output, *args, **kwargs)

    with fewstep.patch(pipe, cache=recorder):
        assert torch.equal(call(pipe, num_inference_steps=6), plain)
        pipe.scheduler.step = watch
        alone = {"true_cfg_scale": 1.0} if name == "flux" else {"guidance_scale": 1.0}
        again = MagnitudeRecorder(scope)
    with fewstep.patch(pipe, cache=again):
        call(pipe, num_inference_steps=6, **alone)
    ratios = again.ratios
    assert len(ratios) == len(recorder.ratios) == 6
    assert ratios[0] == 1
    if scope == "output":  # one pass: what the scheduler gets is what the model gives
        want = [(b / a).mean().item() for a, b in pairwise(seen)]
        assert ratios[1:] == pytest.approx(want, rel=1e-6)
    assert all(ratio > 0 for ratio in ratios)
    del pipe.scheduler.step
    with fewstep.patch(pipe, cache=MagCache(ratios, threshold=1.0, scope=scope)) as patch:
        assert call(pipe, num_inference_steps=6).isfinite().all()
        assert patch.report()["cache"]["skipped"] > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MagCache(()), "ratios: expected one per step, got none"),
        (lambda: MagCache((1.0, 0.0)), "ratios: expected a finite number > 0, got 0.0"),
        (lambda: MagCache((1.0,), threshold=-1), "threshold: expected a finite number >= 0"),
        (lambda: MagCache((1.0,), retention=2), "retention: expected a finite .* >= 0 and <= 1"),
        (lambda: MagCache((1.0,), max_skips=-1), "max_skips: expected at least 0, got -1"),
        (lambda: MagCache((1.0,), scope="model"), "scope: expected 'output' or 'blocks'"),
        (lambda: MagnitudeRecorder("model"), "scope: expected 'output' or 'blocks'"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
