"""Scheduled methods on pipelines, by the model's output and by its blocks, a UNet's among them."""

import pytest
import torch

import fewstep
from fewstep.caching import Fora, Scm, Taylor
from patching.tiny_pipelines import BUILDERS, Counter, build, call, inner

STEPS = 6
ALL = sorted(set(BUILDERS) - {"digits_student"})


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


@pytest.mark.parametrize("scope", ["output", "blocks"])
@pytest.mark.parametrize("name", ALL)
def test_scheduled_steps_alone_run_in_full(name, scope):
    pipe = build(name)
    plain = run(pipe)
    with fewstep.patch(pipe, cache=Fora(every=1, scope=scope)) as patch:
        assert torch.equal(run(pipe), plain)
        assert patch.report()["cache"]["skipped"] == 0
    policy = Taylor(every=2, warmup=2, degree=1, scope=scope)
    with Counter(*inner(pipe)) as unpatched:
        run(pipe)
    with fewstep.patch(pipe, cache=policy) as patch:
        with Counter(*inner(pipe)) as counter:
            image = run(pipe)
        numbers = patch.report()["cache"]
        for decisions in numbers["branches"].values():
            if len(decisions) == STEPS:  # PNDM evaluates its second step twice
                assert decisions == ["full", "full", "skip", "full", "skip", "full"]
        assert torch.equal(run(pipe), image)  # a second image starts anew
    share = numbers["full"] / (numbers["full"] + numbers["skipped"])
    assert counter.counts[-1] == unpatched.counts[-1] * share
    assert image.isfinite().all()
    assert not torch.equal(image, plain)
    assert torch.equal(run(pipe), plain)


def test_a_mask_of_another_length_is_refused_when_the_run_starts():
    pipe = build("digits")
    plain = run(pipe)
    with fewstep.patch(pipe, cache=Scm("1101")):
        with pytest.raises(ValueError, match="a run of the mask's 4 steps, got 6"):
            run(pipe)
        assert call(pipe, num_inference_steps=4).isfinite().all()
    assert torch.equal(run(pipe), plain)
