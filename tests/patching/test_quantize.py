"""quantize="w8a8" through patch: what is replaced, what it does to the image, and undo."""

import copy
import inspect

import pytest
import torch

import fewstep
from fewstep import quantization
from fewstep.patching import PatchError, active_patches
from fewstep.quantization import QuantLinear, calibrate
from patching.snapshot import snapshot
from patching.tiny_pipelines import BUILDERS, build, call, denoiser


@pytest.fixture
def small_layers(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


def quantised(pipe):
    return [name for name, m in denoiser(pipe).named_modules() if isinstance(m, QuantLinear)]


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.usefixtures("small_layers")
def test_int8_layers_in_the_denoiser(name):
    pipe = build(name)
    plain = call(pipe, num_inference_steps=2)
    with fewstep.patch(pipe, quantize="w8a8") as patch:
        names = quantised(pipe)
        image = call(pipe, num_inference_steps=2)
        assert f"{len(names)} linear layers" in patch.explain()
    assert names
    assert not quantised(pipe)
    assert not torch.equal(image, plain)
    # W8A8 errs by about 1 % per layer; random weights carry that through at most a dozen of them.
    error = (image - plain).norm() / plain.norm()
    assert error < 0.25
    assert torch.equal(call(pipe, num_inference_steps=2), plain)


@pytest.mark.usefixtures("small_layers")
def test_all_features_together():
    pipe = build("digits")
    with fewstep.patch(pipe, steps=6, quantize="w8a8", cache="interval", guidance="off") as patch:
        assert call(pipe).isfinite().all()
        assert patch.features == ("steps", "guidance", "quantize", "cache")
        assert patch.report()["cache"]["skipped"] == 2
    assert not quantised(pipe)


def test_a_model_with_nothing_to_gain_is_refused_and_unchanged():
    pipe = build("sd3")
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"expected at least one nn.Linear .* too small to gain"):
        fewstep.patch(pipe, steps=2, quantize="w8a8", cache="interval")
    assert snapshot(pipe) == before


@pytest.mark.usefixtures("small_layers")
def test_a_layer_replaced_later_is_not_thrown_away():
    pipe = build("digits")
    patch = fewstep.patch(pipe, steps=2, quantize="w8a8")
    name = quantised(pipe)[0]
    parent = denoiser(pipe).get_submodule(name.rpartition(".")[0])
    key = name.rpartition(".")[2]
    ours, parent._modules[key] = parent._modules[key], torch.nn.Identity()
    for force in (False, True):
        with pytest.raises(PatchError, match=name.replace(".", r"\.")):
            patch.undo(force=force)
    parent._modules[key] = ours
    patch.undo()
    assert not quantised(pipe)


@pytest.mark.usefixtures("small_layers")
def test_undo_follows_a_cast_made_while_quantised():
    pipe = build("digits")
    with fewstep.patch(pipe, quantize="w8a8"):
        assert all(p.dtype == torch.float32 for p in denoiser(pipe).parameters())
        pipe.to(torch.bfloat16)
        assert call(pipe).isfinite().all()
    assert {p.dtype for p in denoiser(pipe).parameters()} == {torch.bfloat16}
    cast = build("digits").to(torch.bfloat16)
    assert torch.equal(call(pipe), call(cast))


@pytest.mark.usefixtures("small_layers")
def test_a_deep_copy_stays_quantised():
    pipe = build("digits")
    patch = fewstep.patch(pipe, quantize="w8a8", steps=2)
    image = call(pipe)
    twin = copy.deepcopy(pipe)
    patch.undo()
    assert active_patches(twin) == []
    assert quantised(twin)
    assert torch.equal(call(twin), image)


@pytest.mark.usefixtures("small_layers")
def test_explain_says_what_it_costs_and_gains():
    pipe = build("digits")
    with fewstep.patch(pipe, quantize="w8a8") as patch:
        text, names = patch.explain(), quantised(pipe)
    layers = [denoiser(pipe).get_submodule(name) for name in names]
    before = sum(4 * p.numel() for module in layers for p in module.parameters()) / 2**20
    assert f"their weights took {before:.1f} MiB and take" in text
    assert "the original layers are kept for undo" in text


