"""Models whose samples go in and come out as lists (Z-Image): skipped steps are of the newest full
ones, in decisions of every kind; and other outputs in nested structures.
"""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import nn

import fewstep
from fewstep.caching import Dmd, EasyCache, Fora, Taylor, calibrate
from fewstep.caching.guided import rows_of
from patching.tiny_pipelines import randomize

STEPS, SIZE = 8, 16


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=16,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=8,
        axes_dims=[2, 4, 2],
        axes_lens=[64, 16, 16],
    ).eval()
    randomize(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    made = ZImagePipeline(scheduler, None, None, None, transformer)
    made.set_progress_bar_config(disable=True)
    return made


def given(batch=1, seed=0, guidance=2.0, steps=STEPS):
    generator = torch.Generator().manual_seed(100 + seed)
    texts = [torch.randn(4, 8, generator=generator) for _ in range(2 * batch)]
    return {
        "prompt_embeds": texts[:batch],
        "negative_prompt_embeds": texts[batch:],
        "guidance_scale": guidance,
        "num_inference_steps": steps,
        "height": SIZE,
        "width": SIZE,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(seed + i) for i in range(batch)],
    }


def run(pipe, **kwargs):
    return pipe(**given(**kwargs), return_dict=False)[0]


def by_hand(pipe, stands):
    """The pipeline with `stands(step, outputs so far)` for the model where that gives some."""
    model, forward, seen = pipe.transformer, pipe.transformer.forward, []

    def replaced(*args, **kwargs):
        found = stands(len(seen), seen)
        found = forward(*args, **kwargs)[0] if found is None else found
        seen.append(found)
        return (found,)

    model.forward = replaced
    image = run(pipe)
    del model.forward
    return image


def test_a_forecast_is_of_the_newest_full_steps(pipe):
    full = (0, 1, 4, 7)
    newest = [max(at for at in full if at <= step) for step in range(STEPS)]

    def reuse(step, seen):
        return None if step in full else list(seen[newest[step]])

    def line(step, seen):
        if step in full:
            return None
        one = newest[step]
        two = full[full.index(one) - 1]
        ahead = (step - one) / (one - two)
        pairs = zip(seen[one], seen[two], strict=True)
        return [a + ahead * (a - b) for a, b in pairs]

    for policy, stands in (
        (Fora(every=3, warmup=2), reuse),
        (Taylor(every=3, warmup=2, degree=1, clock="step"), line),
    ):
        want = by_hand(pipe, stands)
        with fewstep.patch(pipe, cache=policy) as patch:
            got = run(pipe)
            numbers = patch.report()["cache"]
        assert (numbers["full"], numbers["skipped"]) == (4, 4)
        assert numbers["snapshot_bytes"] > 0
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_easycache_looks_at_the_latents(pipe):
    plain = run(pipe)
    with fewstep.patch(pipe, cache=EasyCache(threshold=0)):
        assert torch.equal(run(pipe), plain)
    with fewstep.patch(pipe, cache=EasyCache(threshold=1e9, max_skips=2)) as patch:
        image = run(pipe)
        assert patch.report()["cache"]["skipped"] > 0
    assert image.isfinite().all()
    assert not torch.equal(image, plain)


def test_samples_have_decisions_of_their_own(pipe):
    """Guided and unguided samples share one list, and so do images."""
    policy = EasyCache(threshold=0.3)
    with fewstep.patch(pipe, cache=policy):
        both = run(pipe, batch=2)
        one = given(batch=2)
        for name in ("prompt_embeds", "negative_prompt_embeds", "generator"):
            one[name] = one[name][:1]
        one["generator"][0].manual_seed(0)
        torch.testing.assert_close(both[:1], pipe(**one, return_dict=False)[0])


