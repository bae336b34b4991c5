"""load_nunchaku: whole models from packed files, layer by layer; undo, saving, and bad files."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import fewstep
from fewstep import reference
from fewstep.quantization import (
    QuantLinear,
    W4A8Linear,
    W4A16Linear,
    load_nunchaku,
    pack_awq,
    pack_svdq,
)
from fewstep.quantization.errors import sqnr
from nunchaku_files import FluxFile, awq, dense_awq, dense_svdq, quantized_part, svdq

pytestmark = pytest.mark.usefixtures("no_grad")
# `gemm_w4a8` folds scales with an error of this share of a row's largest weight (its docstring).
FOLD = (1 / 2 + 7 / 512) / 112


def flux():
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )
    return model.eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(2, 16, 4, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator).to(dtype),
        "pooled_projections": torch.randn(2, 32, generator=generator).to(dtype),
        "timestep": torch.tensor([0.3, 0.8]).to(dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }


def run(model):
    return model(**inputs(next(model.parameters()).dtype))[0]


def photograph(model):
    """Return what must not change: module identities, and every tensor's identity and bits."""
    modules = [(name, id(module)) for name, module in model.named_modules()]
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return modules, {name: (id(x), x.detach().clone()) for name, x in values.items()}


def expect_unchanged(model, before):
    modules, values = photograph(model)
    assert modules == before[0]
    assert values.keys() == before[1].keys()
    for name, (identity, bits) in before[1].items():
        assert values[name][0] == identity, name
        assert torch.equal(values[name][1], bits), name


@pytest.fixture(params=[False, True], ids=["nunchaku", "diffusers"])
def lite(request):
    return request.param


class One(nn.Module):
    def __init__(self, inputs=192, outputs=100, bias=True):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs, bias=bias)


def load_one(state, **sizes):
    model = One(**sizes)
    load_nunchaku(model, {f"proj.{name}": value for name, value in state.items()})
    return model.proj


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("names", [False, True], ids=["nunchaku", "lite"])
def test_a_layer_is_its_formula(dtype, names):
    natural, q = svdq(100, 192, dtype=dtype)
    layer = load_one(pack_svdq(natural, lite=names))
    assert str(layer.scheme) == "w4a8-g64-r16-smooth"
    assert layer.weight_scale.dtype == dtype  # as in the file, to the bit
    assert torch.equal(layer.weight_scale, natural["weight_scale"])
    x = torch.randn(2, 5, 192)
    # smooth divides what is quantised; the branch sees x itself.
    a, a_scale = reference.quantize_int8(x, smooth=natural["smooth"])
    low = F.linear(x, natural["down"].float())
    want = reference.gemm_w4a8(
        *(a, a_scale, natural["weight_int4"], natural["weight_scale"]),
        bias=natural["bias"],
        low=low,
        up=natural["up"],
    )
    # 192 products and 16 of the branch, each to 2^-24 of sums of about 1.
    assert (layer(x) - want).abs().max() < 200 * 2**-24 * want.abs().max()
    folded = FOLD * quantized_part(natural, q).abs().amax(1, keepdim=True)
    limit = folded / natural["smooth"].double().min() + 1e-6
    assert ((layer.weight - dense_svdq(natural, q)).abs() < limit).all()
    # 37 dB: the noise of 8-bit activations (test_linear.py); the branch adds signal and no noise.
    assert sqnr(layer(x), x.double() @ dense_svdq(natural, q).T + natural["bias"].double()) > 37


def test_what_a_layer_does_without():
    natural, _ = svdq(100, 192, rank=0, smooth=False, bias=False)
    layer = load_one(pack_svdq(natural), bias=False)
    assert str(layer.scheme) == "w4a8-g64"
    assert layer.bias is None
    ones = {"smooth": torch.ones(192).bfloat16(), "bias": torch.zeros(100).bfloat16()}
    layer = load_one(pack_svdq(natural | ones), bias=False)  # as the converter writes them
    assert layer.smooth is None
    assert layer.bias is None


@pytest.mark.parametrize("zero", [-7, -8, 0, 3])
def test_an_awq_layer_keeps_its_zeros(zero):
    natural, q = awq(48, 192, zero=zero)
    layer = load_one(pack_awq(natural), outputs=48)
    assert isinstance(layer, W4A16Linear)
    assert str(layer.scheme) == ("w4a16-g64" if zero == -8 else "w4a16-g64-r3")
    want = dense_awq(natural, q)
    # up is float32 here; in bfloat16 the remainder of the converter's zeros is exact too.
    assert (layer.weight - want).abs().max() < 2**-22 * want.abs().max()
    if zero == -7:
        half = copy.deepcopy(layer).bfloat16()
        assert torch.equal(half.up.float(), layer.up)
    x = torch.randn(3, 192)
    exact = x.double() @ want.T + natural["bias"].double()
    assert (layer(x) - exact).abs().max() < 200 * 2**-24 * 16 * exact.abs().max()


