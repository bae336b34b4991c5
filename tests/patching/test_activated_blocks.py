"""Blocks that call a layer and its activation themselves: one product, nothing else changed."""

import copy
import io
import pickle

import pytest
import torch
from diffusers.models.transformers.transformer_chroma import ChromaSingleTransformerBlock
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fewstep
from fewstep.ops._epilogue import activate
from fewstep.patching import fuse_activations
from fewstep.patching.activated_blocks import ActivatedBlock, qualifies
from patching.tiny_pipelines import build, call, denoiser

SKIP = {"skip": lambda *_: None}
DIM = 64


class Model(nn.Module):
    """One of FLUX's single blocks."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(0)
        self.block = FluxSingleTransformerBlock(DIM, 2, DIM // 2).to(dtype).eval()

    def forward(self, x, text, temb):
        return torch.cat(self.block(x, text, temb), 1)


def draw(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(1)
    sizes = ((1, 9, DIM), (1, 4, DIM), (1, DIM))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def seen_by_proj_out(model, *given):
    """What the block's last layer gets: attention's output beside the activated one."""
    seen = []
    hook = model.block.proj_out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*given)
    hook.remove()
    return seen[0][..., DIM:]


@torch.no_grad()
@pytest.mark.parametrize("norms", [None, "fuse"])
def test_the_product_activates_and_rounds_once(norms):
    model, given = Model(), draw()
    with fewstep.quantize(model, "w8a8", **SKIP, norms=norms) as handle:
        assert "1 activations are part of the product before them" in handle.explain()
        x = torch.cat([given[1], given[0]], 1)
        layer = model.block.proj_mlp
        normed = model.block.norm(x, emb=given[2])[0]
        assert torch.equal(seen_by_proj_out(model, *given), layer(normed, activation="gelu_tanh"))
        if norms is None:  # whoever calls the layer itself gets what it returns
            exact = activate(layer(normed.float()), "gelu_tanh")
            got = model.block.act_mlp(layer(normed))
            assert ((got - exact).abs() <= 2.0**-6 * exact.abs() + 2.0**-12).all()


def test_which_forwards_qualify():
    assert all(
        qualifies(t.forward) for t in (FluxSingleTransformerBlock, ChromaSingleTransformerBlock)
    )
    assert not qualifies(FluxTransformerBlock.forward)
    assert not qualifies(_Twice.forward)
    assert not qualifies(_HandedOn.forward)
    assert not qualifies(torch.relu)


class _Twice(nn.Module):
    def forward(self, x):
        return self.act_mlp(self.proj_mlp(x)) + self.proj_mlp(x)


class _HandedOn(nn.Module):
    def forward(self, x):
        return print(self, self.act_mlp(self.proj_mlp(x)))


@torch.no_grad()
@pytest.mark.parametrize("how", ["hook of the layer", "hook of the activation", "other activation"])
def test_falls_back_to_the_block(how):
    outs = []
    for activations in ("fuse", None):
        model, seen = Model(), []
        fewstep.quantize(model, "w8a8", **SKIP, activations=activations)
        block = model.block
        if how == "other activation":
            block.act_mlp = nn.ReLU()
        else:
            watched = block.proj_mlp if how == "hook of the layer" else block.act_mlp
            watched.register_forward_hook(lambda m, args, out, seen=seen: seen.append(out))
        outs.append(model(*draw()))
        assert all(isinstance(x, torch.Tensor) for x in seen)
        assert len(seen) == (how != "other activation")
    assert torch.equal(*outs)


def test_tangents_are_those_of_the_block():
    results = []
    for activations in ("fuse", None):
        model, (x, text, temb) = Model(torch.float32), draw(torch.float32)
        fewstep.quantize(model, "w8a8", **SKIP, activations=activations)
        with torch.no_grad():
            f = lambda x, m=model, rest=(text, temb): m(x, *rest)  # noqa: E731
            with sdpa_kernel(SDPBackend.MATH):  # the one with forward mode
                results.append(torch.func.jvp(f, (x,), (x,)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@torch.no_grad()
def test_loras_join_the_product():
    peft = pytest.importorskip("peft")
    config = {"r": 4, "init_lora_weights": False, "target_modules": ["proj_mlp"]}
    outs = []
    for activations in ("fuse", None):
        model = Model(torch.float32)
        fewstep.quantize(model, "w8a8", **SKIP, activations=activations)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(**config), model)
        outs.append(seen_by_proj_out(model, *draw(torch.float32)))
    # Sums in another order, and polynomials for tanh.
    assert not torch.equal(*outs)
    assert (outs[0] - outs[1]).norm() < 1e-5 * outs[1].norm()


@torch.no_grad()
def test_compiles_without_graph_break():
    model, given = Model(), draw()
    with fewstep.quantize(model, "w8a8", **SKIP, norms="fuse"):
        want = model(*given)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(*given), want)


@torch.no_grad()
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_too(how):
    model, given = Model(), draw()
    handle = fewstep.quantize(model, "w8a8", **SKIP)
    want = model(*given)
    if how == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    handle.undo()
    assert type(model.block) is FluxSingleTransformerBlock
    assert isinstance(twin.block, ActivatedBlock)
    assert list(twin.state_dict()) != list(model.state_dict())
    assert torch.equal(twin(*given), want)
    assert not fuse_activations(twin).fused  # a second time


@pytest.fixture
def small_layers(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "in place"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_model_of_diffusers_can_be_copied_with_what_undoes_it(how, loaded, tmp_path):
    """Its quantiser knows the blocks that changed: a copy's quantiser, those of the copy."""
    pipe = build("flux")
    model = denoiser(pipe)
    kinds = [type(module) for module in model.modules()]
    if loaded:
        model.save_pretrained(tmp_path)
        config = fewstep.QuantizationConfig("w8a8", norms="fuse")
        model = type(model).from_pretrained(tmp_path, quantization_config=config)
    else:
        fewstep.quantize(model, "w8a8", norms="fuse")
    # Loaded weights lie where they did in the file; BLAS adds in another order for aligned ones.
    pipe.register_modules(transformer=copy.deepcopy(model))
    want = call(pipe, num_inference_steps=1)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()] != kinds
    model.dequantize()
    assert [type(module) for module in model.modules()] == kinds
    pipe.register_modules(transformer=twin)
    assert torch.equal(call(pipe, num_inference_steps=1), want)
    twin.dequantize()
    assert [type(module) for module in twin.modules()] == kinds


@pytest.mark.usefixtures("small_layers")
def test_caches_know_the_block():
    """diffusers' own, which looks it up by class, and ours."""
    from diffusers import FirstBlockCacheConfig

    pipe = build("flux")
    plain = call(pipe, num_inference_steps=3)
    with fewstep.quantize(denoiser(pipe), "w8a8"):
        want = call(pipe, num_inference_steps=3)
        denoiser(pipe).enable_cache(FirstBlockCacheConfig(threshold=0.0))
        assert torch.equal(call(pipe, num_inference_steps=3), want)
        denoiser(pipe).disable_cache()
    with fewstep.patch(pipe, steps=3, quantize="w8a8", cache="first-block") as patch:
        assert call(pipe).isfinite().all()
        assert "6 activations are part" in patch.explain()
    assert torch.equal(call(pipe, num_inference_steps=3), plain)
