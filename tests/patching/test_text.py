"""text="cache" on pipelines: the same bits, one evaluation per run and guidance pass."""

import copy
import pickle

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler
from torch import nn

import fewstep
from fewstep.caching import TextPart, text
from fewstep.patching import PatchError
from patching.snapshot import snapshot
from patching.tiny_pipelines import build, call, denoiser, randomize

STEPS = 3
# Guidance passes that are calls of their own, each with values of its own.
PASSES = {"flux": 2, "sd3": 1, "sana": 1, "pixart": 1, "sd-unet": 1}


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


def seen(patch):
    report = patch.report()["text"]
    return report["evaluated"], report["saved"]


@pytest.mark.parametrize("name", PASSES)
def test_the_same_bits_and_one_evaluation_per_run(name):
    pipe = build(name)
    plain = [run(pipe, seed=0), run(pipe, seed=1, batch=2)]
    before = snapshot(pipe)
    with fewstep.patch(pipe, text="cache") as patch:
        parts = [m for m in denoiser(pipe).modules() if TextPart.is_on(m)]
        assert torch.equal(run(pipe, seed=0), plain[0])
        calls = len(parts) * PASSES[name]
        assert seen(patch)[0] == calls
        assert seen(patch)[1] >= calls * (STEPS - 1)  # PNDM takes a step twice
        assert torch.equal(run(pipe, seed=1, batch=2), plain[1])
        assert seen(patch)[0] == 2 * calls
        report = patch.report()["text"]
        assert report["not_kept"] == {}
        assert report["most_bytes"] > 0
        assert (report["values"], report["bytes"]) == (0, 0)  # gone with the last step or prompt
        assert "evaluations" in patch.explain()
    assert torch.equal(run(pipe, seed=0), plain[0])
    assert snapshot(pipe)["modules"] == before["modules"]


def test_wan_through_its_text_embedder_and_norms():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=2,
    ).eval()
    randomize(transformer)
    parts = {"tokenizer": None, "text_encoder": None, "vae": None, "transformer": transformer}
    pipe = WanPipeline(**parts, scheduler=FlowMatchEulerDiscreteScheduler(), transformer_2=None)
    pipe.set_progress_bar_config(disable=True)

    def clip():
        given = {"height": 16, "width": 16, "num_frames": 1, "num_inference_steps": STEPS}
        embeds = [torch.randn(1, 6, 16, generator=torch.manual_seed(i)) for i in (1, 2)]
        given |= {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1]}
        return pipe(generator=torch.manual_seed(0), output_type="latent", **given).frames

    plain = clip()
    with fewstep.patch(pipe, text="cache") as patch:
        assert torch.equal(clip(), plain)
        modules = 1 + 2 * 3  # the embedder; keys, values and the norm of keys of two blocks
        assert seen(patch) == (2 * modules, 2 * modules * (STEPS - 1))


@pytest.fixture
def pixart():
    pipe = build("pixart")
    with fewstep.patch(pipe, text="cache") as patch:
        yield pipe, patch


def part_of(pipe):
    return pipe.transformer.transformer_blocks[1].attn2.to_k


def between(change):
    """Have something done between the first two steps of a run."""

    def callback(pipe, index, timestep, given):
        if index == 0:
            change(given)
        return given

    return {"callback_on_step_end": callback}


def _kept_values(module):
    part = module.__dict__.get("_fewstep_text")
    for kept in part.kept if part else ():
        kept.value.mul_(0)


CHANGES = {
    "a weight": lambda module: module.weight.mul_(1.5),
    "another weight": lambda module: setattr(module, "weight", nn.Parameter(2 * module.weight)),
    "a kept value": _kept_values,
}


@pytest.mark.parametrize("what", CHANGES)
def test_nothing_is_used_that_was_written_to(what):
    outputs = []
    for patched in (False, True):
        pipe = build("sd-unet")
        module = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
        handle = fewstep.patch(pipe, text="cache") if patched else None
        with torch.no_grad():
            outputs.append(run(pipe, **between(lambda given, m=module: CHANGES[what](m))))
        if handle:
            assert seen(handle)[1] > 0
    assert torch.equal(*outputs)


def test_embeddings_written_to_in_mid_run_are_seen():
    def halve(given):
        given["prompt_embeds"].mul_(0.5)

    outputs = []
    for patched in (False, True):
        pipe = build("sd-unet")
        handle = fewstep.patch(pipe, text="cache") if patched else None
        inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        outputs.append(run(pipe, **between(halve), **inputs))
        if handle:
            evaluated, saved = seen(handle)
            assert evaluated == 2 * len(handle._changes[0]._session.parts)
            assert saved > 0
    assert torch.equal(*outputs)


