"""Forecasts per block and per layer on pipelines: exactness, undo, names, quantised layers."""

import pytest
import torch

import fewstep
from fewstep.caching import Fora, Newton, Taylor, find_modules
from fewstep.patching.norms import QuantizingNorm
from patching.tiny_pipelines import BUILDERS, Counter, arguments, build, call, denoiser

STEPS = 6
ALL = sorted(set(BUILDERS) - {"digits_student"})
# Blocks, and attention and feed-forward layers, of the tiny models.
COUNTS = {
    "digits": (4, 8),
    "flux": (4, 8),
    "pixart": (4, 12),
    "sana": (4, 12),
    "sd-unet": (7, 21),
    "sd3": (4, 11),
}


def run(pipe, **kwargs):
    return call(pipe, num_inference_steps=STEPS, **kwargs)


def runs_in(module):
    """A layer that runs when the module does."""
    layers = [part for part in module.modules() if isinstance(part, torch.nn.Linear)]
    return layers[-1] if layers else next(p for p in module.modules() if not list(p.children()))


@pytest.mark.parametrize("scope", ["block", "module"])
@pytest.mark.parametrize("name", ALL)
def test_skipped_steps_run_none_of_the_modules(name, scope):
    pipe = build(name)
    plain, model = run(pipe), denoiser(pipe)
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    with fewstep.patch(pipe, cache=Fora(every=1, scope=scope)) as patch:
        assert torch.equal(run(pipe), plain)
        assert patch.report()["cache"]["skipped"] == 0
    policy = Taylor(every=2, warmup=2, degree=1, scope=scope)
    attention = next(m for n, m in model.named_modules() if n.endswith(("attn", "attn1")))
    norm = next(m for n, m in model.named_modules() if n.endswith(("norm1", "norm3", "norm_out")))
    with Counter(norm, runs_in(attention)) as unpatched:
        run(pipe)
    with fewstep.patch(pipe, cache=policy) as patch:
        with Counter(norm, runs_in(attention)) as counter:
            image = run(pipe)
        numbers = patch.report()["cache"]
        count = COUNTS[name][scope == "module"]
        for branch, decisions in numbers["branches"].items():
            if len(decisions) == STEPS:  # PNDM evaluates its second step twice
                assert decisions == ["full", "full", "skip", "full", "skip", "full"]
                assert numbers["forecast_modules"][branch] == [0, 0, count, 0, count, 0]
        assert torch.equal(run(pipe), image)  # a second image starts anew
    share = numbers["full"] / (numbers["full"] + numbers["skipped"])
    assert counter.counts[1] == unpatched.counts[1] * share
    if scope == "module":  # norms run on every step
        assert counter.counts[0] == unpatched.counts[0]
    assert image.isfinite().all()
    assert not torch.equal(image, plain)
    assert {path: dict(vars(module)) for path, module in model.named_modules()} == before
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["flux", "sd3", "sd-unet"])
@pytest.mark.parametrize("snapshots", [None, "int8"])
def test_batch_mates_change_no_bit(name, snapshots):
    pipe = build(name)
    seen = []
    handle = denoiser(pipe).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].shape),
        with_kwargs=True,
    )
    call(pipe, num_inference_steps=1, batch=2)
    handle.remove()
    shape = (1, *seen[0][1:])
    generator = torch.Generator().manual_seed(7)
    mine, wild = (size * torch.randn(shape, generator=generator) for size in (1.0, 30.0))
    policy = Newton(every=2, warmup=2, degree=1, scope="module", snapshots=snapshots)
    with fewstep.patch(pipe, cache=policy):
        alone = run(pipe, batch=2, latents=torch.cat([mine, mine]))
        mixed = run(pipe, batch=2, latents=torch.cat([mine, wild]))
    assert torch.equal(alone[0], mixed[0])
    assert not torch.equal(alone[1], mixed[1])


@pytest.mark.parametrize("scope", ["block", "module"])
def test_guidance_passes_keep_apart(scope):
    """Where the guided pass gets what the unguided one gets, guidance does nothing."""
    pipe = build("flux")
    given = arguments(pipe)
    same = {
        "negative_prompt_embeds": given["prompt_embeds"],
        "negative_pooled_prompt_embeds": given["pooled_prompt_embeds"],
    }
    policy = Taylor(every=3, warmup=2, degree=1, scope=scope)
    with fewstep.patch(pipe, cache=policy) as patch:
        unguided = run(pipe, true_cfg_scale=1.0)
        guided = run(pipe, true_cfg_scale=2.0, **same)
        assert set(patch.report()["cache"]["branches"]) == {"cond", "uncond"}
        assert not torch.equal(run(pipe, true_cfg_scale=2.0), unguided)
    # u + 2 (c - u) with c = u to the bit.
    torch.testing.assert_close(guided, unguided, rtol=0, atol=0)


