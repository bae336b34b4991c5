"""EasyCache and TeaCache: decisions by hand, exact where nothing is skipped, samples apart."""

import pytest
import torch

import fewstep
from fewstep.caching import PRESETS, EasyCache, FirstBlock, TeaCache
from fewstep.caching.accumulated import InputSession, Memory
from patching.tiny_pipelines import build, call, digits

STEPS = 8


def mean(x):
    return x.abs().mean().item()


def test_easycache_is_its_formula():
    """One sample of a pipeline, its trajectory replayed step by step."""
    pipe = digits(layers=2)
    policy = EasyCache(threshold=0.5, warmup=2)
    given = {"class_labels": [3], "guidance_scale": 1.0, "output_type": "latent"}
    model, inputs, outputs = pipe.transformer, [], []
    plain = model.forward
    with fewstep.patch(pipe, cache=policy) as patch:
        cached = model.forward

        def watch(x, *args, **kwargs):
            out = cached(x, *args, **kwargs)
            inputs.append((x, args, kwargs))
            outputs.append(out.sample if hasattr(out, "sample") else out[0])
            return out

        model.forward = watch
        pipe(**given, num_inference_steps=12, generator=torch.Generator().manual_seed(0))
        model.forward = cached
        (decisions,) = patch.report()["cache"]["branches"].values()
    assert model.forward == plain
    assert 2 <= decisions.count("skip") < 10
    full, before, gain, error = None, None, None, 0.0
    for step, (x, args, kwargs) in enumerate(inputs):
        expected = "full"
        if 2 <= step < 11:
            error += gain * mean(x - inputs[step - 1][0]) / mean(outputs[full])
            expected = "skip" if error < 0.5 else "full"
        assert decisions[step] == expected
        if expected == "skip":
            want = outputs[full] + (x - inputs[full][0])
            assert torch.equal(outputs[step], want)
            continue
        with torch.no_grad():
            assert torch.equal(outputs[step], plain(x, *args, **kwargs)[0])
        full, before, error = step, full, 0.0
        if before is not None:
            moved = mean(x - inputs[before][0])
            gain = mean(outputs[full] - outputs[before]) / moved


def test_teacache_sums_its_polynomial():
    memory = Memory(torch.tensor([[2.0, 2.0], [4.0, 4.0]]), torch.zeros(2))
    entry = torch.tensor([[3.0, 2.0], [4.0, 4.0]])  # changed by 1/4 and by nothing
    assert TeaCache().increment(memory, entry).tolist() == [0.25, 0]
    policy = TeaCache(coefficients=(2.0, 3.0, 0.5))
    assert policy.increment(memory, entry).tolist() == [0.125 + 0.75 + 0.5, 0.5]


@pytest.mark.parametrize("name", ["digits", "flux", "sana", "sd-unet"])
@pytest.mark.parametrize("kind", [EasyCache, TeaCache])
def test_on_pipelines(name, kind):
    pipe = build(name)
    plain = call(pipe, num_inference_steps=STEPS)
    with fewstep.patch(pipe, cache=kind(threshold=0.0)) as patch:
        assert torch.equal(call(pipe, num_inference_steps=STEPS), plain)
        assert patch.report()["cache"]["skipped"] == 0
    with fewstep.patch(pipe, cache=kind(threshold=1e9, max_skips=2, warmup=2)) as patch:
        image = call(pipe, num_inference_steps=STEPS)
        for decisions in patch.report()["cache"]["branches"].values():
            if len(decisions) == STEPS:  # PNDM evaluates its second step twice
                assert "".join(d[0] for d in decisions) == "ffssfssf"
        assert image.isfinite().all()
        call(pipe, num_inference_steps=5, seed=3)
        assert torch.equal(call(pipe, num_inference_steps=STEPS), image)
    assert torch.equal(call(pipe, num_inference_steps=STEPS), plain)


class Dice(EasyCache):
    def small_change(self, change):
        return (change * 1e5).long() % 3 != 0


class TeaDice(TeaCache):
    small_change = Dice.small_change


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("kind", [Dice, TeaDice])
def test_batch_mates_change_no_bit(kind, guidance):
    pipe = digits(layers=2)
    noise = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    batches = [noise[[0, 0, 0]], noise, torch.cat([noise[:1], noise[1:] * 9])]
    images, blended = [], 0
    with fewstep.patch(pipe, cache=kind(warmup=2)) as patch:
        for latents in batches:
            given = {"latents": latents, "num_inference_steps": 12, "guidance_scale": guidance}
            images.append(pipe([4, 4, 4], output_type="latent", **given).images[0])
            blended += patch.report()["cache"]["blended"]
    assert blended > 0
    assert torch.equal(images[1], images[0])
    assert torch.equal(images[2], images[0])


