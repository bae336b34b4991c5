"""LoRAs on quantised models through diffusers' loaders; the layer: quantization/test_lora.py."""

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file

import fewstep
from fewstep.quantization.lora import Linear
from patching.small_sd3 import SCHEMES, build, inputs
from patching.tiny_pipelines import sd3

peft = pytest.importorskip("peft")
from peft.tuners import lora  # noqa: E402

FILE = "pytorch_lora_weights.safetensors"
RANKS = {"one": 4, "two": 3}


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with two adapters, as `save_lora_weights` writes them."""
    path, donor = tmp_path_factory.mktemp("adapters"), build()
    for seed, (name, rank) in enumerate(RANKS.items()):
        torch.manual_seed(seed)
        targets = ["to_q", "net.2"]
        config = peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        donor.add_adapter(config, adapter_name=name)
        state = peft.get_peft_model_state_dict(donor, adapter_name=name)
        StableDiffusion3Pipeline.save_lora_weights(path / name, transformer_lora_layers=state)
    return path


def pipeline(scheme):
    pipe, model = sd3(), build()
    fewstep.quantize(model, scheme)
    pipe.register_modules(transformer=model)
    return pipe


def output(pipe):
    with torch.no_grad():
        return pipe.transformer(**inputs()).sample


def pefts(pipe):
    """Return the output with every LoRA beside its layer, as peft's own class computes it."""
    layers = [m for m in pipe.transformer.modules() if type(m) is Linear]
    assert layers
    for layer in layers:
        layer.__class__ = lora.Linear
    got = output(pipe)
    for layer in layers:
        layer.__class__ = Linear
    return got


def close(got, want):
    # Sums in another order; a last bit of an activation may then fall to another int8 neighbour.
    return (got - want).norm() < 1e-3 * want.norm()


def test_loads_scales_switches_and_unloads(scheme, files):
    pipe = pipeline(scheme)
    model = pipe.transformer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    plain = output(pipe)
    for name in RANKS:
        pipe.load_lora_weights(files / name, adapter_name=name)
    outputs = []
    for names, weights in (
        (["one"], [1.0]),
        (["two"], [1.0]),
        (["one"], [-0.5]),
        (["one", "two"], [0.5, 2.0]),
    ):
        pipe.set_adapters(names, weights)
        outputs.append(output(pipe))
        assert close(outputs[-1], pefts(pipe))
    for i, one in enumerate(outputs):
        assert not any(close(one, other) for other in [plain, *outputs[i + 1 :]])
    pipe.set_adapters(["one"], [0.0])
    assert torch.equal(output(pipe), plain)
    pipe.set_adapters(["one", "two"], [0.5, 2.0])
    pipe.disable_lora()
    assert torch.equal(output(pipe), plain)
    pipe.enable_lora()
    assert torch.equal(output(pipe), outputs[-1])
    pipe.delete_adapters("two")
    pipe.set_adapters("one", 1.0)
    assert torch.equal(output(pipe), outputs[0])
    with pytest.raises(RuntimeError, match="weight: expected to be read only"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(output(pipe), plain)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_swaps_in_place(scheme, files):
    pipe, other = pipeline(scheme), pipeline(scheme)
    other.load_lora_weights(files / "two", adapter_name="one")
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(files / "one", adapter_name="one")
    first, layers = output(pipe), dict(pipe.transformer.named_modules())
    pipe.load_lora_weights(files / "two", adapter_name="one", hotswap=True)
    assert dict(pipe.transformer.named_modules()) == layers
    assert not close(output(pipe), first)
    assert close(output(pipe), output(other))


def test_files_hold_what_was_loaded(scheme, files, tmp_path):
    pipe = pipeline(scheme)
    pipe.load_lora_weights(files / "one", adapter_name="one")
    output(pipe)
    state = peft.get_peft_model_state_dict(pipe.transformer, adapter_name="one")
    pipe.save_lora_weights(tmp_path, transformer_lora_layers=state)
    saved, loaded = load_file(tmp_path / FILE), load_file(files / "one" / FILE)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], value) for name, value in loaded.items())


@pytest.mark.parametrize("kind", ["leaf_level", "block_level", "sequential"])
def test_under_offloading(kind, files):
    pipe = pipeline("w4a8-g64-r8")
    model, device = pipe.transformer, torch.device("cpu")
    pipe.load_lora_weights(files / "one", adapter_name="one")
    want = output(pipe)
    if kind == "sequential":
        cpu_offload(model, execution_device=device)
        assert next(model.parameters()).is_meta
        assert close(output(pipe), want)
        remove_hook_from_submodules(model)
    else:
        model.enable_group_offload(device, offload_type=kind, num_blocks_per_group=1)
        got = output(pipe)
        # Leaves are moved one by one, so each factor is called; a block is there as a whole.
        assert close(got, want) if kind == "leaf_level" else torch.equal(got, want)


def test_trains_an_adapter(scheme):
    model = build()
    fewstep.quantize(model, scheme)
    model.requires_grad_(False)
    model.add_adapter(
        peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    model(**inputs()).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().sum() > 0 for p in trained)