def test_a_new_run_sees_what_no_version_tells():
    pipe = build("sd-unet")
    handle = fewstep.patch(pipe, text="cache")
    run(pipe)
    for parameter in pipe.unet.parameters():
        parameter.data.mul_(0.9)
    got = run(pipe)
    handle.undo()
    assert torch.equal(run(pipe), got)


def test_an_input_that_changes_at_every_step_is_left_alone(pixart):
    pipe, patch = pixart
    model = pipe.transformer
    forward = type(model).forward

    def fresh(self, *args, encoder_hidden_states, **kwargs):
        return forward(self, *args, encoder_hidden_states=encoder_hidden_states.clone(), **kwargs)

    session = patch._changes[0]._session
    model.__dict__["forward"] = fresh.__get__(model)
    call(pipe, num_inference_steps=12)
    del model.__dict__["forward"]
    report = patch.report()["text"]
    assert report["saved"] == 0
    assert report["evaluated"] == text._PATIENCE * len(session.parts)
    assert report["not_kept"]["another input at every step"] > 0
    assert report["bytes"] == 0
    assert not any(part.kept for part in session.parts)


def test_low_bit_layers_of_the_same_patch_are_the_ones_kept(monkeypatch):
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)
    pipe = build("pixart")
    before = snapshot(pipe)
    with fewstep.patch(pipe, quantize="w8a8"):
        plain = run(pipe)
    with fewstep.patch(pipe, quantize="w8a8", text="cache", time="cache", cache="fora") as patch:
        run(pipe)
        assert type(part_of(pipe)).__name__ == "W8A8Linear"
        assert TextPart.is_on(part_of(pipe))
    with fewstep.patch(pipe, quantize="w8a8", text="cache") as patch:
        assert torch.equal(run(pipe), plain)
        assert seen(patch)[1] > 0
    assert snapshot(pipe)["modules"] == before["modules"]


def test_gradients_hooks_training_and_other_calls_stay_out(pixart):
    pipe, patch = pixart
    module = part_of(pipe)
    x = torch.randn(1, 3, 16)
    assert torch.equal(module(x), type(module).forward(module, x))
    assert patch.report()["text"]["not_kept"] == {"outside of the denoiser": 1}
    evaluated = seen(patch)[0]
    module.train()
    run(pipe)
    assert patch.report()["text"]["not_kept"]["it is in training"] == STEPS
    assert seen(patch)[0] == evaluated + len(patch._changes[0]._session.parts) - 1
    module.eval()


def test_nothing_stays_after_an_exception():
    pipe = build("sd3")
    patch = fewstep.patch(pipe, text="cache")

    def fail(given):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pipe, **between(fail))
    assert patch.report()["text"]["most_bytes"] > 0
    assert patch.report()["text"]["values"] == 0


def test_the_most_bytes_are_a_limit(monkeypatch):
    monkeypatch.setattr(text.TextSession.__init__, "__defaults__", (100,))
    pipe = build("pixart")
    plain = run(pipe)
    with fewstep.patch(pipe, text="cache") as patch:
        assert torch.equal(run(pipe), plain)
        report = patch.report()["text"]
        assert report["saved"] == 0
        assert report["most_bytes"] <= 100
        assert report["not_kept"] == {"max_bytes reached": report["evaluated"]}


def test_copies_and_pickles_keep_values_of_their_own(pixart):
    pipe, _ = pixart
    plain = run(pipe)
    twin = copy.deepcopy(pipe)
    assert torch.equal(run(twin), plain)
    ours, theirs = part_of(pipe)._fewstep_text, part_of(twin)._fewstep_text
    assert ours.session is not theirs.session
    assert theirs.module is part_of(twin)
    loaded = pickle.loads(pickle.dumps(part_of(pipe)))
    assert loaded._fewstep_text.module is loaded
    x = torch.randn(1, 3, 16)
    assert torch.equal(loaded(x), part_of(pipe)(x))


def test_errors():
    pipe = build("pixart")
    with pytest.raises(TypeError, match="text: expected 'cache', got True"):
        fewstep.patch(pipe, text=True)
    with pytest.raises(ValueError, match="text: expected 'cache', got 'keep'"):
        fewstep.patch(pipe, text="keep")
    with pytest.raises(ValueError, match="got DiTTransformer2DModel without any"):
        fewstep.patch(build("digits"), text="cache")
    other = type(pipe)(**pipe.components)
    with (
        fewstep.patch(pipe, text="cache"),
        pytest.raises(PatchError, match="not yet patched with it"),
    ):
        fewstep.patch(other, text="cache")