def test_every_layer_of_a_flux_model_is_that_of_the_file(lite):
    model = flux()
    file = FluxFile(model, lite)
    handle = load_nunchaku(model, file.state)
    assert set(handle.replaced) == set(file.weights)
    kinds = {name: type(layer) for name, layer in handle.replaced.items()}
    awq_layers = {name for name, kind in kinds.items() if kind is W4A16Linear}
    assert awq_layers == {name for name in kinds if name.endswith(".linear")}
    assert set(kinds.values()) == {W4A8Linear, W4A16Linear}
    seen = {}
    for name, layer in handle.replaced.items():
        layer.register_forward_hook(lambda _, x, y, name=name: seen.__setitem__(name, (x[0], y)))
    run(model)
    for name, layer in handle.replaced.items():
        want, bias = file.weights[name], file.biases[name]
        largest = layer.dequantize_weight(layer.quantized, layer.weight_scale).abs()
        limit = 0 if kinds[name] is W4A16Linear else FOLD * largest.amax(1, keepdim=True) / 0.5
        assert ((layer.weight - want).abs() <= limit + 1e-6).all(), name
        assert (layer.bias - bias).abs().max() < 1e-6, name
        x, y = seen[name]
        assert sqnr(y, x.double() @ want.T + bias) > 37, name  # as in test_a_layer_is_its_formula


def test_the_model_is_the_oracles(lite):
    model = flux()
    file = FluxFile(model, lite)
    oracle = copy.deepcopy(model)
    for name, weight in file.weights.items():
        linear = oracle.get_submodule(name)
        linear.weight.copy_(weight)
        linear.bias.copy_(file.biases[name])
    for key, value in file.state.items():
        name = key if lite or "blocks" not in key else key.replace(".norm_", ".attn.norm_")
        if name in oracle.state_dict() and name.rpartition(".")[0] not in file.weights:
            oracle.get_parameter(name).copy_(value)
    load_nunchaku(model, file.state)
    # A dozen layers of 33 dB or more, each a part of a residual stream.
    assert sqnr(run(model), run(oracle)) > 27


def test_the_same_file_runs_in_16_bits(lite, tmp_path):
    model = flux()
    file = FluxFile(model, lite)
    save_file(file.state, tmp_path / "svdq.safetensors")
    half = copy.deepcopy(model).bfloat16()
    load_nunchaku(model, file.state)
    load_nunchaku(half, tmp_path / "svdq.safetensors")
    for name, layer in half.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.quantized, model.get_submodule(name).quantized)
            assert torch.equal(layer.weight_scale, model.get_submodule(name).weight_scale)
            assert layer.bias.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: 20 log10(2^8) + 10.8 = 59 dB a rounding, some hundred of them.
    assert sqnr(run(half), run(model)) > 25


def test_undo_puts_the_very_tensors_back(lite):
    model = flux()
    file = FluxFile(model, lite)
    want, before = run(model), photograph(model)
    with load_nunchaku(model, file.state) as handle:
        assert not torch.equal(run(model), want)
        assert "w4a8-g64-r16-smooth" in handle.explain()
    expect_unchanged(model, before)
    assert torch.equal(run(model), want)
    handle = load_nunchaku(model, file.state)
    model.bfloat16()
    handle.undo()
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}


def test_a_model_on_the_meta_device_comes_to_life(lite):
    model = flux()
    file = FluxFile(model, lite)
    load_nunchaku(model, file.state)
    with torch.device("meta"):
        empty = flux()
    load_nunchaku(empty, file.state)
    assert torch.equal(run(empty), run(model))
    with torch.device("meta"):
        empty = flux()
    left = {k: v for k, v in file.state.items() if k != "x_embedder.weight"}
    with pytest.raises(ValueError, match=r"x_embedder\.weight: expected values .*, got none"):
        load_nunchaku(empty, left)
    assert not any(isinstance(module, QuantLinear) for module in empty.modules())


def test_saved_and_loaded_by_diffusers(tmp_path):
    from diffusers import FluxTransformer2DModel

    model = flux()
    file = FluxFile(model, dtype=torch.float16)
    handle = fewstep.load_nunchaku(model, file.state)
    model.save_pretrained(tmp_path)
    again = FluxTransformer2DModel.from_pretrained(tmp_path).eval()
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    assert again.transformer_blocks[0].attn.to_q.weight_scale.dtype == torch.float16
    # Tensors of a file are not aligned, and BLAS adds up in another order: some float32 roundings.
    assert sqnr(run(again), run(model)) > 110
    handle.undo()
    assert "quantization_config" not in model.config


BLOCK = "transformer_blocks.0."
SINGLE = "single_transformer_blocks.0."


