"""Learned routers: budgets and gradients of the training, masks on pipelines, files, errors."""

import pytest
import torch

import fewstep
from fewstep.caching import Router, train_router
from fewstep.caching.layers import find_modules
from fewstep.caching.mixing import mixing
from fewstep.caching.quality import psnr
from fewstep.caching.train_router import _Gated, masked, relaxed
from patching.tiny_pipelines import Counter, digits

STEPS = 4


def calls(count=2):
    return [
        {
            "class_labels": [index, index + 1],
            "num_inference_steps": STEPS,
            "generator": torch.Generator().manual_seed(index),
            "output_type": "pt",
        }
        for index in range(count)
    ]


def pipeline():
    pipe = digits(layers=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe):
    return [pipe(**call).images for call in calls()]


@pytest.fixture(scope="module")
def trained():
    pipe = pipeline()
    return pipe, train_router(pipe, calls(), compute=0.6, iterations=8)


def test_gates_cost_what_they_may_and_know_the_price():
    torch.manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    costs = torch.rand(5, 3, dtype=torch.float64)
    costs /= costs.sum()
    fixed = torch.zeros(5, 3, dtype=torch.bool)
    fixed[0] = True
    gates = relaxed(logits, costs, 0.5, 0.7, fixed)
    assert (gates * costs).sum().item() == pytest.approx(0.5, abs=1e-9)
    assert gates[0].eq(1).all()
    assert ((gates > 0) & (gates <= 1)).all()
    torch.autograd.gradcheck(lambda x: relaxed(x, costs, 0.5, 0.7, fixed), logits)


@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.99, 1.0])
def test_masks_stay_in_the_budget(share):
    torch.manual_seed(1)
    costs = torch.rand(6, 4, dtype=torch.float64)
    costs[0] = 0.01
    costs /= costs.sum()
    fixed = torch.zeros(6, 4, dtype=torch.bool)
    fixed[0] = True
    mask = torch.tensor(masked(torch.randn(6, 4), costs, share, fixed))
    left = share - (costs * mask).sum().item()
    assert left > -1e-6
    assert mask[0].all()
    assert not mask.all() or share > 0.999
    assert mask.all() or left < costs[~mask].max().item()  # what is left pays for no more


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_of_a_gate_is_that_of_the_run(checkpointed):
    pipe = pipeline()
    pipe.transformer.double()
    modules = find_modules(pipe.transformer)
    with mixing(pipe, pipe.transformer, modules) as mixed:
        runs = _Gated(mixed, calls(1), 0)
        assert runs.costs.sum().item() == pytest.approx(1)
        mixed.checkpointed = checkpointed
        gates = torch.full(runs.costs.shape, 0.6, dtype=torch.float64).requires_grad_()
        runs.final_gradient(0, gates)
        slopes = []
        for place in ((1, 0), (3, 2)):
            losses = []
            for size in (1e-3, -1e-3):
                moved = gates.detach().clone()
                moved[place] += size
                mixed.gates = moved
                losses.append(runs.loss(0).item())
            slopes.append((losses[0] - losses[1]) / 2e-3)
    found = [gates.grad[1, 0].item(), gates.grad[3, 2].item()]
    # The loss is taken in float32, whose rounding the difference divides by 2e-3.
    assert found == pytest.approx(slopes, rel=2e-2, abs=1e-3)
    assert gates.grad[0].eq(0).all()  # nothing is there yet to be reused


def test_gates_of_one_are_the_model_and_masks_are_gates():
    pipe = pipeline()
    full = pipe(**calls()[0]).images
    modules = find_modules(pipe.transformer)
    with mixing(pipe, pipe.transformer, modules) as mixed:
        mixed.gates = [[True] * len(modules)] * STEPS
        assert torch.equal(mixed.run(calls()[0]).images, full)
        torch.manual_seed(0)
        mask = torch.rand(STEPS, len(modules)) < 0.5
        mixed.gates = mask.tolist()
        masked_out = mixed.run(calls()[0]).images
        mixed.gates = mask.float()
        torch.testing.assert_close(mixed.run(calls()[0]).images, masked_out)
    assert torch.equal(pipe(**calls()[0]).images, full)


