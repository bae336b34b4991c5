"""fewstep's schemes as a diffusers quantisation config: loading, saving, adapters, moves.

Every check of diffusers' own test mixin for quantisers is here; those of adapters that peft loads
are in test_lora.py.
"""

import copy
import json
import pickle
from typing import ClassVar

import pytest
import torch
from accelerate import cpu_offload
from diffusers import PipelineQuantizationConfig, SD3Transformer2DModel
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from safetensors.torch import load_file, save_file
from torch import nn

import fewstep
from fewstep.assets.digits import load_digits_pipeline
from patching.small_sd3 import INNER, SCHEMES, build, inputs, load, quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    build().save_pretrained(path)
    build().save_pretrained(path / "sharded", max_shard_size="300KB")
    return path


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@torch.no_grad()
def test_quantises_while_loading(folder, scheme):
    plain = SD3Transformer2DModel.from_pretrained(folder)
    model = load(folder, scheme)
    layers = quantised(model)
    assert {str(layer.scheme) for layer in layers.values()} == {
        {"w4a16": "w4a16-g64"}.get(scheme, scheme)
    }
    twin = build()
    assert set(fewstep.quantize(twin, scheme).replaced) == set(layers)
    want = plain(**inputs()).sample
    got = model(**inputs()).sample
    assert torch.equal(got, twin(**inputs()).sample)
    assert (got - want).norm() < (0.02 if scheme == "w8a8" else 0.2) * want.norm()
    # Layers that are left, and a quarter or a seventh of the others' float32 (and the branch).
    assert model.get_memory_footprint() / plain.get_memory_footprint() < (
        0.45 if scheme in ("w8a8", "fp8") else 0.4
    )


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


def test_counts_parameters_as_before(folder, scheme):
    plain, model = build(), load(folder, scheme)
    whole = plain.num_parameters()
    assert model.num_parameters() == whole
    assert model.num_parameters(only_trainable=True) < whole
    assert copy.deepcopy(model).num_parameters() == whole
    assert pickle.loads(pickle.dumps(model)).num_parameters() == whole
    assert model.dequantize().num_parameters() == whole
    assert "num_parameters" not in model.__dict__
    handle = fewstep.quantize(plain, scheme)
    assert plain.num_parameters() == whole
    plain.add_module("more", nn.Linear(3, 4))
    assert plain.num_parameters() == whole + 16
    del plain.more
    handle.undo()
    assert plain.num_parameters() == whole
    assert "num_parameters" not in plain.__dict__


def test_a_cast_of_the_model_is_refused(folder, scheme):
    model = load(folder, scheme)
    for cast in (
        lambda: model.to(torch.float16),
        lambda: model.to(device="cpu", dtype=torch.float16),
        model.float,
        model.half,
    ):
        with pytest.raises(ValueError, match="quantized model"):
            cast()
    model.to("cpu")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_dtype_before_is_recorded(folder, dtype):
    model = load(folder, "w8a8", torch_dtype=dtype)
    assert model.config["_pre_quantization_dtype"] == (dtype or torch.float32)
    config = model.config["quantization_config"]
    assert config.to_dict()["scheme"] == config.to_diff_dict()["scheme"] == "w8a8"
    assert json.loads(config.to_json_string())["scheme"] == "w8a8"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({}, {}),
        ({"activations": "fuse", "norms": None}, {}),
        ({"activations": None}, {"activations": None}),
        (
            {"norms": "share", "layers": {"w8a8": ["a"]}},
            {"norms": "share", "layers": {"w8a8": ["a"]}},
        ),
    ],
)
def test_shows_what_differs_from_the_defaults(given, shown):
    config = fewstep.QuantizationConfig("w8a8", **given)
    always = {"quant_method": "fewstep", "scheme": "w8a8"}
    assert config.to_diff_dict() == always | shown
    assert DiffusersAutoQuantizer.from_dict(config.to_diff_dict()).to_dict() == config.to_dict()


class KeepsFloat32(SD3Transformer2DModel):
    _keep_in_fp32_modules: ClassVar[list[str]] = ["ff_context"]


def test_modules_kept_in_float32(folder, scheme):
    model = load(folder, scheme, KeepsFloat32, torch_dtype=torch.bfloat16)
    kept = {n: m for n, m in model.named_modules() if "ff_context" in n and hasattr(m, "weight")}
    assert kept
    for name, module in kept.items():
        assert module.weight.dtype == torch.float32, name
        assert name not in quantised(model)
    assert {m.weight_dtype for m in quantised(model).values()} == {torch.bfloat16}


