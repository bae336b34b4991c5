"""time="cache" on pipelines: the same bits, fewer evaluations.

test_time_weights.py and test_time_device.py hold that nothing is used that has changed.
"""

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import fewstep
from fewstep.caching import timestep
from fewstep.patching import PatchError
from patching.snapshot import snapshot
from patching.timed import STEPS, evaluations, kept, run
from patching.tiny_pipelines import BUILDERS, build, call, denoiser, digits

ALL = sorted(BUILDERS)


@pytest.mark.parametrize("name", ALL)
def test_the_same_bits_and_one_evaluation_per_step(name):
    pipe = build(name)
    plain = [run(pipe, seed=0), run(pipe, seed=1, batch=2)]
    keys = list(denoiser(pipe).state_dict())
    with fewstep.patch(pipe, time="cache") as patch:
        assert torch.equal(run(pipe, seed=0), plain[0])
        once = patch.report()["time"]
        assert once["evaluated"] > 0
        assert once["bytes"] > 0
        for _ in range(2):
            assert torch.equal(run(pipe, seed=0), plain[0])
            assert torch.equal(run(pipe, seed=1, batch=2), plain[1])
        # A batch of another size has values of its own.
        assert evaluations(patch) == 2 * once["evaluated"]
        assert patch.report()["time"]["not_kept"] == {}
        assert list(denoiser(pipe).state_dict()) == keys
        assert "evaluations" in patch.explain()
    assert torch.equal(run(pipe, seed=0), plain[0])


def test_bfloat16_and_other_grids():
    pipe = build("digits")
    pipe.to(torch.bfloat16)
    plain = {n: call(pipe, num_inference_steps=n) for n in (2, 3)}
    with fewstep.patch(pipe, time="cache") as patch:
        for n in (2, 3, 2, 3):
            assert torch.equal(call(pipe, num_inference_steps=n), plain[n])
        assert evaluations(patch) <= 5 * 8  # 2 + 3 times of 4 blocks' two modules


def test_with_low_bit_layers_steps_and_a_cache_in_any_order(monkeypatch):
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)
    pipe = build("sd-unet")
    before = snapshot(pipe)
    others = {"steps": STEPS, "quantize": "w8a8", "cache": "interval"}
    other = fewstep.patch(pipe, **others)
    plain = run(pipe)
    with fewstep.patch(pipe, time="cache") as patch:
        assert torch.equal(run(pipe), plain)
        assert torch.equal(run(pipe), plain)
        assert patch.report()["time"]["saved"] > 0
        other.undo()
        exact = run(pipe)
        other = fewstep.patch(pipe, **others)
        assert torch.equal(run(pipe), plain)
    assert torch.equal(run(pipe), plain)
    other.undo()
    assert torch.equal(run(pipe), exact)
    assert snapshot(pipe)["modules"] == before["modules"]


@pytest.mark.parametrize("name", ["digits", "sana"])
def test_training_gradients_hooks_and_modes_stay_out(name):
    pipe = build(name)
    model, module = denoiser(pipe), kept(pipe, name)
    seen = []
    with fewstep.patch(pipe, time="cache") as patch:
        plain = run(pipe)

        def none_saved(reason):
            before = patch.report()["time"]["saved"]
            assert torch.equal(run(pipe), plain)
            report = patch.report()["time"]
            assert reason in report["not_kept"], report
            return report["saved"] - before

        inner = next(part for part in module.modules() if isinstance(part, nn.Linear))
        handle = inner.register_forward_hook(lambda *_: seen.append(1))
        none_saved("a module in it has hooks")
        assert len(seen) >= STEPS
        handle.remove()
        module.train()
        none_saved("it is in training")
        module.eval()
        with torch.inference_mode():
            assert none_saved("inference mode") == 0
        with torch.overrides.BaseTorchFunctionMode():
            assert none_saved("a torch function mode is on") == 0
        with torch.device("cpu"):
            before = patch.report()["time"]["saved"]
            assert torch.equal(run(pipe), plain)
            assert patch.report()["time"]["saved"] > before
    if name == "digits":
        with fewstep.patch(pipe, time="cache") as patch:
            run(pipe)
            out = model(torch.zeros(1, 1, 16, 16), torch.ones(1), torch.tensor([1])).sample
            out.sum().backward()
            assert next(module.parameters()).grad is not None
            assert "gradients are enabled" in patch.report()["time"]["not_kept"]


