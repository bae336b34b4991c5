"""fewstep's schemes as a diffusers quantisation config: loading, saving, adapters, moves.

Of the checks of diffusers' own test mixin, all but two that don't apply: the number of parameters
(quantised weights are buffers) and modules kept in float32 (these classes have none).
"""

import json

import pytest
import torch
from diffusers import PipelineQuantizationConfig, SD3Transformer2DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from safetensors.torch import load_file, save_file
from torch import nn

import fewstep
from fewstep.assets.digits import load_digits_pipeline
from fewstep.quantization import QuantLinear

SCHEMES = ["w8a8", "w4a8-g64-r8", "w4a16"]
INNER = "transformer_blocks.0.ff.net.2"


def build():
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=2,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=128,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return {
        "hidden_states": draw(2, 4, 8, 8),
        "encoder_hidden_states": draw(2, 7, 32),
        "pooled_projections": draw(2, 32),
        "timestep": torch.tensor([5, 500]),
    }


def quantised(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def stored(model):
    return sum(x.numel() * x.element_size() for x in model.state_dict().values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    build().save_pretrained(path)
    build().save_pretrained(path / "sharded", max_shard_size="300KB")
    return path


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def load(path, scheme, **kwargs):
    config = fewstep.QuantizationConfig(scheme)
    return SD3Transformer2DModel.from_pretrained(path, quantization_config=config, **kwargs)


@torch.no_grad()
def test_quantises_while_loading(folder, scheme):
    plain = SD3Transformer2DModel.from_pretrained(folder)
    model = load(folder, scheme)
    layers = quantised(model)
    assert {str(layer.scheme) for layer in layers.values()} == {
        {"w4a16": "w4a16-g64"}.get(scheme, scheme)
    }
    twin = build()
    assert set(fewstep.quantization.quantize(twin, scheme).replaced) == set(layers)
    want = plain(**inputs()).sample
    got = model(**inputs()).sample
    assert torch.equal(got, twin(**inputs()).sample)
    assert (got - want).norm() < (0.02 if scheme == "w8a8" else 0.2) * want.norm()
    # Layers that are left, and a quarter or a seventh of the others' float32 (and the branch).
    assert stored(model) / stored(plain) < (0.45 if scheme == "w8a8" else 0.4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded_again_to_the_last_bit(folder, scheme, dtype, tmp_path):
    model = load(folder / "sharded", scheme, torch_dtype=dtype)
    assert model.dtype == dtype
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = SD3Transformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    state = again.state_dict()
    for name, value in model.state_dict().items():
        assert value.dtype == state[name].dtype, name
        assert torch.equal(value, state[name]), name
    assert torch.equal(again(**inputs(dtype)).sample, model(**inputs(dtype)).sample)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "fewstep"
    read = DiffusersAutoQuantizer.from_dict(config)
    assert read.to_dict() == model.config.quantization_config.to_dict() == config


def test_layers_can_be_left_out(folder):
    config = fewstep.QuantizationConfig("w8a8", modules_to_not_convert=["ff", "to_q"])
    model = SD3Transformer2DModel.from_pretrained(folder, quantization_config=config)
    assert quantised(model)
    assert not [n for n in quantised(model) if ".ff." in n or n.endswith("to_q")]
    assert isinstance(model.get_submodule(INNER), nn.Linear)
    assert isinstance(model.get_submodule(INNER).weight, nn.Parameter)


@torch.no_grad()
def test_dequantize(folder, scheme, tmp_path):
    model = load(folder, scheme)
    got = model(**inputs()).sample
    plain = model.dequantize()
    assert not quantised(plain)
    want = plain(**inputs()).sample
    assert (got - want).norm() < 0.02 * want.norm()
    plain.save_pretrained(tmp_path)
    assert not quantised(SD3Transformer2DModel.from_pretrained(tmp_path))


@torch.no_grad()
def test_a_whole_pipeline(tmp_path):
    pipe = load_digits_pipeline()
    name = type(pipe)
    pipe.save_pretrained(tmp_path / "plain")
    mapping = {"transformer": fewstep.QuantizationConfig("w4a8", rank=8)}
    config = PipelineQuantizationConfig(quant_mapping=mapping)
    loaded = name.from_pretrained(tmp_path / "plain", quantization_config=config)
    assert quantised(loaded.transformer)
    loaded.save_pretrained(tmp_path / "quantised")
    again = name.from_pretrained(tmp_path / "quantised")
    state = loaded.transformer.state_dict()
    assert all(torch.equal(state[n], t) for n, t in again.transformer.state_dict().items())


@torch.no_grad()
def test_a_model_quantised_in_place_can_be_saved_and_undone(scheme, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "plain")  # writes its class into its own config, once
    before = snapshot_of(model)
    handle = fewstep.quantize(model, scheme)
    want = model(**inputs()).sample
    model.save_pretrained(tmp_path)
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(again(**inputs()).sample, want)
    handle.undo()
    assert snapshot_of(model) == before


def snapshot_of(model):
    modules = {name: id(module) for name, module in model.named_modules()}
    return modules, {name: id(value) for name, value in model.__dict__.items() if value is not True}


def test_trains_an_adapter(folder, scheme):
    peft = pytest.importorskip("peft")
    model = load(folder, scheme)
    model.requires_grad_(False)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    model(**inputs()).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)


def test_lora_loads_scales_switches_and_unloads(folder, scheme, tmp_path):
    peft = pytest.importorskip("peft")
    donor = build()
    for name, seed in (("one", 1), ("two", 2)):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["to_q", "net.2"], init_lora_weights=False)
        donor.add_adapter(config, adapter_name=name)
        donor.save_lora_adapter(tmp_path / name, adapter_name=name)
    model = load(folder, scheme)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(**inputs()).sample
        for name in ("one", "two"):
            model.load_lora_adapter(
                tmp_path / name,
                weight_name="pytorch_lora_weights.safetensors",
                adapter_name=name,
                prefix=None,
            )
        outputs = {}
        for names, weights in (
            (["one"], [1.0]),
            (["two"], [1.0]),
            (["one"], [0.0]),
            (["one", "two"], [0.5, 0.5]),
        ):
            model.set_adapters(names, weights)
            outputs[str((names, weights))] = model(**inputs()).sample
        one, two, none, both = outputs.values()
        assert torch.equal(none, plain)
        assert not torch.equal(one, two)
        assert not torch.equal(both, one)
        with pytest.raises(RuntimeError, match="weight: expected to be read only"):
            model.fuse_lora()
        model.unload_lora()
        assert torch.equal(model(**inputs()).sample, plain)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.fixture(params=["quantised while loading", "loaded again"])
def model_of(request, folder, tmp_path):
    def make(scheme, **kwargs):
        if request.param == "quantised while loading":
            return load(folder, scheme, **kwargs)
        load(folder, scheme).save_pretrained(tmp_path)
        return SD3Transformer2DModel.from_pretrained(tmp_path, **kwargs)

    return make


@torch.no_grad()
def test_moves_and_offloading(model_of, scheme):
    model = model_of(scheme).to("cpu")
    for layer in quantised(model).values():
        layer.cpu().to(torch.bfloat16).float()
    want = model(**inputs()).sample
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(model(**inputs()).sample, want)


@torch.no_grad()
def test_device_map(model_of, folder, scheme):
    want = load(folder, scheme)(**inputs()).sample
    got = model_of(scheme, device_map={"": "cpu"})(**inputs()).sample
    assert (got - want).norm() < 1e-5 * want.norm()  # BLAS's order of sums


@torch.no_grad()
def test_compiles_whole(folder, scheme):
    model = load(folder, scheme)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(**inputs()).sample
    got = compiled(**inputs()).sample
    assert (got - want).norm() < 1e-3 * want.norm()


def test_bad_input_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match="scheme: expected one of w8a8"):
        fewstep.QuantizationConfig("w4a4")
    with pytest.raises(TypeError, match="unknown arguments bits"):
        fewstep.QuantizationConfig("w8a8", bits=4)
    model = build()
    with torch.no_grad():
        model.get_submodule(INNER).weight[3, 3] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=f"{INNER}: .*finite weights, got inf or NaN in row 3"):
        load(tmp_path / "nan", "w8a8")
    load(folder, "w8a8").save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["quantization_config"]["layers"]["w8a8"].append("nowhere")
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="expected a linear layer nowhere in SD3"):
        SD3Transformer2DModel.from_pretrained(tmp_path / "other")


def test_a_file_that_lost_tensors_is_refused_by_name(folder, tmp_path):
    load(folder, "w4a8").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    key = f"{INNER}.weight_scale"
    for change, message in (
        (lambda s: s.pop(key), "expected it among the saved tensors"),
        (lambda s: s.update({key: s[key].float()}), "expected torch.bfloat16 .*got torch.float32"),
        (lambda s: s.update({key: s[key][:-1].clone()}), "expected"),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{key}.*{message}|{message}.*"):
            SD3Transformer2DModel.from_pretrained(tmp_path)