class BlockDice(FirstBlock):
    small_change = Dice.small_change


@pytest.mark.parametrize("kind", [Dice, BlockDice])
def test_guidance_passes_share_decisions_and_have_a_state_each(kind):
    """A pass that runs alone, once the other is dropped, decides by what it has summed up."""
    pipe = digits(layers=2)

    def drop(pipe, step, timestep, values):
        if step == 9:
            pipe._guidance_scale = 1.0
        return values

    given = {"num_inference_steps": 16, "guidance_scale": 2.0, "seed": 2}
    with fewstep.patch(pipe, cache=kind(warmup=2)) as patch:
        call(pipe, **given)
        first, second = patch.report()["cache"]["branches"].values()
        assert first == second
        assert {"full", "skip"} == set(first[2:-1])
        assert call(pipe, callback_on_step_end=drop, **given).isfinite().all()
        lengths = sorted(map(len, patch.report()["cache"]["branches"].values()))
        assert lengths == [10, 16]


@pytest.mark.parametrize("name", ["easycache", "teacache"])
def test_an_exception_leaves_nothing_behind(name):
    pipe = digits(layers=2)
    with fewstep.patch(pipe, cache=PRESETS[name](threshold=0.5, warmup=2)) as patch:
        image = call(pipe, num_inference_steps=STEPS)
        assert patch.report()["cache"]["skipped"] > 0

        def stop(pipe, step, timestep, values):
            if step == 4:
                raise KeyboardInterrupt
            return values

        with pytest.raises(KeyboardInterrupt):
            call(pipe, seed=5, num_inference_steps=STEPS, callback_on_step_end=stop)
        assert torch.equal(call(pipe, num_inference_steps=STEPS), image)


@pytest.mark.parametrize("name", ["easycache", "teacache"])
def test_gradients_are_never_cut_off(name):
    pipe = digits(layers=2)
    model = pipe.transformer
    with fewstep.patch(pipe, cache=PRESETS[name](threshold=1e9, warmup=2)) as patch:
        pipe.scheduler.set_timesteps(sigmas=[1 - i / STEPS for i in range(STEPS)])
        x = torch.randn(1, 1, 16, 16, requires_grad=True)
        for time in pipe.scheduler.timesteps:
            out = model(x, timestep=time.reshape(1), class_labels=torch.tensor([3])).sample
            (gradient,) = torch.autograd.grad(out.sum(), x)
            assert gradient.abs().sum() > 0
            pipe.scheduler.step(out.detach(), time, x.detach())
        assert patch.report()["cache"]["skipped"] == 0
        assert patch.report()["cache"]["why_full"]["gradients wanted"] == STEPS


def test_an_output_that_is_written_to_changes_no_forecast():
    pipe = digits(layers=2)
    images = []
    for spoil in (False, True):
        with fewstep.patch(pipe, cache=EasyCache(threshold=0.5, warmup=2)) as patch:
            step = pipe.scheduler.step

            def write(output, timestep, sample, *args, step=step, spoil=spoil, **kwargs):
                result = step(output, timestep, sample, *args, **kwargs)
                if spoil:
                    output.fill_(torch.nan)
                return result

            pipe.scheduler.step = write
            images.append(call(pipe, num_inference_steps=STEPS, guidance_scale=1.0))
            del pipe.scheduler.step
            assert patch.report()["cache"]["skipped"] > 0
    assert torch.equal(*images)


def test_an_output_unlike_the_input_is_refused():
    pipe = build("pixart")
    refused = pytest.raises(ValueError, match="output has the shape of its input")
    with fewstep.patch(pipe, cache="easycache"), refused:
        call(pipe, num_inference_steps=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EasyCache(threshold=-1), "threshold: expected a finite number >= 0"),
        (lambda: EasyCache(warmup=0), "warmup: expected at least 1, got 0"),
        (lambda: TeaCache(max_skips=-1), "max_skips: expected at least 0, got -1"),
        (lambda: TeaCache(coefficients=()), "coefficients: expected at least one"),
        (lambda: TeaCache(coefficients=(float("nan"),)), "coefficients: expected a finite number"),
        (lambda: TeaCache(first=0), "first: expected at least 1, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("coefficients", [("a",), "12", (True,), 1.0])
def test_coefficients_that_are_no_numbers_are_named(coefficients):
    with pytest.raises(TypeError, match="coefficients: expected numbers, got"):
        TeaCache(coefficients=coefficients)


def test_policies_bring_their_session():
    assert EasyCache().session is TeaCache().session is InputSession
