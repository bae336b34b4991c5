"""quantize: what it replaces, what it leaves alone and why, and that undo is exact."""

import weakref

import pytest
import torch
from torch import nn

from fewstep.quantization import Plan, QuantLinear, Scheme, default_skip, quantize


class Scaled(nn.Linear):
    """A subclass with its own forward."""


class Block(nn.Module):
    def __init__(self, width=128):
        super().__init__()
        self.ff1 = nn.Linear(width, 2 * width)
        self.act = nn.GELU()
        self.ff2 = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.ff2(self.act(self.ff1(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.time_embed = nn.Sequential(nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128))
        self.inner = nn.Module()
        self.inner.small = nn.Linear(128, 32)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.scaled = Scaled(128, 128)
        self.proj_out = nn.Linear(128, 128)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


def structure(model):
    """Return every module's identity, in order, with the identities inside."""
    return [
        (name, id(module), [(key, id(child)) for key, child in module._modules.items()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]


def test_replaces_and_says_what_it_left_alone():
    model = Model()
    handle = quantize(model, "w8a8")
    names = ["blocks.0.ff1", "blocks.0.ff2", "blocks.1.ff1", "blocks.1.ff2"]
    assert list(handle.replaced) == names
    assert all(isinstance(model.get_submodule(name), QuantLinear) for name in names)
    assert set(handle.skipped) == {
        "time_embed.0",
        "time_embed.2",
        "inner.small",
        "scaled",
        "proj_out",
    }
    assert "time" in handle.skipped["time_embed.0"]
    assert handle.skipped["inner.small"] == "too small to gain: 128 -> 32"
    assert "Scaled" in handle.skipped["scaled"]
    assert "final projection" in handle.skipped["proj_out"]
    text = handle.explain()
    assert "4 linear layers in w8a8" in text
    assert "too small to gain: 128 -> 32: inner.small" in text


def test_output_is_close_and_undo_is_exact():
    model = Model().eval()
    x = torch.randn(2, 50, 128)
    with torch.no_grad():
        before, want = structure(model), model(x)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        handle = quantize(model, "w8a8")
        got = model(x)
        assert not torch.equal(got, want)
        assert (got - want).norm() / want.norm() < 0.02
        handle.undo()
        assert structure(model) == before
        assert torch.equal(model(x), want)
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
        handle.undo()  # a second time changes nothing
        assert structure(model) == before


def test_context_manager_undoes_after_an_exception():
    model = Model()
    before = structure(model)
    inside = []

    def fail():
        with quantize(model, "w8a8"):
            inside.append(model.blocks[0].ff1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert isinstance(inside[0], QuantLinear)
    assert structure(model) == before


def test_one_layer_in_two_places_stays_one():
    model = Model()
    model.blocks[1].ff1 = model.blocks[0].ff1
    before = structure(model)
    handle = quantize(model, "w8a8")
    assert model.blocks[1].ff1 is model.blocks[0].ff1
    assert handle.replaced["blocks.1.ff1"] is handle.replaced["blocks.0.ff1"]
    handle.undo()
    assert structure(model) == before


def test_one_layer_with_a_reason_in_one_of_its_places_is_left_in_all():
    model = Model()
    model.blocks[1].ff1 = model.blocks[0].ff1
    handle = quantize(
        model, "w8a8", skip=lambda name, linear: "asked" if name == "blocks.1.ff1" else None
    )
    assert handle.skipped["blocks.0.ff1"] == handle.skipped["blocks.1.ff1"] == "asked"


def test_a_shared_parent_is_visited_once():
    model = nn.Sequential(Block(), nn.ReLU())
    model.append(model[0])
    assert list(quantize(model, "w8a8").replaced) == ["0.ff1", "0.ff2"]
    assert model[2].ff1 is model[0].ff1


def test_shared_weights_hooks_and_replaced_forwards_are_left_alone():
    model = Model()
    model.blocks[0].ff2.weight = nn.Parameter(model.blocks[0].ff2.weight.detach().clone())
    embedding = nn.Embedding(256, 128)
    model.embedding = embedding
    model.blocks[0].ff1.weight = embedding.weight
    model.blocks[0].ff2.register_forward_hook(lambda module, args, out: out)
    model.blocks[1].ff1.forward = lambda x: x
    nn.utils.parametrizations.weight_norm(model.blocks[1].ff2)
    model.extra = nn.Linear(128, 128)
    handle = quantize(model, "w8a8")
    assert list(handle.replaced) == ["extra"]
    assert "shared with another module" in handle.skipped["blocks.0.ff1"]
    assert "hooks" in handle.skipped["blocks.0.ff2"]
    assert "forward was replaced" in handle.skipped["blocks.1.ff1"]
    assert "Parametrized" in handle.skipped["blocks.1.ff2"]


def test_lora_layers_are_left_alone():
    class LoraLayer(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base
            self.lora_A = nn.ModuleDict({"default": nn.Linear(128, 256)})

    model = Model()
    model.blocks[0].ff1 = LoraLayer(model.blocks[0].ff1)
    handle = quantize(model, "w8a8")
    assert "LoRA" in handle.skipped["blocks.0.ff1.base_layer"]
    assert "LoRA" in handle.skipped["blocks.0.ff1.lora_A.default"]
    assert "blocks.0.ff2" in handle.replaced


def test_attention_that_bypasses_its_projection_is_left_alone():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(128, 4), "ff": nn.Linear(128, 128)})
    handle = quantize(model, "w8a8")
    assert list(handle.replaced) == ["ff"]
    assert "NonDynamicallyQuantizableLinear" in handle.skipped["attn.out_proj"]


def test_own_skip_replaces_the_default():
    model = Model()
    handle = quantize(model, "w8a8", skip=lambda name, linear: None)
    assert set(handle.skipped) == {"scaled"}
    handle.undo()
    only = quantize(
        model,
        "w8a8",
        skip=lambda name, linear: default_skip(name, linear) or ("no" if "0" in name else None),
    )
    assert list(only.replaced) == ["blocks.1.ff1", "blocks.1.ff2"]


def test_a_failure_changes_nothing():
    model = Model()
    with torch.no_grad():
        model.blocks[1].ff2.weight[3, 3] = float("nan")
    before = structure(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.ff2: linear: expected finite weights"):
        quantize(model, "w8a8")
    assert structure(model) == before


def test_undo_refuses_to_overwrite_someone_elses_change():
    model = Model()
    handle = quantize(model, "w8a8")
    mine, model.blocks[0].ff1 = model.blocks[0].ff1, nn.Identity()
    with pytest.raises(RuntimeError, match=r"blocks\.0\.ff1: expected the QuantLinear.*Identity"):
        handle.undo()
    assert isinstance(model.blocks[1].ff1, QuantLinear)
    model.blocks[0].ff1 = mine
    handle.undo()
    assert type(model.blocks[0].ff1) is nn.Linear


def test_training_flag_is_kept():
    model = Model().eval()
    quantize(model, "w8a8")
    assert not any(module.training for module in model.modules())


def test_state_dict_loads_into_another_quantised_model():
    first, second = Model(), Model()
    x = torch.randn(3, 128)
    for model in (first, second):
        quantize(model, "w8a8")
        model.requires_grad_(False)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x), second(x))


def test_errors_say_what_was_expected():
    with pytest.raises(
        ValueError, match="scheme: expected one of w8a8, fp8, w4a8, w4a16, got 'w4a4'"
    ):
        quantize(Model(), "w4a4")
    with pytest.raises(ValueError, match=r"model: expected .*got a linear layer itself"):
        quantize(nn.Linear(256, 256), "w8a8")
    with pytest.raises(ValueError, match=r"expected at least one nn\.Linear.*Conv2d, got none"):
        quantize(nn.Conv2d(1, 1, 1), "w8a8")
    with pytest.raises(ValueError, match="got 1 linear layer, too small to gain: 8 -> 8: 0"):
        quantize(nn.Sequential(nn.Linear(8, 8)), "w8a8")


def test_bad_layers_are_named_and_nothing_is_changed():
    for spoil, message in (
        (lambda m: m.blocks[1].ff2.weight[3, 5].fill_(float("nan")), "finite weights, got inf or"),
        (lambda m: m.blocks[1].ff2.to("meta"), "got a layer on the meta device"),
        (lambda m: quantize(m.blocks[1], "w8a8"), "not quantised, got one in w8a8"),
        (
            lambda m: setattr(m.blocks[1], "ff2", nn.Linear(250, 128)),
            "multiple of group 64, got 250",
        ),
    ):
        for keep in (True, False):
            model = Model()
            with torch.no_grad():
                spoil(model)
            before = structure(model)
            with pytest.raises(ValueError, match=rf"^blocks\.1\.ff\d: .*{message}"):
                quantize(model, "w4a8", keep_originals=keep)
            assert structure(model) == before


def test_without_originals_their_memory_is_free_at_once(monkeypatch):
    model = Model()
    layers = [layer for block in model.blocks for layer in (block.ff1, block.ff2)]
    weights = [weakref.ref(layer.weight) for layer in layers]
    del layers
    alive, convert = [], QuantLinear.from_linear

    def counting(linear, scheme):
        alive.append(sum(w() is not None for w in weights))
        return convert(linear, scheme)

    monkeypatch.setattr(QuantLinear, "from_linear", counting)
    handle = quantize(model, "w4a8", rank=4, keep_originals=False)
    assert alive == [4, 3, 2, 1]
    assert [w() for w in weights] == [None] * 4
    assert {str(layer.scheme) for layer in handle.replaced.values()} == {"w4a8-g64-r4"}
    with pytest.raises(RuntimeError, match="keep_originals was False"):
        handle.undo()
    other = Model()
    kept = quantize(other, "w4a8-r4")
    assert handle.plan() == kept.plan()


def test_a_plan_gives_each_layer_its_scheme(tmp_path):
    model = Model()
    plan = Plan.of(model, {"blocks.0.ff1": "w8a8", "blocks.1.ff2": "w4a16-g32", "scaled": "w8a8"})
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    handle = quantize(model, plan=plan)
    schemes = {name: str(layer.scheme) for name, layer in handle.replaced.items()}
    assert schemes == {"blocks.0.ff1": "w8a8", "blocks.1.ff2": "w4a16-g32"}
    assert "subclass" in handle.skipped["scaled"] or "Scaled" in handle.skipped["scaled"]
    assert handle.skipped["proj_out"] == "the plan leaves it alone"
    assert handle.plan().layers["blocks.1.ff2"] == Scheme("w4a16", 32)
    handle.undo()
    with pytest.raises(RuntimeError, match="undone handle"):
        handle.plan()


def test_rotation_by_a_block_or_by_the_largest_that_fits():
    model = Model()
    model.blocks[1].ff2 = nn.Linear(250, 128)
    handle = quantize(model, "w8a8", rotate=True)
    for name, layer in handle.replaced.items():
        want = 0 if name == "blocks.1.ff2" else min(layer.in_features, 256)  # 250 = 2 * 125
        assert layer.rotate == want, name
    handle.undo()
    with pytest.raises(ValueError, match=r"blocks.1.ff2: .* multiple of the rotation 64, got 250"):
        quantize(model, "w8a8-h64")
    assert type(model.blocks[1].ff2) is nn.Linear
    with pytest.raises(ValueError, match="rotate: expected 64 as in 'w8a8-h64', got 32"):
        quantize(model, "w8a8-h64", rotate=32)


def test_one_layer_in_two_places_has_one_scheme():
    model = Model()
    model.blocks[1].ff1 = model.blocks[0].ff1
    plan = Plan.of(model, {"blocks.0.ff1": "w8a8", "blocks.1.ff1": "w4a8"})
    with pytest.raises(ValueError, match=r"one scheme for blocks\.0\.ff1 and blocks\.1\.ff1"):
        quantize(model, plan=plan)


def test_skip_may_answer_with_a_bool():
    handle = quantize(Model(), "w8a8", skip=lambda name, _: name != "blocks.0.ff1")
    assert list(handle.replaced) == ["blocks.0.ff1"]
    with pytest.raises(TypeError, match="skip: expected a reason, None or a bool, got 3"):
        quantize(Model(), "w8a8", skip=lambda name, _: 3)
    with pytest.raises(ValueError, match="got one that is compiled"):
        quantize(torch.compile(Model()), "w8a8")


def test_a_plan_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "plan.json"
    Plan.of(Model(), {"proj_out": "w8a8"}).save(path)
    text = path.read_text()
    for broken in (text[: len(text) // 2], "[]", text.replace("w8a8", "w3a3"), ""):
        path.write_text(broken)
        with pytest.raises(ValueError, match=r"plan\.json: "):
            Plan.load(path)


def test_a_plan_for_another_model_is_refused():
    plan = Plan.of(Model(), {"proj_out": "w8a8"})
    other = Model()
    other.proj_out = nn.Linear(128, 64)
    with pytest.raises(ValueError, match=r"layer proj_out of \[128, 128\], got .* \[64, 128\]"):
        quantize(other, plan=plan)
    other = Model()
    other.more = nn.Linear(128, 64)
    with pytest.raises(ValueError, match="got a Model with more besides"):
        quantize(other, plan=plan)
    with pytest.raises(ValueError, match="expected linear layers of Model, got 'ff'"):
        Plan.of(Model(), {"ff": "w8a8"})
    with pytest.raises(ValueError, match="plan: expected model, layers and shapes"):
        Plan.from_dict({"layers": {}})
    with pytest.raises(TypeError, match="plan: expected a Plan, got str"):
        quantize(Model(), plan="plan.json")
    with pytest.raises(ValueError, match="plan: expected no scheme"):
        quantize(Model(), "w8a8", plan=plan)


def test_a_diffusers_transformer():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, in_channels=1, num_layers=2, sample_size=8
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 1, 8, 8),
        "timestep": torch.tensor([5, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    with torch.no_grad():
        want = model(**inputs).sample
        handle = quantize(model, "w8a8")
        got = model(**inputs).sample
        handle.undo()
        assert torch.equal(model(**inputs).sample, want)
    assert "transformer_blocks.0.attn1.to_q" in handle.replaced
    assert "time" in handle.skipped["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"]
    assert "proj_out_2" in handle.skipped
    assert (got - want).norm() / want.norm() < 0.05


def test_undo_follows_moves_casts_and_the_training_flag():
    model = Model().eval()
    linear = model.blocks[0].ff1
    weight = linear.weight
    handle = quantize(model, "w8a8")
    model.to(torch.bfloat16).train()
    handle.undo()
    assert model.blocks[0].ff1 is linear
    assert linear.weight is weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    handle = quantize(model, "w8a8")
    model.to("meta")  # as offloading hooks do: the weights are elsewhere
    handle.undo()
    assert not linear.weight.is_meta


def test_memory_counts_each_layer_once():
    model = Model()
    model.blocks[1] = model.blocks[0]
    handle = quantize(model, "w8a8", skip=lambda name, _: None if "ff" in name else "no")
    before = 4 * (2 * 128 * 256 + 256 + 128) / 2**20
    assert f"took {before:.1f} MiB" in handle.explain()
    handle.undo()
    assert "MiB" not in handle.explain()