def test_calibrated(pipe):
    calls = [given(seed=seed) for seed in (0, 1)]
    plan = calibrate(pipe, calls, full_steps=4, passes=1, guidance="auto")
    assert plan.guidance == ()  # the scheduler is given minus the guided sum
    plain = run(pipe)
    with fewstep.patch(pipe, cache=plan, verify=True) as patch:
        image = run(pipe)
        numbers = patch.report()["cache"]
    assert numbers["skipped"] == 4
    ((_, errors),) = numbers["measured_error"].items()
    assert {len(by_sample) for by_sample in errors.values()} == {2}  # guided and unguided
    with fewstep.patch(pipe, cache=Fora(every=3)):
        reused = run(pipe)
    assert (image - plain).norm() < (reused - plain).norm()


def test_half_of_a_batch_in_lists():
    listed = [torch.full((4, 3), float(i)) for i in range(4)]
    args, kwargs = rows_of(((listed,), {"t": torch.arange(4)}), slice(0, 2), 4, lists=True)
    assert [id(x) for x in args[0]] == [id(x) for x in listed[:2]]
    assert kwargs["t"].tolist() == [0, 1]
    assert [len(x) for x in rows_of(listed, slice(0, 2), 4)] == [2] * 4  # batches in a list


class Model(nn.Module):
    """Returns what `shape` makes of its output."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, timestep, latents):
        x = latents[0] if isinstance(latents, list) else latents
        return self.shape(x * (1 + timestep.float().mean() / 500) + 1)


def loop(model, policy, given):
    """Return the outputs of six steps."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    patch = fewstep.apply_cache(model, policy, scheduler=scheduler)
    scheduler.set_timesteps(6)
    outputs = []
    try:
        for time in scheduler.timesteps:
            outputs.append(model(time.expand(2), given))
            scheduler.step(torch.zeros(1), time, torch.zeros(1))
    finally:
        patch.undo()
    return outputs


def test_nested_outputs_are_those_of_the_newest_full_step():
    def nested(x):
        return {"a": [x, (2 * x, None)], "b": (3 * x[:1],), "c": [x, -x]}

    outputs = loop(Model(nested), Fora(every=3), torch.ones(2, 3, 4))
    for step in (1, 2, 4, 5):
        x = outputs[step - step % 3]["c"][0]
        got = outputs[step]
        assert got["a"][1][1] is None
        assert [type(got["a"]), type(got["a"][1])] == [list, tuple]
        pairs = [
            (got["a"][0], x),
            (got["a"][1][0], 2 * x),
            (got["b"][0], 3 * x[:1]),
            (got["c"][0], x),
            (got["c"][1], -x),
        ]
        for one, want in pairs:
            torch.testing.assert_close(one, want)
    assert not torch.equal(outputs[4]["c"][0], outputs[1]["c"][0])


@pytest.mark.parametrize(
    ("shape", "got"),
    [
        (lambda x: (x, 3), "a int"),
        (lambda x: [x, "name"], "a str"),
        (lambda x: (x, x > 0), r"one of torch\.bool"),
        (lambda x: (None,), "a tuple"),
    ],
)
def test_what_can_not_be_forecast_is_refused(shape, got):
    with pytest.raises(TypeError, match=f"returns tensors of floating point.*got {got}"):
        loop(Model(shape), Fora(every=3), torch.ones(2, 3, 4))


def test_samples_of_several_sizes():
    """Schedules serve them; what measures by sample says that it doesn't."""
    given = [torch.ones(2, 3), torch.ones(2, 4)]
    outputs = loop(Model(lambda x: [x, x[:, :2]]), Fora(every=3), given)
    assert [x.shape for x in outputs[1]] == [(2, 3), (2, 2)]
    torch.testing.assert_close(outputs[5], outputs[3])
    sizes = r"\[\[2, 3\], \[2, 4\]\]"
    for policy in (EasyCache(), Dmd(every=3, warmup=3)):
        with pytest.raises(ValueError, match=f"samples of .*{sizes}"):
            loop(Model(lambda x: [x, x[:, :2]]), policy, given)