def test_training_honours_the_budget_and_beats_chance(trained):
    pipe, router = trained
    assert router.made["compute"] <= 0.6
    assert all(mask[0] == "1" for mask in router.masks.values())
    full = draw(pipe)
    generator = torch.Generator().manual_seed(0)
    levels = []
    names = list(router.masks)
    ran = sum(mask.count("1") for mask in router.masks.values()) - len(names)
    for _ in range(4):
        chosen = torch.randperm(len(names) * (STEPS - 1), generator=generator)[:ran]
        rest = torch.zeros(len(names) * (STEPS - 1), dtype=torch.long)
        rest[chosen] = 1
        rows = rest.view(len(names), -1).tolist()
        masks = {n: "1" + "".join(map(str, row)) for n, row in zip(names, rows, strict=True)}
        with fewstep.patch(pipe, cache=Router(router.times, masks)):
            found = psnr(full, draw(pipe))
        levels.append(sum(found) / len(found))
    assert router.predicted["psnr"] > sum(levels) / len(levels)


def test_patched_runs_are_those_that_training_measured(trained):
    pipe, router = trained
    full = draw(pipe)
    name, mask = min(router.masks.items(), key=lambda one: one[1].count("1"))
    part = next(
        module
        for module in pipe.transformer.get_submodule(name).modules()
        if isinstance(module, torch.nn.Linear)
    )
    with fewstep.patch(pipe, cache=router), Counter(part) as counter:
        levels = psnr(full, draw(pipe))
    assert sum(levels) / len(levels) == pytest.approx(router.predicted["psnr"], abs=1e-2)
    assert counter.counts[0] == mask.count("1") * 2 * len(calls())  # guided and unguided


def test_steps_in_pairs():
    pipe = pipeline()
    router = train_router(pipe, calls(), compute=0.8, objective="step", iterations=2)
    assert all(mask[::2] == "11" for mask in router.masks.values())
    assert router.made["compute"] <= 0.8
    assert any("0" in mask for mask in router.masks.values())


def test_files_and_other_grids(trained, tmp_path):
    pipe, router = trained
    path = tmp_path / "router.json"
    router.save(path)
    assert Router.load(path) == router
    with fewstep.patch(pipe, cache=router):
        wanted = draw(pipe)
    with fewstep.patch(pipe, cache=path):
        assert all(map(torch.equal, draw(pipe), wanted))
        with pytest.raises(ValueError, match="expected the router's grid of 4 steps"):
            pipe(**{**calls()[0], "num_inference_steps": 5})
    with pytest.raises(ValueError, match="expected the pipeline that Router"):
        fewstep.patch(digits(layers=3), cache=router)
    path.write_text('{"format": "fewstep cache router", "version": 0}')
    with pytest.raises(ValueError, match="expected a fewstep cache router"):
        Router.load(path)


def test_another_scheduler_runs_in_full(trained):
    _, router = trained
    pipe = pipeline()
    with fewstep.patch(pipe, cache=router) as patch:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=3.0)
        pipe(**calls()[0])
        assert set(patch.report()["cache"]["why_full"]) == {"another scheduler"}


def test_training_leaves_the_pipeline_as_it_was(trained):
    pipe, _ = trained
    assert "step" not in pipe.scheduler.__dict__
    assert all("forward" not in module.__dict__ for module in pipe.transformer.modules())
    assert all(parameter.requires_grad for parameter in pipe.transformer.parameters())


@pytest.mark.parametrize("masks", [{}, {"a": "0111"}, {"a": "11"}, {"a": "1121"}, {"a": None}])
def test_masks_that_are_none(masks):
    with pytest.raises(ValueError, match="masks: expected"):
        Router((4.0, 3.0, 2.0, 1.0), masks)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"compute": 0}, ValueError, "compute: expected a finite number > 0"),
        ({"compute": 1.5}, ValueError, "compute: expected at most 1"),
        ({"compute": 0.1}, ValueError, "compute: expected at least 0.25 on 4 steps"),
        ({"compute": 0.4, "objective": "step"}, ValueError, "at least 0.5 on 4 steps"),
        ({"objective": "image"}, ValueError, "objective: expected 'final' or 'step'"),
        ({"iterations": 0}, ValueError, "iterations: expected at least 1"),
        ({"modules": "attn7"}, ValueError, "which matches none of"),
    ],
)
def test_errors(trained, change, error, said):
    pipe, _ = trained
    with pytest.raises(error, match=said):
        train_router(pipe, calls(), **change)