def test_derivatives_in_time_are_exact():
    pipe = build("digits")
    x, labels = torch.randn(1, 1, 16, 16), torch.tensor([1])

    def tangent():
        def f(t):
            return pipe.transformer(x, t, labels).sample

        with torch.no_grad():
            return fewstep.jvp(f, (torch.ones(1),), (torch.ones(1),))[1]

    expected = tangent()
    with fewstep.patch(pipe, time="cache"), torch.no_grad():
        pipe.transformer(x, torch.ones(1), labels)
        assert torch.equal(tangent(), expected)
        assert expected.abs().max() > 0


def test_autocast_and_other_dtypes_have_values_of_their_own():
    pipe = build("sd-unet")
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16)

    def evaluate(autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return pipe.unet(x, 3, text).sample

    plain = {flag: evaluate(flag) for flag in (False, True)}
    with fewstep.patch(pipe, time="cache"):
        for flag in (False, True, False, True):
            assert torch.equal(evaluate(flag), plain[flag])


def test_outside_of_the_denoiser_and_after_an_exception_no_time_is_known():
    pipe = build("digits")
    module = kept(pipe, "digits")
    x = torch.randn(1, 256)
    with torch.no_grad():
        plain = module(x)

        def fail(*_):
            raise RuntimeError("stop")

        with fewstep.patch(pipe, time="cache"):
            run(pipe)
            assert torch.equal(module(x), plain)
            handle = pipe.transformer.proj_out_2.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="stop"):
                run(pipe)
            handle.remove()
            assert torch.equal(module(x), plain)


def test_memory_is_bounded_and_steps_that_come_again_stay(monkeypatch):
    pipe = build("digits")
    plain = run(pipe)
    with fewstep.patch(pipe, time="cache") as patch:
        run(pipe)
        room = patch.report()["time"]["bytes"]
        session = patch._changes[0]._session
        session.max_bytes = 2 * room // 3
        session.forget()
        for _ in range(3):
            assert torch.equal(run(pipe), plain)
        report = patch.report()["time"]
        assert 0 < report["bytes"] <= session.max_bytes
        assert report["not_kept"]["max_bytes reached"] > 0
        before = report["saved"]
        run(pipe)
        assert patch.report()["time"]["saved"] - before >= 8 * 2  # two of three steps
        # What has not come for long makes room.
        monkeypatch.setattr(timestep, "_PATIENCE", 0)
        call(pipe, num_inference_steps=2)
        assert patch.report()["time"]["bytes"] <= session.max_bytes
        saved = patch.report()["time"]["saved"]
        call(pipe, num_inference_steps=2)
        assert patch.report()["time"]["saved"] > saved


def test_what_text_enters_is_not_kept():
    from diffusers import UNet2DConditionModel

    pipe = build("sd-unet")
    pipe.unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 24,
        time_cond_proj_dim=6,
    ).eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 6, 16)
    inputs = [(torch.randn(1, 8), torch.randn(1, 6)) for _ in range(2)]

    @torch.no_grad()
    def evaluate(pooled, guidance):
        added = {"text_embeds": pooled, "time_ids": torch.arange(6.0)[None]}
        options = {"added_cond_kwargs": added, "timestep_cond": guidance}
        return pipe.unet(x, torch.tensor(3), text, **options).sample

    plain = [evaluate(*given) for given in inputs]
    with fewstep.patch(pipe, time="cache") as patch:
        for _ in range(2):
            for given, expected in zip(inputs, plain, strict=True):
                assert torch.equal(evaluate(*given), expected)
        report = patch.report()["time"]
    assert report["evaluated"] == 1 + 2  # time_proj, and time_embedding per guidance
    assert report["saved"] == 5


