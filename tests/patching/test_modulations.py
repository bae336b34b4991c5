"""quantize(modulations="group"): which layers share a launch, that no bit changes, and undo."""

import copy
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import fewstep
from fewstep import ops
from fewstep.patching import QuantizationConfig
from fewstep.patching.modulations import GroupedSiLU, GroupedW4A16Linear, group_modulations
from fewstep.quantization.layers import W4A16Linear
from patching import small_sd3
from patching.tiny_pipelines import build, call, denoiser

COUNT = 5  # of the small SD3: two for each of 2 blocks, and the last norm's


def is_modulation(name):
    return ".linear" in name and "norm" in name


def quantize(model, modulations="group"):
    def skip(name, layer):
        return None if is_modulation(name) else "not asked for"

    return fewstep.quantize(model, "w4a16", skip=skip, modulations=modulations)


@pytest.fixture
def model():
    return small_sd3.build()


@pytest.fixture
def launches(monkeypatch):
    """The number of problems of every launch."""
    op, counts = ops.gemv_w4a16_grouped, []
    monkeypatch.setattr(
        ops,
        "gemv_w4a16_grouped",
        lambda x, w, *args, **kwargs: (counts.append(len(w)), op(x, w, *args, **kwargs))[1],
    )
    return counts


@torch.no_grad()
def output(model, **changes):
    return model(**small_sd3.inputs() | changes).sample


