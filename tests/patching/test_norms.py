"""quantize(norms=): which norms quantise for the layers behind them, what it changes, and undo."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import fewstep
from fewstep import ops
from fewstep.patching import fuse_norms
from fewstep.patching.norms import DeferredNorm, QuantizingNorm
from fewstep.quantization import QuantizedRows
from patching.tiny_pipelines import BUILDERS, build, call, denoiser

pytestmark = pytest.mark.usefixtures("small_layers")
# Of what the tiny models have: blocks times norms whose readers are all linear.
COUNTS = {"digits": 8, "flux": 10, "pixart": 8, "sana": 4, "sd-unet": 21, "sd3": 15}


@pytest.fixture
def small_layers(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


def fused(model):
    return [name for name, m in model.named_modules() if isinstance(m, QuantizingNorm)]


def image_of(pipe):
    return call(pipe, num_inference_steps=2)


def first_call(pipe, monkeypatch):
    """The denoiser, and its first arguments in a call of the pipeline."""
    model, seen = denoiser(pipe), []
    hook = model.register_forward_pre_hook(lambda m, *given: seen.append(given), with_kwargs=True)
    image_of(pipe)
    hook.remove()
    args, kwargs = seen[0]
    return model, lambda m: m(*args, **kwargs)[0]


def counting(monkeypatch, name):
    """Count the calls of an op."""
    op, calls = getattr(ops, name), []
    monkeypatch.setattr(ops, name, lambda *args, **kw: (calls.append(name), op(*args, **kw))[1])
    return calls


def test_every_family_has_a_count():
    assert set(COUNTS) == set(BUILDERS) - {"digits-student"}


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_share_has_the_bits_of_layers_that_quantise_alone(name, monkeypatch):
    pipe = build(name)
    with fewstep.quantize(denoiser(pipe), "w8a8"):
        alone = image_of(pipe)
    with fewstep.quantize(denoiser(pipe), "w8a8", norms="share") as handle:
        assert len(fused(denoiser(pipe))) == COUNTS[name]
        assert f"{COUNTS[name]} norms quantise" in handle.explain()
        calls = counting(monkeypatch, "quantize_int8")
        shared = image_of(pipe)
        assert calls
    assert torch.equal(shared, alone)


@pytest.mark.parametrize("norms", ["share", "fuse"])
def test_rotated_layers_share_their_rotation(norms):
    pipe = build("flux")
    options = {"skip": lambda name, layer: layer.in_features % 16 != 0}
    with fewstep.quantize(denoiser(pipe), "w8a8-h16", **options):
        alone = image_of(pipe)
    with fewstep.quantize(denoiser(pipe), "w8a8-h16", **options, norms=norms):
        assert len(fused(denoiser(pipe))) == COUNTS["flux"]
        got = image_of(pipe)
    if norms == "share":
        assert torch.equal(got, alone)
    assert (got - alone).norm() < 1e-3 * alone.norm()


def test_layers_that_smooth_alike_share_it():
    """One layer with factors of its own fuses; several do only with the same ones."""
    model = denoiser(build("flux"))
    block = model.transformer_blocks[0]
    x, row = torch.randn(1, 9, 32), torch.randn(1, 1, 32)
    with fewstep.quantize(model, "w8a8", norms="fuse"), torch.no_grad():
        proj, factors = block.ff.net[0].proj, torch.rand(32) + 0.5
        proj.smooth = factors
        rows = block.norm2(x) * row + row
        want = QuantizedRows.of(ops.norm_jvp(x, scale=row - 1, shift=row)[0], factors)
        assert rows.smooth is factors
        assert torch.equal(rows.q, want.q)
        readers, norm = (block.attn.to_q, block.attn.to_k, block.attn.to_v), block.norm1.norm
        for layer in readers:
            layer.smooth = factors
        assert isinstance(norm(x), DeferredNorm)
        readers[1].smooth = factors.clone()
        assert isinstance(norm(x), torch.Tensor)


@pytest.mark.parametrize("name", sorted(COUNTS))
def test_fuse_is_the_modulated_norm_in_one_op(name, monkeypatch):
    """To the bit what norm_jvp and quantize_int8 compute, one after the other."""
    pipe = build(name)

    def unfused(x, smooth, rotate, **options):
        return ops.quantize_int8(ops.norm_jvp(x, **options)[0], smooth=smooth, rotate=rotate)

    plain = image_of(pipe)
    with fewstep.quantize(denoiser(pipe), "w8a8"):
        alone = image_of(pipe)
    with fewstep.quantize(denoiser(pipe), "w8a8", norms="fuse"):
        with monkeypatch.context() as patch:
            calls = counting(patch, "norm_quantize_int8")
            got = image_of(pipe)
            assert len(calls) % COUNTS[name] == 0
            assert calls
        monkeypatch.setattr(ops, "norm_quantize_int8", unfused)
        assert torch.equal(image_of(pipe), got)
    # In float32 the two differ in last bits, which may move a value next to a tie by a step: far
    # less than what all the steps cost.
    assert (got - alone).norm() < 0.1 * (alone - plain).norm()


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.bfloat16, 2**8), (torch.float16, 2**11)], ids=str
)
def test_the_blocks_factor_comes_back_from_its_scale(dtype, largest):
    """1 + scale is what a norm is given, scale what the op wants: every value of 16 bits."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    factor = 1 + every[every.abs() <= largest]
    assert torch.equal(1 + (factor - 1).float(), factor.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_block_are_those_of_its_modulation(dtype):
    model = denoiser(build("flux")).to(dtype)
    norm1 = model.transformer_blocks[0].norm1
    x, temb = torch.randn(2, 9, 32).to(dtype), (3 * torch.randn(2, 32)).to(dtype)
    with torch.no_grad(), fewstep.quantize(model, "w8a8", norms="fuse"):
        rows = norm1(x, emb=temb)[0]
        shift, scale = norm1.linear(norm1.silu(temb))[:, None].double().chunk(6, dim=-1)[:2]
        z = ops.norm_jvp(x.double(), scale=(1 + scale.to(dtype)).double() - 1, shift=shift)[0]
    # Half a step, and half a unit of z's one rounding, twice where it makes the largest.
    bound = rows.scale[..., None] * 0.5001 + torch.finfo(dtype).eps * z.abs()
    assert ((rows.q * rows.scale[..., None] - z).abs() <= bound).all()


def test_16_bit_models_lose_nothing():
    """z rounded once instead of three times: the image is no farther from float32's."""
    pipe = build("flux")
    exact = image_of(pipe)
    pipe.to(torch.bfloat16)
    images = []
    for norms in (None, "fuse"):
        with fewstep.quantize(denoiser(pipe), "w8a8", norms=norms):
            images.append(image_of(pipe).float())
    alone, one = ((image - exact).norm() for image in images)
    assert one <= 1.2 * alone  # two draws of rounding errors


def test_dual_attention_reads_one_norm_twice():
    """SD3.5: two modulations of one norm, for two attentions."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    options = {"num_layers": 2, "dual_attention_layers": (0,), "sample_size": 8, "patch_size": 1}
    sizes = {"attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16}
    sizes |= {"joint_attention_dim": 16, "pooled_projection_dim": 8, "pos_embed_max_size": 16}
    model = SD3Transformer2DModel(in_channels=4, out_channels=4, **options, **sizes).eval()
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "pooled_projections": torch.randn(1, 8),
        "timestep": torch.tensor([500]),
    }
    with torch.no_grad():
        with fewstep.quantize(model, "w8a8"):
            alone = model(**inputs)[0]
        with fewstep.quantize(model, "w8a8", norms="share"):
            assert "transformer_blocks.0.norm1.norm" in fused(model)
            assert torch.equal(model(**inputs)[0], alone)


def test_quantises_once_for_all_that_read():
    model = denoiser(build("flux"))
    block = model.single_transformer_blocks[0]
    seen = []
    with fewstep.quantize(model, "w8a8", norms="fuse"):
        readers = (block.proj_mlp, block.attn.to_q, block.attn.to_k, block.attn.to_v)
        for layer in readers:
            multiply = layer._multiply
            layer._multiply = lambda x, *args, f=multiply: (seen.append(x), f(x, *args))[1]
        x, temb, text = torch.randn(1, 9, 32), torch.randn(1, 32), torch.randn(1, 3, 32)
        with torch.no_grad():
            block(x, text, temb)
    assert len(seen) == 4
    assert all(isinstance(x, QuantizedRows) and x.q is seen[0].q for x in seen)


def test_undo_puts_the_very_norms_back():
    pipe = build("flux")
    model = denoiser(pipe)
    before, plain = dict(model.named_modules()), image_of(pipe)
    names = list(model.state_dict())
    handle = fewstep.quantize(model, "w8a8")
    quantised = list(model.state_dict())
    handle.undo()
    handle = fewstep.quantize(model, "w8a8", norms="fuse")
    assert list(model.state_dict()) == quantised
    model.train()
    handle.undo()
    assert dict(model.named_modules()) == before
    assert all(module.training for module in before.values())
    assert list(model.state_dict()) == names
    assert torch.equal(image_of(pipe), plain)


def test_undo_leaves_what_something_else_has_put_there():
    model = denoiser(build("flux"))
    handle = fewstep.quantize(model, "w8a8", norms="fuse")
    other = model.transformer_blocks[0].norm2 = nn.LayerNorm(32)
    handle.undo()
    assert model.transformer_blocks[0].norm2 is other
    assert not fused(model)


def test_parameters_move_with_the_model():
    model = denoiser(build("sd-unet"))
    with fewstep.quantize(model, "w8a8", norms="fuse"):
        for part in model.children():
            part.to(torch.bfloat16)
        assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_deep_copy_stands_alone():
    pipe = build("flux")
    handle = fewstep.quantize(denoiser(pipe), "w8a8", norms="fuse")
    image, twin = image_of(pipe), copy.deepcopy(pipe)
    handle.undo()
    assert len(fused(denoiser(twin))) == COUNTS["flux"]
    assert torch.equal(image_of(twin), image)
    block = denoiser(twin).transformer_blocks[0]
    assert block.norm2._readers.parent() is block


def test_other_layers_are_found_by_each_call():
    """A reader that needs z itself gets it, and its norm fuses again when it is gone."""
    pipe = build("flux")
    model = denoiser(pipe)
    attn = model.transformer_blocks[0].attn
    with fewstep.quantize(model, "w8a8", norms="share"):
        image = image_of(pipe)
        seen = []
        hook = attn.to_q.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        assert torch.equal(image_of(pipe), image)
        hook.remove()
        assert seen
        assert all(isinstance(x, torch.Tensor) for x in seen)
        layer, attn.to_k = attn.to_k, attn.to_k.dequantize()
        assert image_of(pipe).isfinite().all()
        attn.to_k = layer
        assert torch.equal(image_of(pipe), image)


@pytest.mark.parametrize("path", ["attn", "ff", "ff.net.0", "norm1.norm"])
@pytest.mark.parametrize("how", ["hook", "forward"])
def test_whoever_looks_at_an_input_gets_a_tensor(path, how):
    pipe = build("flux")
    model, seen = denoiser(pipe), []
    with fewstep.quantize(model, "w8a8", norms="share"):
        image = image_of(pipe)
        module = model.transformer_blocks[0].get_submodule(path)
        if how == "hook":
            module.register_forward_hook(lambda m, args, out: seen.extend([*args, out]))
        else:
            inner = module.forward

            def forward(*args, **kwargs):
                out = inner(*args, **kwargs)
                seen.extend([*args, *kwargs.values(), out])
                return out

            module.forward = forward
        assert torch.equal(image_of(pipe), image)
    parts = [y for x in seen for y in (x if isinstance(x, tuple) else (x,)) if y is not None]
    assert all(isinstance(x, (torch.Tensor, dict)) for x in parts)
    assert any(isinstance(x, torch.Tensor) for x in parts)


def test_loras_get_the_values():
    peft = pytest.importorskip("peft")
    config = {"target_modules": ["to_q", "proj_mlp"], "init_lora_weights": False}
    images = []
    for norms in (None, "share"):
        pipe = build("flux")
        fewstep.quantize(denoiser(pipe), "w8a8", norms=norms)
        torch.manual_seed(0)
        denoiser(pipe).add_adapter(peft.LoraConfig(r=2, **config))
        images.append(image_of(pipe))
    assert torch.equal(*images)


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_gradients_and_tangents_are_those_of_the_layers_alone(name, monkeypatch):
    pipe = build(name)
    model, run = first_call(pipe, monkeypatch)
    weight = next(
        p for n, p in model.named_parameters() if n.endswith("timestep_embedder.linear_1.weight")
    )
    results = []
    for norms in (None, "share"):
        with fewstep.quantize(model, "w8a8", norms=norms):
            out = run(model)
            results.append((out, *torch.autograd.grad(out.square().sum(), [weight])))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_tangents_pass():
    block = denoiser(build("flux")).single_transformer_blocks[0]
    model, x, temb = nn.ModuleList([block]), torch.randn(1, 9, 32), torch.randn(1, 32)
    results = []
    for norms in (None, "fuse"):
        with fewstep.quantize(model, "w8a8", skip=lambda *_: None, norms=norms), torch.no_grad():
            f = lambda t: block.proj_mlp(block.norm(x, emb=t)[0])  # noqa: E731
            results.append(torch.func.jvp(f, (temb,), (temb,)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_is_left_to_torch():
    pipe = build("flux")
    images = []
    for norms in (None, "fuse"):
        with fewstep.quantize(denoiser(pipe), "w8a8", norms=norms), torch.autocast("cpu"):
            images.append(image_of(pipe))
    assert torch.equal(*images)


def test_a_processor_that_is_not_known_gets_a_tensor():
    model = denoiser(build("pixart"))
    model.transformer_blocks[0].attn1.set_processor(AttnProcessor())
    with fewstep.quantize(model, "w8a8", norms="fuse") as handle:
        assert "transformer_blocks.0.norm1" not in fused(model)
        assert "has a processor that is not known: AttnProcessor" in handle.explain()


@pytest.mark.parametrize(
    ("scheme", "reason"), [("w8a8-r2", "has a low-rank branch"), ("w4a16-g32", "as they are")]
)
def test_explains_what_it_leaves_alone(scheme, reason):
    pipe = build("flux")
    options = {"skip": lambda name, layer: layer.in_features % 32 != 0, "norms": "fuse"}
    with fewstep.quantize(denoiser(pipe), scheme, **options) as handle:
        assert not fused(denoiser(pipe))
        text = handle.explain()
        assert "0 norms quantise for the layers behind them" in text
        assert reason in text
        assert image_of(pipe).isfinite().all()


def test_a_norm_with_hooks_is_left_alone():
    model = denoiser(build("flux"))
    model.transformer_blocks[0].norm2.register_forward_hook(lambda *args: None)
    with fewstep.quantize(model, "w8a8", norms="fuse") as handle:
        assert "transformer_blocks.0.norm2" not in fused(model)
        assert "it has hooks" in handle.explain()


def test_models_that_are_quantised_already():
    """As from_pretrained leaves them: a handle of its own, and no norm is done twice."""
    pipe = build("flux")
    with fewstep.quantize(denoiser(pipe), "w8a8"):
        alone = image_of(pipe)
        handle = fuse_norms(denoiser(pipe), "share")
        assert len(handle.fused) == COUNTS["flux"]
        assert set(fuse_norms(denoiser(pipe)).left.values()) == {"done already"}
        assert torch.equal(image_of(pipe), alone)
        handle.undo()
        assert not fused(denoiser(pipe))


def test_compiles_without_graph_break(monkeypatch):
    model, run = first_call(build("sana"), monkeypatch)
    with fewstep.quantize(model, "w8a8", norms="fuse"), torch.no_grad():
        want = run(model)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(run(compiled), want)


def test_a_deferred_norm_is_modulated_and_nothing_else():
    model = denoiser(build("flux"))
    x, row = torch.randn(1, 9, 32), torch.randn(1, 1, 32)
    norm = model.transformer_blocks[0].norm2
    with fewstep.quantize(model, "w8a8", norms="fuse"), torch.no_grad():
        deferred = model.transformer_blocks[0].norm2(x)
        assert isinstance(deferred, DeferredNorm)
        want = QuantizedRows.of(ops.norm_jvp(x, scale=row - 1, shift=row)[0])
        for rows in (deferred * row + row, row + row * deferred, torch.add(row, deferred * row)):
            assert torch.equal(rows.q, want.q)
        with pytest.raises(TypeError, match="one product with a norm's output"):
            deferred * row * row
        with pytest.raises(TypeError):
            torch.cat([deferred, row])
    assert model.transformer_blocks[0].norm2 is norm


def test_bad_input_leaves_the_model_as_it_was():
    model = denoiser(build("flux"))
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match="norms: expected one of share, fuse, got 'merge'"):
        fewstep.quantize(model, "w8a8", norms="merge")
    assert dict(model.named_modules()) == before
    plain = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="norms: expected a model with blocks among Flux"):
        fewstep.quantize(plain, "w8a8", norms="fuse")
    assert type(plain[1]) is nn.Linear