def poisoned(x):
    x = x.clone()
    x.flatten()[3] = float("nan")
    return x


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (f"{BLOCK}qkv_proj.wscales", poisoned, "expected finite values, got inf or NaN"),
        (f"{BLOCK}qkv_proj.lora_up", poisoned, "expected finite values"),
        ("x_embedder.weight", poisoned, "expected finite values"),
        (f"{BLOCK}qkv_proj.wscales", torch.neg, "expected no negative scales"),
        (f"{BLOCK}mlp_fc2.smooth", torch.zeros_like, "expected no zeros to divide by"),
        (
            f"{BLOCK}mlp_fc1.wscales",
            lambda x: x.repeat(2, 1),
            r"expected .*\[2, 256\], got .*\[4, 2",
        ),
        (f"{BLOCK}mlp_fc1.wscales", lambda x: x.to(torch.float8_e4m3fn), "got float8_e4m3fn"),
        (f"{BLOCK}mlp_fc1.wscales", None, r"expected .*\[2, 256\], got none"),
        (f"{BLOCK}mlp_fc1.bias", None, "expected 256 values, got none"),
        (f"{BLOCK}mlp_fc1.qweight", lambda x: x[:128], r"\[2, 128\], got bfloat16 \[2, 256\]"),
        (f"{BLOCK}norm1.linear.qweight", lambda x: x[:9], "wscales: expected bfloat16 .* 36"),
        (f"{SINGLE}mlp_fc2.qweight", "all", "expected the other part of .*proj_out, got none"),
        (f"{SINGLE}norm_q.weight", lambda x: x[:3], r"expected \[16\], got \[3\]"),
    ],
)
def test_a_bad_tensor_is_named_and_the_model_stays(key, change, message):
    model = flux()
    state = FluxFile(model).state
    before = photograph(model)
    if change == "all":
        owner = key.removesuffix("qweight")
        state = {name: x for name, x in state.items() if not name.startswith(owner)}
    elif change is None:
        del state[key]
    else:
        state[key] = change(state[key])
    name = key.rpartition(".")[0].replace(".", r"\.")
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_nunchaku(model, state)
    expect_unchanged(model, before)


@pytest.mark.parametrize(
    ("layer", "fields", "message"),
    [
        ("mlp_fc1", pack_svdq(svdq(128, 64)[0]), "256 outputs and 64 inputs .* 128 and 128"),
        ("norm1.linear", pack_awq(awq(384, 128)[0]), "384 outputs and 64 inputs, got 384 and 128"),
        ("qkv_proj", pack_awq(awq(192, 64)[0]), "expected an SVDQuant layer, got an AWQ layer"),
    ],
)
def test_a_layer_of_another_size_or_kind_is_named(layer, fields, message):
    model = flux()
    name = f"{BLOCK}{layer}."
    state = {key: x for key, x in FluxFile(model).state.items() if not key.startswith(name)}
    before = photograph(model)
    with pytest.raises(ValueError, match=f"{layer}.*{message}"):
        load_nunchaku(model, state | {name + field: x for field, x in fields.items()})
    expect_unchanged(model, before)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("transformer_blocks.7.qkv_proj.qweight", r"a linear layer .*7\.attn\.to_q .* got none"),
        (f"{BLOCK}attn.to_qkv.qweight", r"to_qkv\.qweight: expected a linear layer .* got none"),
        (f"{BLOCK}qkv_proj.wcscales", r"wcscales: expected one of .*, got wcscales"),
        (f"{BLOCK}attn.to_q.weight", r"to_q\.weight: expected a tensor .* not quantised, got none"),
        ("y_embedder.weight", r"y_embedder\.weight: expected a tensor .* got none"),
    ],
)
def test_a_key_that_maps_nowhere_is_named_and_the_model_stays(extra, message):
    model = flux()
    state = FluxFile(model).state | {extra: torch.ones(128, 64)}
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        load_nunchaku(model, state)
    expect_unchanged(model, before)


def test_a_bad_file_or_model_is_named(tmp_path):
    model = flux()
    file = FluxFile(model)
    path = tmp_path / "svdq.safetensors"
    save_file(file.state, path)
    path.write_bytes(path.read_bytes()[:-100])
    before = photograph(model)
    with pytest.raises(ValueError, match=r"svdq\.safetensors: expected a whole safetensors file"):
        load_nunchaku(model, path)
    with pytest.raises(ValueError, match=r"none\.safetensors: expected a whole safetensors file"):
        load_nunchaku(model, str(tmp_path / "none.safetensors"))
    with pytest.raises(TypeError, match="source: expected a path or a state dict, got int"):
        load_nunchaku(model, 3)
    with pytest.raises(ValueError, match=r"source: expected packed layers .* got 1 keys"):
        load_nunchaku(model, {"x_embedder.weight": torch.ones(64, 4)})
    hook = model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"attn\.to_q: expected a layer to replace, got it has"):
        load_nunchaku(model, file.state)
    hook.remove()
    expect_unchanged(model, before)
    load_nunchaku(model, file.state)
    with pytest.raises(ValueError, match="expected a layer that is not quantised, got one in w4"):
        load_nunchaku(model, file.state)