def test_layers_can_be_left_out(folder):
    config = fewstep.QuantizationConfig("w8a8", modules_to_not_convert=["ff", "to_q"])
    model = SD3Transformer2DModel.from_pretrained(folder, quantization_config=config)
    assert quantised(model)
    assert not [n for n in quantised(model) if ".ff." in n or n.endswith("to_q")]
    assert isinstance(model.get_submodule(INNER), nn.Linear)
    assert isinstance(model.get_submodule(INNER).weight, nn.Parameter)
    assert model.get_memory_footprint() > load(folder, "w8a8").get_memory_footprint()
    with torch.no_grad():
        assert model(**inputs()).sample.isfinite().all()


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


@torch.no_grad()
def test_undo_after_dequantize_puts_the_very_layers_back():
    model = build()
    model.register_to_config(_name_or_path="")  # what the first registration adds
    before, kinds = snapshot_of(model), [type(module) for module in model.modules()]
    plain = model(**inputs()).sample
    handle = fewstep.quantize(model, "w8a8", norms="fuse")
    want = model(**inputs()).sample
    model.dequantize()
    assert [type(module) for module in model.modules()] == kinds
    got = model(**inputs()).sample
    assert (got - want).norm() < 0.02 * want.norm()
    assert not torch.equal(got, plain)
    model.to(torch.bfloat16)
    again = fewstep.quantize(model, "w4a8")
    with pytest.raises(RuntimeError, match="expected the QuantLinear put there by quantize"):
        handle.undo()
    assert model.hf_quantizer.quantization_config.scheme == "w4a8-g64"
    again.undo()
    handle.undo()
    assert snapshot_of(model) == before
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert torch.equal(
        model.float()(**inputs()).sample, build().bfloat16().float()(**inputs()).sample
    )


def test_undo_leaves_what_another_call_has_quantised_since():
    model = build()
    handle = fewstep.quantize(model, "w8a8", skip=lambda name, _: not name.endswith("to_q"))
    model.dequantize()
    again = fewstep.quantize(model, "w8a8", skip=lambda name, _: not name.endswith("to_k"))
    quantizer, config = model.hf_quantizer, model.config
    handle.undo()
    assert model.hf_quantizer is quantizer
    assert model.config is config
    assert set(quantised(model)) == set(again.replaced)


def test_without_originals_dequantize_is_the_way_back():
    model = build()
    kinds = [type(module) for module in model.modules()]
    handle = fewstep.quantize(model, "w8a8", norms="fuse", keep_originals=False)
    model.dequantize()
    assert [type(module) for module in model.modules()] == kinds
    with pytest.raises(RuntimeError, match="keep_originals was False"):
        handle.undo()


@pytest.fixture(params=["quantised while loading", "loaded again"])
def model_of(request, folder, tmp_path):
    def make(scheme, **kwargs):
        if request.param == "quantised while loading":
            return load(folder, scheme, **kwargs)
        load(folder, scheme).save_pretrained(tmp_path)
        return SD3Transformer2DModel.from_pretrained(tmp_path, **kwargs)

    return make


@torch.no_grad()
@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "disk", "sequential"])
def test_offloading(model_of, kind, tmp_path):
    model = model_of("w4a8-g64-r8").to("cpu")
    for layer in quantised(model).values():
        layer.cpu().to(torch.bfloat16).float()
    want, device = model(**inputs()).sample, torch.device("cpu")
    if kind == "sequential":
        # Without offload_buffers, as in diffusers' pipelines, quantised weights stay on the device.
        cpu_offload(model, execution_device=device, offload_buffers=True)
        assert all(layer.quantized.is_meta for layer in quantised(model).values())
    else:
        disk = str(tmp_path) if kind == "disk" else None
        level = "leaf_level" if kind == "disk" else kind
        model.enable_group_offload(
            device, offload_type=level, num_blocks_per_group=1, offload_to_disk_path=disk
        )
    for _ in range(2):
        assert torch.equal(model(**inputs()).sample, want)


