"""time="cache" while weights, modules, hooks and kept values change: nothing old is used."""

import pytest
import torch
from torch import nn

import fewstep
from patching.timed import kept, run
from patching.tiny_pipelines import BUILDERS, build, denoiser


def _load(module):
    module.load_state_dict({k: 0.5 * v for k, v in module.state_dict().items()})


def _in_place(module):
    with torch.no_grad():
        next(module.parameters()).mul_(0.5)


def _data(module):
    for parameter in module.parameters():
        parameter.data *= 0.5


def _new_data(module):
    for parameter in module.parameters():
        parameter.data = 0.5 * parameter.data


def _new_parameters(module):
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            setattr(child, name, nn.Parameter(0.5 * parameter.detach()))


def _round(module):
    module.to(torch.bfloat16).to(torch.float32)


def _replace(module):
    for child in module.modules():
        for name, part in list(child.named_children()):
            if isinstance(part, nn.Linear):
                child._modules[name] = nn.Linear(part.in_features, part.out_features)


CHANGES = [_load, _in_place, _data, _new_data, _new_parameters, _round, _replace]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["digits", "pixart", "sd-unet"])
def test_other_weights_are_seen(name, change):
    pipe = build(name)
    with fewstep.patch(pipe, time="cache"):
        before = run(pipe)
        change(kept(pipe, name))
        after = run(pipe)
        again = run(pipe)
    plain = run(pipe)
    assert not torch.equal(after, before)
    assert torch.equal(after, plain)
    assert torch.equal(again, plain)


def test_a_lora_on_the_embedding_loads_scales_fuses_and_goes():
    """What peft fuses goes through `.data`, and nothing is left of it in the modules then."""
    from peft import LoraConfig

    pipe, twin = build("sana"), build("sana")
    config = LoraConfig(r=2, target_modules=["linear_2", "time_embed.linear"])

    def change(action):
        for one in (pipe, twin):
            action(one.transformer)
        images = [run(pipe), run(pipe), run(twin)]
        assert torch.equal(images[0], images[2])
        assert torch.equal(images[1], images[2])
        return images[2]

    def load(model):
        model.add_adapter(config)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                torch.nn.init.constant_(parameter, 0.3)

    def fuse(model):
        model.fuse_lora()
        model.unload_lora()

    with fewstep.patch(pipe, time="cache") as patch:
        plain = change(lambda model: None)
        loaded = change(load)
        assert any("in it" in reason for reason in patch.report()["time"]["not_kept"])
        assert not torch.equal(change(lambda model: model.set_adapters("default", 0.5)), loaded)
        assert torch.equal(change(lambda model: model.disable_adapters()), plain)
        change(lambda model: model.enable_adapters())
        assert not torch.equal(change(fuse), plain)


@pytest.mark.parametrize("targets", [["linear_1", "linear_2"], ["time_emb_proj"]])
def test_a_lora_on_a_unet_loads_and_scales(targets):
    """What is behind the embedding sees the embedding of now."""
    from peft import LoraConfig

    pipe = build("sd-unet")
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    with fewstep.patch(pipe, time="cache"):
        plain = run(pipe)
        pipe.unet.add_adapter(config)
        loaded = run(pipe)
        pipe.unet.set_adapters("default", 0.3)
        weak = run(pipe)
    assert torch.equal(weak, run(pipe))
    pipe.unet.set_adapters("default", 1.0)
    assert torch.equal(loaded, run(pipe))
    assert not torch.equal(loaded, plain)
    assert not torch.equal(loaded, weak)


def _hook_inside(model):
    model.time_embedding.linear_1.register_forward_hook(lambda _, args, output: output * 0.5)


def _hook_behind(model):
    model.time_embedding.register_forward_hook(lambda _, args, output: output * 0.5)


def _hook_before(model):
    model.time_embedding.register_forward_pre_hook(lambda _, args: (args[0] * 0.5, *args[1:]))


def _hook_of_a_resnet(model):
    model.down_blocks[0].resnets[0].register_forward_pre_hook(
        lambda _, args: (args[0], args[1] * 0.5, *args[2:])
    )


def _activation(model):
    model.time_embedding.act = nn.Identity().eval()


def _activation_of_a_resnet(model):
    model.down_blocks[0].resnets[0].nonlinearity = nn.Identity().eval()


def _flip(model):
    model.time_proj.flip_sin_to_cos = not model.time_proj.flip_sin_to_cos


def _shift(model):
    model.time_proj.downscale_freq_shift = 1 - model.time_proj.downscale_freq_shift


def _scale(model):
    model.time_proj.scale = 2


def _quantize(model):
    fewstep.quantize(model, "w8a8", skip=lambda name, _: not name.startswith("time_embedding"))


MODEL_CHANGES = [
    _hook_inside,
    _hook_behind,
    _hook_before,
    _hook_of_a_resnet,
    _activation,
    _activation_of_a_resnet,
    _flip,
    _shift,
    _scale,
    _quantize,
]


@pytest.mark.parametrize("change", MODEL_CHANGES)
def test_other_modules_attributes_and_hooks_are_seen(change, monkeypatch):
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)
    pipe = build("sd-unet")
    with fewstep.patch(pipe, time="cache"):
        before = run(pipe)
        change(pipe.unet)
        images = [run(pipe), run(pipe)]
    plain = run(pipe)
    assert not torch.equal(plain, before)
    assert torch.equal(images[0], plain)
    assert torch.equal(images[1], plain)


@pytest.mark.parametrize("name", sorted(BUILDERS))
def test_a_hook_after_the_patch_that_gives_another_time_is_seen(name):
    pipe = build(name)

    def halve(module, args, kwargs):
        if "timestep" in kwargs:
            return args, {**kwargs, "timestep": kwargs["timestep"] * 0.5}
        return (args[0], args[1] * 0.5, *args[2:]), kwargs

    with fewstep.patch(pipe, time="cache") as patch:
        before = run(pipe)
        denoiser(pipe).register_forward_pre_hook(halve, with_kwargs=True)
        images = [run(pipe), run(pipe)]
        assert patch.report()["time"]["saved"] > 0
    plain = run(pipe)
    assert not torch.equal(plain, before)
    assert torch.equal(images[0], plain)
    assert torch.equal(images[1], plain)


def test_a_value_that_is_written_to_is_computed_again():
    pipe = build("pixart")
    plain = run(pipe)

    def write(module, args, output):
        # After the cache: what a model does with the values it is given.
        written.append(output[0])

    written = []
    with fewstep.patch(pipe, time="cache"):
        handle = kept(pipe, "pixart").register_forward_hook(write)
        run(pipe)
        handle.remove()
        with torch.no_grad():
            written[0].zero_()
        assert torch.equal(run(pipe), plain)