def test_under_autocast_a_block_gets_what_it_got():
    """Blocks return float32 for an input in bfloat16, and so do their forecasts."""
    pipe = build("pixart")
    seen = []
    blocks = denoiser(pipe).transformer_blocks
    for block in blocks:
        block.register_forward_pre_hook(lambda _, x: seen.append(x[0].dtype))
    with fewstep.patch(pipe, cache=Fora(every=2, scope="block")) as patch:
        with torch.autocast("cpu", torch.bfloat16):
            run(pipe)
        numbers = patch.report()["cache"]
    assert seen[: len(blocks)] == [torch.bfloat16] + [torch.float32] * (len(blocks) - 1)
    assert numbers["forecast_modules"] == {"call 0": [0, 4] * (STEPS // 2)}
    assert numbers["why_full"] == {"scheduled": STEPS // 2}
    assert numbers["why_part"] == {}


def test_layers_by_pattern_and_by_name():
    pipe = build("flux")
    first = find_modules(denoiser(pipe))
    policy = Fora(every=2, scope="module", modules=r"^transformer_blocks\..*ff")
    with fewstep.patch(pipe, cache=policy) as patch:
        run(pipe)
        assert patch.report()["cache"]["forecast_modules"]["cond"] == [0, 4, 0, 4, 0, 4]
        assert patch.report()["cache"]["partly"] == 0  # all that are cached
        said = patch.explain()
    assert "a forecast for each of 4 modules: 2 ff, 2 ff_context" in said
    assert "layers of blocks that have no forecast: 4 attn, 2 proj_mlp, 2 proj_out" in said
    policy = Fora(every=2, scope="block", modules=("single_transformer_blocks.1",))
    with fewstep.patch(pipe, cache=policy) as patch:
        run(pipe)
        assert "each of 1 modules: 1 single_transformer_blocks" in patch.explain()
    for scope, found in (("module", "2 attn, 2 ff, 2 ff_context, 2 proj_out"), ("block", "2 tran")):
        with pytest.raises(ValueError, match=f"got 'nets', which matches none of {found}"):
            fewstep.patch(pipe, cache=Fora(scope=scope, modules="nets"))
    assert find_modules(denoiser(pipe)) == first
    assert not any("forward" in vars(module) for module in denoiser(pipe).modules())


@pytest.fixture
def small_layers(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("scope", ["block", "module"])
@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_with_quantised_layers_and_fused_norms(name, scope):
    pipe = build(name)
    plain = run(pipe)
    options = {"quantize": "w8a8", "norms": "fuse"}
    with fewstep.patch(pipe, **options):
        want = run(pipe)
    with fewstep.patch(pipe, **options, cache=Fora(every=1, scope=scope)):
        assert torch.equal(run(pipe), want)
    policy = Taylor(every=2, warmup=2, degree=1, scope=scope)
    with fewstep.patch(pipe, **options, cache=policy) as patch:
        image = run(pipe)
        assert patch.report()["cache"]["skipped"] > 0
        norms = [m for m in denoiser(pipe).modules() if isinstance(m, QuantizingNorm)]
        assert norms
        # What the cache puts around attention and feed-forward layers takes quantised rows.
        assert all(norm._readers.refuse() is None for norm in norms)
    assert torch.equal(run(pipe), plain)
    # One after the other, and undone in the order in which they were made.
    first = fewstep.patch(pipe, cache=policy)
    second = fewstep.patch(pipe, **options)
    later = run(pipe)
    first.undo()
    assert torch.equal(run(pipe), want)
    second.undo()
    assert torch.equal(run(pipe), plain)
    assert later.isfinite().all()
    assert image.isfinite().all()


@pytest.mark.parametrize("more", [{"time": "cache"}, {"text": "cache"}])
def test_beside_what_is_computed_once(more):
    """What depends on the time or the text alone is taken from where it is kept: the same bits."""
    pipe = build("pixart")
    for policy in (Fora(every=1, scope="module"), Taylor(every=2, degree=1, scope="module")):
        with fewstep.patch(pipe, cache=policy):
            want = run(pipe)
        with fewstep.patch(pipe, cache=policy, **more):
            assert torch.equal(run(pipe), want)


def test_a_compiled_block():
    pipe = build("flux")
    policy = Taylor(every=2, warmup=1, degree=1, scope="module")
    given = {"num_inference_steps": 3, "true_cfg_scale": 1.0}
    with fewstep.patch(pipe, cache=policy) as patch:
        want = call(pipe, **given)
        denoiser(pipe).single_transformer_blocks[1].compile(backend="eager")
        assert torch.equal(call(pipe, **given), want)
        assert patch.report()["cache"]["forecast_modules"]["cond"] == [0, 8, 0]
    torch.compiler.reset()


@pytest.mark.parametrize("first", ["cache", "offload"])
def test_blocks_that_are_offloaded(first):
    pipe = build("flux")
    plain, policy = run(pipe), Fora(every=2, scope="module")
    with fewstep.patch(pipe, cache=policy):
        want = run(pipe)

    def offload():
        device = torch.device("cpu")  # as if it were another one
        options = {"offload_type": "block_level", "num_blocks_per_group": 1}
        denoiser(pipe).enable_group_offload(onload_device=device, **options)

    if first == "offload":
        offload()
    patch = fewstep.patch(pipe, cache=policy)
    if first == "cache":
        offload()
    assert torch.equal(run(pipe), want)
    assert patch.report()["cache"]["forecast_modules"]["cond"] == [0, 8, 0, 8, 0, 8]
    assert "attn" not in vars(denoiser(pipe).single_transformer_blocks[0])
    patch.undo()
    assert torch.equal(run(pipe), plain)