@torch.no_grad()
def test_what_moves_under_the_model_is_noticed(folder, scheme):
    # Offloading writes memory into buffers that stay the same objects, and back.
    model = load(folder, scheme)
    want = model(**inputs()).sample
    for layer in quantised(model).values():
        for buffer in layer.buffers():
            buffer.data = buffer.data.clone()
    assert torch.equal(model(**inputs()).sample, want)
    for layer in quantised(model).values():
        layer.quantized.data = torch.zeros_like(layer.quantized)
    zero = copy.deepcopy(model)(**inputs()).sample
    assert torch.equal(model(**inputs()).sample, zero)
    assert not torch.equal(zero, want)


@torch.no_grad()
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu", "auto"], ids=str)
def test_device_map(model_of, folder, scheme, device_map):
    want = load(folder, scheme)(**inputs()).sample
    model = model_of(scheme, device_map=device_map)
    assert {torch.device(d).type for d in model.hf_device_map.values()} == {"cpu"}
    assert model.device.type == "cpu"
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert not [name for name, x in tensors if x.device.type != "cpu"]
    got = model(**inputs()).sample
    assert (got - want).norm() < 1e-5 * want.norm()  # BLAS's order of sums


class Adapter(nn.Module):
    """A LoRA of someone who does not use peft."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.factors = nn.Sequential(
            nn.Linear(layer.in_features, 4, bias=False),
            nn.Linear(4, layer.out_features, bias=False),
        ).to(layer.weight.device)
        nn.init.zeros_(self.factors[1].weight)

    def forward(self, x):
        return self.layer(x) + self.factors(x)


def test_training_of_wrapped_layers_under_autocast(folder, scheme):
    model = load(folder, scheme, torch_dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.requires_grad = False
        if parameter.ndim == 1:
            parameter.data = parameter.data.float()
    for block in model.transformer_blocks:
        for name in ("to_q", "to_k", "to_v"):
            setattr(block.attn, name, Adapter(getattr(block.attn, name)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs(torch.bfloat16)).sample.norm().backward()
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    assert len(adapters) == 6
    assert all(m.factors[1].weight.grad.norm() > 0 for m in adapters)


@torch.no_grad()
def test_compiles_whole(folder):
    model = load(folder, "w4a8-g64-r8")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(**inputs()).sample
    got = compiled(**inputs()).sample
    assert (got - want).norm() < 1e-3 * want.norm()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(compiled(**inputs()).sample, got)


def test_one_config_serves_several_models(folder, tmp_path):
    config = fewstep.QuantizationConfig("w8a8")
    first = SD3Transformer2DModel.from_pretrained(folder, quantization_config=config)
    described = first.config.quantization_config
    assert described is not config
    assert not config.layers
    config.layers = {"w8a8": ["elsewhere"]}
    first.save_pretrained(tmp_path)
    assert SD3Transformer2DModel.from_pretrained(tmp_path).config.quantization_config


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
        (lambda s: s.update({key: s[key] * float("nan")}), "expected finite scales .*got inf or"),
        (lambda s: s.update({key: -s[key]}), "expected finite scales .*got a negative one"),
    ):
        changed = dict(state)
        change(changed)
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"{key}.*{message}"):
            SD3Transformer2DModel.from_pretrained(tmp_path)


def test_a_file_that_is_cut_off_is_named(folder, tmp_path):
    load(folder, "w4a8").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    whole = path.read_bytes()
    for size in (4, 300, len(whole) - 100):
        path.write_bytes(whole[:size])
        with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
            SD3Transformer2DModel.from_pretrained(tmp_path)


def test_inputs_that_no_group_divides_are_named(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"attention_head_dim": 48, "caption_projection_dim": 96}
    SD3Transformer2DModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"transformer_blocks.*multiple of group 64, got 96"):
        load(tmp_path, "w4a8")


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w8a8-smooth", "w4a8-g64-r8-smooth"])
def test_smoothed_layers_are_saved_and_loaded_again_to_the_last_bit(scheme, tmp_path):
    model = build()
    calibration = fewstep.quantization.calibrate(model, [inputs()], rows=32)
    fewstep.quantize(model, scheme, smooth=calibration)
    model.save_pretrained(tmp_path)
    again = SD3Transformer2DModel.from_pretrained(tmp_path)
    assert {str(layer.scheme) for layer in quantised(again).values()} == {scheme}
    assert torch.equal(again(**inputs()).sample, model(**inputs()).sample)
