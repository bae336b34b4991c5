"""LeMiCa: its edges are real runs, its schedule is theirs, and the pipeline is as it was."""

import numpy as np
import pytest
import torch

import fewstep
from fewstep.caching import Scm, edge_costs, lemica
from fewstep.caching.schedules import minimax
from patching.test_image_to_image import image_to_image
from patching.tiny_pipelines import arguments, build, call, digits

STEPS = 5


@pytest.fixture(scope="module")
def pipe():
    return digits(layers=2)


CALLS = [
    {"class_labels": [label, 4], "num_inference_steps": STEPS, "output_type": "latent"}
    for label in (1, 2)
]


def runs(pipe, **cache):
    """Return the latents of the calls."""
    found = []
    for index, given in enumerate(CALLS):
        with torch.random.fork_rng():
            torch.manual_seed(index)
            if not cache:
                found.append(pipe(**given).images)
                continue
            with fewstep.patch(pipe, **cache):
                found.append(pipe(**given).images)
    return found


def test_an_edge_is_a_run_that_skips_its_steps(pipe):
    costs = edge_costs(pipe, CALLS, longest=4)
    assert costs.shape == (STEPS, STEPS + 1)
    full = runs(pipe)
    for start, end in ((0, 2), (1, 4), (0, 4), (2, 5)):
        mask = "".join("0" if start < step < end else "1" for step in range(STEPS))
        changes = [
            (x - y).abs().flatten(1).sum(1) / y.abs().flatten(1).sum(1)
            for x, y in zip(runs(pipe, cache=Scm(mask)), full, strict=True)
        ]
        want = torch.cat(changes).mean().item()
        assert want > 1e-3
        assert costs[start, end] == pytest.approx(want, rel=1e-4)
    assert costs[0, 5] == np.inf  # longer than asked for
    assert costs[3, 4] == 0
    policy = lemica(pipe, CALLS, full_steps=3, longest=4)
    assert policy == Scm.of(minimax(costs, 3), STEPS)


def test_the_pipeline_is_as_it_was(pipe):
    before, plain = dict(pipe.transformer.__dict__), call(pipe, num_inference_steps=STEPS)
    policy = lemica(pipe, CALLS[:1], full_steps=2, scope="blocks")
    assert policy.scope == "blocks"
    assert len(policy.mask) == STEPS
    assert pipe.transformer.__dict__ == before
    assert torch.equal(call(pipe, num_inference_steps=STEPS), plain)
    with fewstep.patch(pipe, cache=policy) as patch:
        call(pipe, num_inference_steps=STEPS)
        report = patch.report()["cache"]
        assert {name: d.count("full") for name, d in report["branches"].items()} == {
            name: 2 for name in report["branches"]
        }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"full_steps": 9}, "full_steps: expected at most the run's 5 steps, got 9"),
        ({"full_steps": 2, "longest": 2}, "longest: expected at least 3 for 2 of 5 steps"),
        ({"full_steps": 2, "longest": 0}, "longest: expected at least 1, got 0"),
        ({"full_steps": 2, "scope": "tokens"}, "scope: expected 'output' or"),
        ({"full_steps": 2, "values": 0}, "values: expected at least 1, got 0"),
    ],
)
def test_bad_settings_are_found_before_anything_is_measured(pipe, settings, message):
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=message):
        lemica(pipe, CALLS[:1], **settings)
    handle.remove()
    assert len(calls) <= 2 * STEPS  # one run with guidance, to count the steps


def test_two_models_are_refused():
    from patching import test_plan_two_models as two_models

    for measure in (edge_costs, lambda pipe, calls: lemica(pipe, calls, full_steps=4)):
        with pytest.raises(ValueError, match="pipe: expected one model for all steps, got 2"):
            measure(two_models.build(), [two_models.given(4)])


def test_refusals(pipe):
    other = [*CALLS[:1], {**CALLS[1], "num_inference_steps": 4}]
    with pytest.raises(ValueError, match="one number of steps in all calls, 5, got 4 in call 1"):
        edge_costs(pipe, other, longest=2)
    source = build("sd3")
    given = {**arguments(source), "image": torch.zeros(1, 3, 16, 16), "strength": 0.5}
    with pytest.raises(ValueError, match="got 2 steps from step 2 on, of 4"):
        lemica(image_to_image(source, "sd3"), [{**given, "num_inference_steps": 4}], full_steps=2)
    with pytest.raises(TypeError, match="pipe: expected a pipeline"):
        lemica(torch.nn.Linear(1, 1), CALLS, full_steps=2)