def test_compiled_models_trace_the_modules_as_they_are():
    """Whole: nothing of it is in the graph. Its blocks: one graph for all, as without the patch."""
    pipe = digits(layers=3)
    pipe.set_progress_bar_config(disable=True)
    given = (torch.randn(1, 1, 16, 16), torch.ones(1), torch.tensor([1]))
    frames = []
    with torch.no_grad():
        expected = pipe.transformer(*given).sample
        for patched in (False, True):
            twin = copy.deepcopy(pipe)
            patch = fewstep.patch(twin, **({"time": "cache"} if patched else {"steps": 2}))
            counter = CompileCounter()
            for block in twin.transformer.transformer_blocks:
                block.compile(backend=counter, fullgraph=True)
            assert torch.equal(twin.transformer(*given).sample, expected)
            frames.append(counter.frame_count)
            torch._dynamo.reset()
        assert frames[0] == frames[1] <= 2
        patch = fewstep.patch(pipe, time="cache")
        whole = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
        assert torch.equal(whole(*given).sample, expected)
        assert patch.report()["time"]["evaluated"] == 0
        patch.undo()
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    with pytest.raises(ValueError, match="time: expected an uncompiled model"):
        fewstep.patch(pipe, time="cache")


def test_compiled_blocks_around_it():
    pipe = build("pixart")
    with fewstep.patch(pipe, time="cache") as patch:
        plain = run(pipe)
        for block in pipe.transformer.transformer_blocks:
            block.compile(backend="eager", fullgraph=True)
        before = evaluations(patch)
        assert torch.equal(run(pipe), plain)
        assert evaluations(patch) == before
        torch._dynamo.reset()


def test_copies_and_pickles_have_values_of_their_own():
    pipe = build("digits")
    patch = fewstep.patch(pipe, time="cache")
    plain = run(pipe)
    twin = copy.deepcopy(pipe)
    file = io.BytesIO()
    torch.save(pipe.transformer, file)
    file.seek(0)
    loaded = type(pipe)(torch.load(file, weights_only=False), pipe.scheduler, default_guidance=2.0)
    loaded.set_progress_bar_config(disable=True)
    before = patch.report()
    for other in (twin, loaded):
        part = kept(other, "digits").__dict__["_fewstep_time"]
        assert part.module is kept(other, "digits")
        assert part.session is not kept(pipe, "digits").__dict__["_fewstep_time"].session
        assert torch.equal(run(other), plain)
        assert torch.equal(run(other), plain)
        assert part.session.report()["saved"] > 0
        with pytest.raises(PatchError, match="a copy of such a one"):
            fewstep.patch(other, time="cache")
        with torch.no_grad():
            for parameter in denoiser(other).parameters():
                parameter.zero_()
        assert not torch.equal(run(other), plain)
    assert patch.report() == before
    assert torch.equal(run(pipe), plain)
    patch.undo()


def test_undo_below_what_others_have_put_on_top():
    pipe = build("sana")
    plain = run(pipe)
    before = snapshot(pipe)["modules"]
    patch = fewstep.patch(pipe, time="cache")
    module = kept(pipe, "sana")
    ours = module.forward
    theirs = lambda *args, **kwargs: ours(*args, **kwargs)  # noqa: E731
    module.forward = theirs
    with pytest.raises(PatchError, match=r"pipe\.transformer\.time_embed\.forward"):
        patch.undo()
    patch.undo(force=True)
    assert torch.equal(run(pipe), plain)
    assert patch.report()["time"]["bytes"] == 0
    assert module.__dict__.pop("forward") is theirs
    assert snapshot(pipe)["modules"] == before


@pytest.mark.parametrize(
    ("value", "error"),
    [("once", ValueError), (True, TypeError), (3, TypeError), ("", ValueError)],
)
def test_bad_values(value, error):
    pipe = build("digits")
    before = snapshot(pipe)
    with pytest.raises(error, match="time: expected 'cache', got"):
        fewstep.patch(pipe, time=value)
    assert snapshot(pipe) == before


def test_a_denoiser_that_is_not_known_is_refused():
    pipe = build("digits")

    class Other(type(pipe.transformer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    pipe.transformer.__class__ = Other
    with pytest.raises(ValueError, match="time: expected a denoiser of diffusers, one of DiT"):
        fewstep.patch(pipe, time="cache")