def plain(model):
    """The output of a copy whose modulation layers run one by one."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("_modulations", None)
    return output(model)


def test_one_launch_a_forward_and_the_same_bits(model, launches):
    with quantize(model, None):
        alone = output(model)
    handle = quantize(model)
    assert f"{COUNT} modulation layers can share a launch" in handle.explain()
    assert torch.equal(output(model), alone)
    assert launches == []  # who reads what is seen first
    for count in (1, 2):
        assert torch.equal(output(model), alone)
        assert launches == [COUNT] * count


def test_a_pipeline_of_flux(launches, monkeypatch):
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)
    pipe = build("flux")
    how = {"group": 32, "skip": lambda name, layer: not is_modulation(name)}
    with fewstep.quantize(denoiser(pipe), "w4a16", **how):
        alone = call(pipe, num_inference_steps=3)
    with fewstep.quantize(denoiser(pipe), "w4a16", **how, modulations="group"):
        assert torch.equal(call(pipe, num_inference_steps=3), alone)
    assert set(launches) == {7}  # 2 x 2 and 2 of the blocks, and the last norm's


def test_weights_that_change_between_forwards_and_in_one(model):
    quantize(model)
    output(model)
    first = output(model)
    late = model.norm_out.linear
    late.weight_scale.mul_(2)
    changed = output(model)
    assert not torch.equal(changed, first)
    assert torch.equal(changed, plain(model))

    # After the launch, before the layer's turn: in place, and by another tensor.
    def double(*_):
        late.weight_scale.mul_(2)

    def replace(*_):
        late.weight_scale = late.weight_scale * 2

    for change in (double, replace):
        hook = model.transformer_blocks[1].register_forward_pre_hook(change)
        got = output(model)
        hook.remove()
        assert torch.equal(got, plain(model))


def test_an_input_that_is_written_to_is_another_one(model, launches):
    quantize(model)
    output(model)
    temb = []

    def write(*_):
        temb[-1].mul_(2)

    hooks = [
        model.time_text_embed.register_forward_hook(lambda m, args, out: temb.append(out)),
        model.transformer_blocks[1].register_forward_pre_hook(write),
    ]
    got, want = output(model), plain(model)
    assert launches[0] == COUNT
    for hook in hooks:
        hook.remove()
    assert torch.equal(got, want)
    assert not torch.equal(got, output(model))


def test_layers_in_a_lora_stand_apart(model, launches):
    quantize(model)
    output(model)
    config = LoraConfig(r=4, target_modules=r"transformer_blocks\.1\.norm1\.linear")
    inject_adapter_in_model(config, model)
    for name, factor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(factor.data)
    assert torch.equal(output(model), plain(model))
    assert launches == [COUNT - 1]


def test_offloaded_layers_stand_apart(model, launches):
    quantize(model)
    output(model)
    add_hook_to_module(model.transformer_blocks[1], ModelHook())
    assert torch.equal(output(model), plain(model))
    assert launches == [COUNT - 2]


def test_blocks_that_a_cache_skips_in_turns_are_a_launch_of_their_own(model, launches):
    quantize(model)
    every = model.transformer_blocks
    wanted = []
    for blocks in (every, every[:1]):
        model.transformer_blocks = blocks
        wanted.append(plain(model))
    for _ in range(4):
        for blocks, want in zip((every, every[:1]), wanted, strict=True):
            model.transformer_blocks = blocks
            assert torch.equal(output(model), want)
    # One by one; too much once; from then on what both read, and the rest where it is read.
    assert launches == [COUNT, *[COUNT - 2, 2, COUNT - 2] * 3]


def test_what_is_first_read_later_is_learnt_then(model, launches):
    quantize(model)
    every, model.transformer_blocks = model.transformer_blocks, model.transformer_blocks[:1]
    output(model)
    model.transformer_blocks = every
    output(model)
    assert launches == [COUNT - 2]
    output(model)
    assert launches == [COUNT - 2] * 2 + [2]


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_forward_that_fails_leaves_and_teaches_nothing(model, launches, error):
    quantize(model)
    want = output(model)

    def fail(*_):
        raise error

    hook = model.transformer_blocks[0].register_forward_hook(fail)
    with pytest.raises(error):
        output(model)
    hook.remove()
    model.norm_out.linear.bias.add_(1)
    assert torch.equal(output(model), plain(model))
    assert not torch.equal(output(model), want)
    assert launches == [COUNT] * 3


def test_a_copied_layer_in_a_forward_stands_apart(model, launches):
    quantize(model)
    output(model)
    norm = model.transformer_blocks[0].norm1
    norm.linear = copy.copy(norm.linear)
    assert torch.equal(output(model), plain(model))
    assert launches == [COUNT - 1]


def test_outside_of_a_forward_layers_run_by_themselves(model, launches):
    quantize(model)
    output(model)
    norm, temb = model.norm_out, torch.randn(2, 128)
    norm(torch.randn(2, 3, 128), temb)
    assert launches == []
    assert norm.silu(temb) is not norm.silu(temb)


def test_gradients_are_those_of_layers_by_themselves(model, launches):
    def gradient():
        pooled = torch.ones(2, 32).requires_grad_()
        out = model(**small_sd3.inputs() | {"pooled_projections": pooled}).sample
        return torch.autograd.grad(out.sum(), pooled)[0]

    with quantize(model, None):
        want = gradient()
    with quantize(model):
        output(model)
        launches.clear()
        assert torch.equal(gradient(), want)
        assert launches == []


def test_a_compiled_model_runs_its_layers_by_themselves(model, launches):
    quantize(model)
    want = output(model)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(output(compiled), want)
    assert launches == []


def test_autocast_and_inference_mode_change_nothing(model):
    with quantize(model, None), torch.autocast("cpu", torch.bfloat16):
        want = output(model)
    with quantize(model):
        alone = output(model)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(output(model), output(model))
            assert torch.equal(output(model), want)
        with torch.inference_mode():
            assert torch.equal(model(**small_sd3.inputs()).sample, alone)


class Stack(nn.Module):
    """Blocks of (silu, linear) that read temb as it is given."""

    def __init__(self, make):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(make(nn.SiLU(), nn.Linear(128, 64)) for _ in range(3))

    @torch.no_grad()
    def forward(self, temb):
        return torch.cat([block(temb) for block in self.blocks], -1)


class Own(nn.Module):
    """A block that nobody knows: its silu may be written to."""

    def __init__(self, silu, linear):
        super().__init__()
        self.silu, self.linear = silu, linear

    def forward(self, temb):
        return self.linear(self.silu(temb).mul_(2))


def test_explain_counts_what_happened():
    stack = Stack(nn.Sequential)
    fewstep.quantize(stack, "w4a16", skip=lambda *_: None)
    handle = group_modulations(stack)
    assert "launches" not in handle.explain()
    for rows in (1, 1, 1, 16):  # more rows than one launch takes
        stack(torch.ones(rows, 128))
    assert handle.explain().endswith("launches so far: 2 of 3 layers")


def test_an_input_from_outside_of_inference_mode(launches):
    stack, temb = Stack(nn.Sequential), torch.randn(1, 128)
    fewstep.quantize(stack, "w4a16", skip=lambda *_: None, modulations="group")
    want = stack(temb)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(stack(temb), want)
    assert launches == []
    assert torch.equal(stack(temb), want)
    assert launches == [3]


def test_blocks_that_are_not_known_stand_apart(launches):
    stack, temb = Stack(Own), torch.randn(1, 128)
    given = {"skip": lambda *_: None}
    with fewstep.quantize(stack, "w4a16", **given):
        want = stack(temb)
    handle = fewstep.quantize(stack, "w4a16", **given, modulations="group")
    assert "3 modulation layers, what Own does with its silu is not known" in handle.explain()
    assert torch.equal(stack(temb), want)
    assert torch.equal(stack(temb), want)
    assert launches == []


def test_who_groups_again_is_told(model):
    quantize(model)
    again = group_modulations(model)
    assert again.explain() == f"left alone: {COUNT} modulation layers, grouped already"
    copied = group_modulations(copy.deepcopy(model))
    assert set(copied.left.values()) == {"in a copy of a grouped model"}
    assert "no modulation layers" in group_modulations(nn.Linear(2, 2)).explain()


def test_copies_run_their_layers_by_themselves(model, launches):
    quantize(model)
    want = output(model)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(made), want)
        assert torch.equal(output(made), want)
        made.dequantize()
        assert not made._forward_hooks
        assert not any(isinstance(m, GroupedSiLU) for m in made.modules())
    assert model._forward_hooks
    layer = copy.deepcopy(model.norm_out.linear)
    assert layer.__dict__["_modulations"] is None
    assert launches == []


def test_undo_puts_back_what_was_there(model):
    with quantize(model, None):
        names, want = list(model.state_dict()), output(model)
    before = [(type(m), m, sorted(m.__dict__)) for m in model.modules()]
    handle = quantize(model)
    kinds = [type(m) for m in model.modules()]
    assert kinds.count(GroupedW4A16Linear) == kinds.count(GroupedSiLU) == COUNT
    assert list(model.state_dict()) == names
    assert torch.equal(output(model), want)
    layers = list(handle.replaced.values())
    handle.undo()
    assert {type(layer) for layer in layers} == {W4A16Linear}
    assert [(type(m), m, sorted(m.__dict__)) for m in model.modules()] == before
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_layers_in_other_schemes_are_left_alone(model):
    skip = None
    with fewstep.quantize(model, "w8a8", skip=skip, modulations="group") as handle:
        assert "can share a launch" not in handle.explain()
        assert "modulation layers, w8a8" in handle.explain()
    with fewstep.quantize(model, "w4a16", rank=4, modulations="group") as handle:
        assert "it has a low-rank branch" in handle.explain()
    with pytest.raises(ValueError, match="modulations: expected None or one of group, got 'all'"):
        quantize(model, "all")
    assert not any(isinstance(m, GroupedW4A16Linear) for m in model.modules())


def test_config_keeps_it():
    config = QuantizationConfig("w4a16", modulations="group")
    assert config.to_dict()["modulations"] == "group"
    assert QuantizationConfig.from_dict(config.to_dict()).fusions.modulations == "group"