@pytest.mark.usefixtures("small_layers")
def test_plans_and_smoothing_come_through(tmp_path):
    pipe = build("digits")
    plain = call(pipe, num_inference_steps=2)
    calibration = calibrate(pipe, [{"class_labels": [1, 2], "num_inference_steps": 2}])
    calibration.save(tmp_path / "seen.safetensors")
    with fewstep.patch(pipe, quantize="w8a8-smooth", smooth=calibration) as patch:
        layers = [m for m in denoiser(pipe).modules() if isinstance(m, QuantLinear)]
        assert layers
        assert all(layer.scheme.smooth for layer in layers)
        assert "in w8a8-smooth of DiTTransformer2DModel" in patch.explain()
        image = call(pipe, num_inference_steps=2)
    assert not torch.equal(image, plain)
    with fewstep.quantize(denoiser(pipe), "w8a8-smooth", smooth=calibration) as handle:
        plan = handle.plan()
    with fewstep.patch(pipe, quantize=plan, smooth=tmp_path / "seen.safetensors") as patch:
        assert torch.equal(call(pipe, num_inference_steps=2), image)
        assert "quantize: a plan for DiTTransformer2DModel" in patch.explain()
    with fewstep.patch(pipe, quantize="w4a8-g32", compensate=calibration) as patch:
        assert "rounding compensated in " in patch.explain()
    assert torch.equal(call(pipe, num_inference_steps=2), plain)
    before = snapshot(pipe)
    for given, error, message in (
        ({"smooth": calibration}, ValueError, "smooth: expected quantize beside it, got none"),
        ({"compensate": calibration}, ValueError, "compensate: expected quantize beside it"),
        ({"quantize": "w8a8", "smooth": 3}, TypeError, "smooth: expected a Calibration"),
        ({"quantize": "w8a8", "compensate": 3}, TypeError, "compensate: expected a Calibration"),
        ({"quantize": plan}, ValueError, "smooth: expected a calibration for w8a8-smooth"),
    ):
        with pytest.raises(error, match=message):
            fewstep.patch(pipe, **given)
    assert snapshot(pipe) == before


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.usefixtures("small_layers")
def test_the_time_embedding_stays_exact(name):
    """What every layer sees (TFMQ-DM, arXiv 2311.16503): no bit of it changes."""
    pipe = build(name)
    # UNets and DiTs embed in every block; the others once, adaLN's one layer of PixArt included.
    places = ("time_embedding", "time_text_embed", "time_embed", "adaln_single", "norm1.emb")
    modules = [m for n, m in denoiser(pipe).named_modules() if n.endswith(places)]
    assert modules
    seen = []

    def keep(module, args, output):
        seen.append(output if isinstance(output, torch.Tensor) else output[0])

    hooks = [module.register_forward_hook(keep) for module in modules]
    plain = call(pipe, num_inference_steps=2)
    want, seen[:] = list(seen), []
    with fewstep.patch(pipe, quantize="w8a8"):
        assert not torch.equal(call(pipe, num_inference_steps=2), plain)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(want) >= 2
    assert all(torch.equal(x, y) for x, y in zip(seen, want, strict=True))


@pytest.mark.parametrize("name", ["quantize", "load_nunchaku"])
def test_the_functions_of_models_take_what_those_of_layers_take_and_the_fusions(name):
    of_models, of_layers = getattr(fewstep, name), getattr(quantization, name)
    outer, inner = (
        {p.name: (p.kind, p.default) for p in inspect.signature(f).parameters.values()}
        for f in (of_models, of_layers)
    )
    fusions = {key: outer.pop(key)[1] for key in ("norms", "activations", "modulations")}
    assert list(outer.items()) == list(inner.items())
    assert fusions == {"norms": None, "activations": "fuse", "modulations": None}
    # As they are written, for those who read them without running: no *args.
    assert of_models.__code__.co_varnames[: len(outer)] == tuple(outer)
    assert f"fewstep.quantization.{name}" in of_models.__doc__
    assert "Raises:" in of_models.__doc__
    for key in (*outer, *fusions):
        assert f"        {key}: " in of_models.__doc__


def test_every_argument_is_handed_on(monkeypatch):
    seen = {}

    def layers(*args, **kwargs):
        seen.update(inspect.signature(of_layers).bind(*args, **kwargs).arguments)
        raise KeyboardInterrupt  # what follows is not asked for here

    of_layers = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", layers)
    given = {name: object() for name in inspect.signature(of_layers).parameters}
    with pytest.raises(KeyboardInterrupt):
        fewstep.quantize(**given)
    assert seen == given
