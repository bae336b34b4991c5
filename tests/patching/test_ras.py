"""Region-adaptive sampling on pipelines: exact where it must be, and what it refuses."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep.caching import Ras, token_stack
from fewstep.caching.token_session import TokenSession
from patching.tiny_pipelines import (
    BUILDERS,
    arguments,
    build,
    call,
    denoiser,
    digits,
    randomize,
)
from patching.tiny_pipelines import sd3 as small_sd3

STEPS = 7
SERVED = ["digits", "pixart", "sd3"]
POLICY = Ras(share=0.5, warmup=2, every=4)
DECISIONS = ["full", "full", "part", "part", "part", "full", "part"]


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


@pytest.fixture
def chosen(monkeypatch):
    """Return the indices of the tokens that entered the blocks, one tensor a partial pass."""
    found = []

    def gather(x, index):
        found.append(index.clone())
        return gathered(x, index)

    gathered = token_stack.token_gather
    monkeypatch.setattr(token_stack, "token_gather", gather)
    return found


def self_attention(block):
    return block.attn if hasattr(block, "attn") else block.attn1


def with_dual_attention():
    """Return a pipeline with SD3.5's blocks, with two self-attentions in one of them."""
    pipe = small_sd3()
    config = dict(pipe.transformer.config) | {"dual_attention_layers": (1,)}
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config).eval())
    randomize(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", [*SERVED, "sd3.5"])
def test_all_tokens_are_no_cache_to_the_bit(name, chosen):
    pipe = with_dual_attention() if name == "sd3.5" else build(name)
    plain = run(pipe, batch=2)
    policy = Ras(share=1.0, warmup=2, every=4)
    with fewstep.patch(pipe, cache=policy) as patch:
        assert torch.equal(run(pipe, batch=2), plain)
        assert all(x == DECISIONS for x in patch.report()["cache"]["branches"].values())
    assert chosen  # not because nothing was left to gather and scatter
    assert torch.equal(run(pipe, batch=2), plain)


@pytest.mark.parametrize("name", SERVED)
def test_partial_steps_run_a_share_of_the_tokens(name, chosen):
    pipe = build(name)
    plain = run(pipe)
    blocks = denoiser(pipe).transformer_blocks
    layers = {
        "to_q": self_attention(blocks[1]).to_q,
        "to_k": self_attention(blocks[1]).to_k,
        "feed-forward": blocks[1].ff.net[0].proj,
    }
    seen = {part: [] for part in layers}
    for part, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, x, rows=seen[part]: rows.append(x[0].shape[1]))
    with fewstep.patch(pipe, cache=POLICY) as patch:
        image = run(pipe)
        numbers = patch.report()["cache"]
        assert torch.equal(run(pipe), image)  # a second image starts anew
    tokens = max(seen["to_q"])
    expected = [tokens if x == "full" else tokens // 2 for x in DECISIONS]
    passes = len(numbers["branches"])
    for rows in seen.values():
        assert rows[: STEPS * passes : passes] == expected
    assert numbers["full"] == 3 * passes
    assert numbers["partly"] == 4 * passes
    assert numbers["skipped"] == 0
    rows = sum(2 * self_attention(block).to_k.out_features for block in blocks) * tokens
    rows *= len(image) if name == "digits" else 2 * len(image)  # the passes are one batch
    outputs = numbers["snapshot_bytes"] - 4 * passes * rows
    assert image.nbytes <= outputs <= 4 * image.nbytes  # of two passes, and PixArt's variance
    assert numbers["why_full"] == {"scheduled": 3 * passes}
    assert image.isfinite().all()
    assert not torch.equal(image, plain)
    assert torch.equal(run(pipe), plain)
    assert not any("forward" in module.__dict__ for module in denoiser(pipe).modules())


def drive(pipe, inputs, timestep, start=0):
    """Return the model's outputs for a run of inputs [B, 1, 16, 16] at one time.

    Args:
        start: the run's first step on its grid.
    """
    outputs = []
    pipe.scheduler.set_timesteps(start + len(inputs))
    for index, x in enumerate(inputs, start):
        pipe.scheduler._step_index = index
        with torch.no_grad():
            labels = torch.zeros(len(x), dtype=torch.long)
            time = torch.full((len(x),), timestep)
            outputs.append(pipe.transformer(x, time, class_labels=labels).sample)
    return outputs


def test_constant_input_is_constant_output():
    pipe = digits()
    x = torch.randn(2, 1, 16, 16)
    with fewstep.patch(pipe, cache=Ras(share=0.3, warmup=1, every=9)):
        first, *others = drive(pipe, [x] * 6, 500.0)
    for output in others:
        # Products of other sizes sum in another order.
        torch.testing.assert_close(output, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))


def test_one_block_sees_old_and_new_tokens_side_by_side(chosen):
    """At one time, one block on a share of the tokens is the block on tokens of both inputs."""
    pipe = digits(layers=1)
    old, new = torch.randn(2, 2, 1, 16, 16)
    with fewstep.patch(pipe, cache=Ras(share=0.25, warmup=1, every=9)):
        before, after = drive(pipe, [old, new, new], 300.0)[:2]
    fresh = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, chosen[0], True)
    fresh = fresh.view(2, 1, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    (mixed,) = drive(pipe, [torch.where(fresh, new, old)], 300.0)
    assert torch.equal(after[~fresh], before[~fresh])
    assert not torch.equal(after[fresh], before[fresh])
    torch.testing.assert_close(after[fresh], mixed[fresh], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_batch_mates_change_no_bit(name):
    pipe = build(name)
    shape = (1, 1, 16, 16) if name == "digits" else (1, 4, 8, 8)
    generator = torch.Generator().manual_seed(7)
    mine, quiet, wild = (
        size * torch.randn(shape, generator=generator) for size in (1.0, 1.0, 30.0)
    )
    with fewstep.patch(pipe, cache=POLICY):
        images = [
            run(pipe, batch=2, latents=torch.cat([mine, mate]))[0] for mate in (mine, quiet, wild)
        ]
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@pytest.mark.parametrize("name", ["digits", "sd3"])
def test_guidance_passes_compute_the_same_tokens(name, chosen):
    """Digits call twice a step, SD3 joins the passes in one batch."""
    pipe = build(name)
    with fewstep.patch(pipe, cache=POLICY):
        run(pipe, batch=2)
    if name == "digits":
        guided, unguided = chosen[::2], chosen[1::2]
    else:
        guided, unguided = zip(*(index.chunk(2) for index in chosen), strict=True)
    assert len(guided) == DECISIONS.count("part")
    for a, b in zip(guided, unguided, strict=True):
        assert torch.equal(a, b)
    assert not all(torch.equal(index[0], index[1]) for index in guided)  # samples are their own


def test_nobody_starves(chosen):
    """Tokens take turns where being left out counts for more than what they look like."""
    pipe = build("digits")
    for starvation, in_turn in ((0.0, False), (50.0, True)):
        chosen.clear()
        policy = Ras(share=0.25, warmup=1, every=20, starvation=starvation)
        with fewstep.patch(pipe, cache=policy):
            run(pipe, guidance_scale=1.0)
        times = torch.cat(chosen, 1).flatten().bincount(minlength=64)
        assert bool(times.max() - times.min() <= 1) is in_turn


class NothingRead(TorchDispatchMode):
    """Raises where a value of a tensor is wanted on the host, or a shape depends on one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        )
        return func(*args, **(kwargs or {}))


def test_the_host_reads_nothing(monkeypatch):
    for name in ("enter", "keep_output"):
        method = getattr(TokenSession, name)

        def watched(*args, method=method):
            with NothingRead():
                return method(*args)

        monkeypatch.setattr(TokenSession, name, watched)
    for name in ("digits", "sd3"):
        pipe = build(name)
        with fewstep.patch(pipe, cache=POLICY):
            run(pipe, batch=2)


@pytest.mark.parametrize("name", SERVED)
def test_an_exception_leaves_no_state(name):
    pipe = build(name)

    class Stop(Exception):
        pass

    def stop(*_):
        nonlocal left
        left -= 1
        if not left:
            raise Stop

    with fewstep.patch(pipe, cache=POLICY):
        image = run(pipe)
        left = 2 * STEPS // 3 if name == "digits" else 4
        handle = denoiser(pipe).transformer_blocks[1].register_forward_pre_hook(stop)
        with pytest.raises(Stop):
            run(pipe)
        handle.remove()
        assert torch.equal(run(pipe), image)


def test_another_shape_or_gradients_run_in_full():
    pipe = build("digits")
    with fewstep.patch(pipe, cache=POLICY) as patch:
        x = torch.randn(3, 1, 16, 16)
        drive(pipe, [x, x, x[:2], x[:2]], 500.0)
        assert patch.report()["cache"]["why_full"]["shape changed"] == 1
        labels, time = torch.zeros(3, dtype=torch.long), torch.full((3,), 500.0)
        pipe.scheduler.set_timesteps(4)
        for index in range(4):
            pipe.scheduler._step_index = index
            output = pipe.transformer(x, time, class_labels=labels).sample
        output.sum().backward()
        numbers = patch.report()["cache"]
    assert numbers["partly"] == 0
    assert numbers["why_full"]["gradients wanted"] > 0


def test_a_copy_of_a_patched_pipeline_stands_alone():
    pipe = build("digits")
    plain = run(pipe)
    with fewstep.patch(pipe, cache=POLICY):
        image, twin = run(pipe), copy.deepcopy(pipe)
        assert torch.equal(run(twin), image)
    assert torch.equal(run(pipe), plain)
    assert torch.equal(run(twin), image)


def test_quantized_layers_run_a_share_of_the_tokens():
    pipe = build("digits")
    fewstep.quantize(pipe.transformer, "w8a8", skip=lambda name, layer: None)
    plain = run(pipe)
    with fewstep.patch(pipe, cache=Ras(share=1.0, warmup=2, every=4)):
        assert torch.equal(run(pipe), plain)
    with fewstep.patch(pipe, cache=POLICY) as patch:
        assert run(pipe).isfinite().all()
        assert patch.report()["cache"]["partly"] > 0


def test_an_adapter_loaded_later_runs_in_full():
    peft = pytest.importorskip("peft")
    pipe = build("sd3")
    with fewstep.patch(pipe, cache=POLICY) as patch:
        config = peft.LoraConfig(r=2, target_modules=["attn.to_k"], init_lora_weights=False)
        pipe.transformer.add_adapter(config)
        image = run(pipe)
        assert patch.report()["cache"]["why_full"]["other projections"] == 4
    assert torch.equal(run(pipe), image)


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - set(SERVED)))
def test_models_that_tokens_cannot_be_taken_out_of(name):
    pipe = build(name)
    plain = run(pipe)
    reason = {
        "flux": "an argument `image_rotary_emb` in block 0 of FluxTransformer2DModel",
        "sana": "a Conv2d at `ff.conv_inverted` in block 0 of SanaTransformer2DModel",
    }.get(name, "a transformer for scope 'tokens', got UNet2D")
    with pytest.raises(ValueError, match=reason):
        fewstep.patch(pipe, cache="ras")
    assert torch.equal(run(pipe), plain)


def test_a_run_of_a_grids_last_steps_has_a_warm_up_of_its_own():
    pipe = digits()
    with fewstep.patch(pipe, cache=POLICY) as patch:
        drive(pipe, [torch.randn(2, 1, 16, 16)] * STEPS, 500.0, start=5)
        assert patch.report()["cache"]["branches"] == {"call 0": DECISIONS}


def test_perturbed_guidance_keeps_every_step_dense():
    """Its processors project the perturbed samples apart, and give them no others' keys."""
    from diffusers import StableDiffusion3PAGPipeline

    parts = dict(build("sd3").components)
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    pipe.set_progress_bar_config(disable=True)
    given = arguments(build("sd3")) | {"pag_scale": 3.0}

    def image():
        options = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
        return pipe(**given, **options, generator=torch.Generator().manual_seed(0))[0]

    plain = image()
    with fewstep.patch(pipe, cache=POLICY) as patch:
        assert torch.equal(image(), plain)
        numbers = patch.report()["cache"]
    assert numbers["partly"] == 0
    assert numbers["why_full"]["keys and values in parts"] > 0
    assert numbers["why_full"]["nothing kept"] == DECISIONS.count("part")


def test_fused_projections_are_refused():
    pipe = build("sd3")
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match="fused projections at `attn`"):
        fewstep.patch(pipe, cache=POLICY)
