"""quantize(activations=): feed-forward layers as one product each, when they are not, and undo."""

import copy
import gc
import io
import weakref

import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn

import fewstep
from fewstep import ops
from fewstep.ops._epilogue import activate
from fewstep.patching import activations, fuse_activations
from fewstep.quantization import QuantizedRows, QuantLinear
from patching.small_sd3 import build as small_sd3
from patching.small_sd3 import inputs
from patching.tiny_pipelines import BUILDERS, build, call, denoiser

# Of what the tiny models have: activations behind a layer. FLUX's single blocks have no second one.
COUNTS = {"digits": 4, "flux": 6, "pixart": 4, "sana": 0, "sd-unet": 7, "sd3": 7}
FORMS = {
    "gelu": "gelu",
    "gelu-approximate": "gelu_tanh",
    "geglu": "geglu",
    "swiglu": "swiglu",
    "linear-silu": "silu",
}
SCHEMES = ["w8a8", "w8a8-r4", "fp8", "w4a8-g32", "w4a16-g32"]
SKIP = {"skip": lambda *_: None}
DIM = 64


@pytest.fixture
def small_layers(monkeypatch):
    """The default leaves layers below 128 x 128 alone; here every layer of a tiny model counts."""
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_SIDE", 1)
    monkeypatch.setattr("fewstep.quantization.replace.SMALLEST_WEIGHT", 1)


class Model(nn.Module):
    """One feed-forward layer."""

    def __init__(self, form="gelu-approximate", dtype=torch.bfloat16, **options):
        super().__init__()
        torch.manual_seed(0)
        self.ff = FeedForward(DIM, mult=2, activation_fn=form, **options)
        self.gain = nn.Parameter(torch.ones(()))  # peft wants a parameter
        self.to(dtype).eval().requires_grad_(False)

    def forward(self, x):
        return self.ff(x) * self.gain


def draw(dtype=torch.bfloat16):
    return torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)


def counting(monkeypatch, name):
    """Count the calls of an op."""
    op, calls = getattr(ops, name), []
    monkeypatch.setattr(ops, name, lambda *args, **kw: (calls.append(name), op(*args, **kw))[1])
    return calls


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_product_activates_and_rounds_once(form, scheme):
    model, x = Model(form), draw()
    with fewstep.quantize(model, scheme, **SKIP) as handle:
        assert "1 activations are part of the product before them" in handle.explain()
        got, layer = model.ff.net[0](x), model.ff.net[0].proj
        exact = activate(layer(x.float()).double(), FORMS[form])
        # x has the same bits in float32, y the error of float32; then one rounding to bfloat16.
        # The branch is rounded to x's dtype between its products, and w4a16 multiplies in it.
        slack = 2.0**-7 if scheme in ("w8a8-r4", "w4a16-g32") else 2.0**-12
        assert ((got - exact).abs() <= 2.0**-8 * exact.abs() + slack).all()
    with fewstep.quantize(model, scheme, **SKIP, activations=None) as handle:
        apart = model.ff.net[0](x)
        assert "product before them" not in handle.explain()
    unit = 2.0**-7
    # Where apart y is rounded too, or both of its halves, and the activation of one.
    assert ((got - apart).abs() <= 3 * unit * (apart.abs() + 0.02)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-r4", "w4a8-g32"])
def test_the_second_layer_gets_the_rows_it_would_have_made(scheme, dtype, monkeypatch):
    model, x = Model(dtype=dtype), draw(dtype)
    fewstep.quantize(model, scheme, skip=lambda name, _: "proj" not in name, activations=None)
    second = model.ff.net[2] = QuantLinear.from_linear(model.ff.net[2])
    handle = fuse_activations(model)
    assert (handle.fused, handle.chained) == (["ff.net.0"], ["ff"])
    want = second(model.ff.net[0](x))
    seen, multiply = [], second._multiply
    second._multiply = lambda x, *rest: (seen.append(x), multiply(x, *rest))[1]
    calls = counting(monkeypatch, "quantize_int8")
    assert torch.equal(model(x), want)
    assert isinstance(seen[0], QuantizedRows)
    assert (seen[0].dtype, calls) == (dtype, [])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_in_and_rows_out(dtype):
    """As behind a norm that quantises."""
    model, x = Model(dtype=dtype), draw(dtype)
    with fewstep.quantize(model, "w8a8", **SKIP):
        rows = QuantizedRows.of(x)
        first, second = model.ff.net[0], model.ff.net[2]
        between = first.proj(rows, activation="gelu_tanh", rows=True)
        want = QuantizedRows.of(first.proj(rows, activation="gelu_tanh"))
        assert torch.equal(between.q, want.q)
        assert torch.equal(model(rows), second(want))
        assert model(rows).dtype == dtype


@pytest.mark.usefixtures("small_layers")
@pytest.mark.parametrize("name", sorted(COUNTS))
def test_models_of_diffusers(name):
    pipe = build(name)
    model = denoiser(pipe)
    before = {name: type(module) for name, module in model.named_modules()}
    plain = call(pipe, num_inference_steps=2)
    with fewstep.quantize(model, "w8a8", activations=None):
        keys = list(model.state_dict())
        apart = call(pipe, num_inference_steps=2)
    with fewstep.quantize(model, "w8a8") as handle:
        assert list(model.state_dict()) == keys
        assert f"{COUNTS[name]} activations are part" in handle.explain()
        if COUNTS[name]:
            chained = COUNTS[name] - 2 * (name == "flux")
            assert f"{chained} feed-forward layers hand int8 rows" in handle.explain()
        got = call(pipe, num_inference_steps=2)
    # In float32 the two differ in last bits, which may move a value next to a tie by a step.
    assert (got - apart).norm() < 0.1 * (apart - plain).norm()
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(call(pipe, num_inference_steps=2), plain)


def test_every_family_has_a_count():
    assert set(COUNTS) == set(BUILDERS) - {"digits-student"}


def _hook(module):
    module.register_forward_hook(lambda *_: None)


def _forward(module):
    inner = module.forward
    module.forward = lambda *args, **kwargs: inner(*args, **kwargs)


FALLBACKS = {
    "hook of the layer": lambda ff: _hook(ff.net[0].proj),
    "forward of the layer": lambda ff: _forward(ff.net[0].proj),
    "plain layer": lambda ff: setattr(ff.net[0], "proj", ff.net[0].proj.dequantize()),
}
UNCHAINED = {
    "hook of the module": lambda ff: _hook(ff.net[0]),
    "forward of the module": lambda ff: _forward(ff.net[0]),
    "hook of dropout": lambda ff: _hook(ff.net[1]),
    "hook of the second": lambda ff: _hook(ff.net[2]),
    "something between": lambda ff: ff.net.__setitem__(1, nn.Identity()),
    "plain second": lambda ff: ff.net.__setitem__(2, ff.net[2].dequantize()),
    "smooth": lambda ff: setattr(ff.net[2], "smooth", torch.ones(2 * DIM, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("change", [*FALLBACKS, *UNCHAINED])
def test_whoever_looks_between_sees_tensors(change, monkeypatch):
    """And gets the same results, from the layers one after the other."""
    outs, chained = [], change in UNCHAINED
    for how in (None, "fuse"):
        model, x = Model("geglu"), draw()
        fewstep.quantize(model, "w8a8", **SKIP, activations=how)
        (UNCHAINED if chained else FALLBACKS)[change](model.ff)
        if chained and how is None:  # the activation alone
            first = model.ff.net[0]
            h = first.proj(x, activation="geglu")
            out = model.ff.net[2](h)
        else:
            second = model.ff.net[2]
            inner, seen = second.forward, []
            second.forward = lambda x, f=inner, s=seen: (s.append(x), f(x))[1]
            out = model(x)
            assert isinstance(seen[0], torch.Tensor)
        outs.append(out)
    assert torch.equal(*outs)


def test_hooks_that_see_the_input_alone_do_not_matter(monkeypatch):
    model, x, seen = Model(), draw(), []
    with fewstep.quantize(model, "w8a8", **SKIP):
        want = model(x)
        hook = lambda _, args: seen.append(args[0])  # noqa: E731
        model.ff.net[0].proj.register_forward_pre_hook(hook)
        assert torch.equal(model(x), want)
    assert seen[0] is x


def test_dropout_is_drawn_where_it_is_asked_for():
    model, x = Model(dropout=0.5), draw()
    with fewstep.quantize(model, "w8a8", **SKIP) as handle:
        assert "1 feed-forward layers hand int8 rows" in handle.explain()
        quiet = model(x)
        model.train()
        assert not torch.equal(model(x), model(x))
        model.eval()
        assert torch.equal(model(x), quiet)


@pytest.mark.parametrize("rotate", [0, 32])
def test_explains_what_the_second_layer_keeps(rotate):
    scheme, reason = (
        ("w8a8-h32", "smooths or rotates") if rotate else ("w8a8-r4", "has a low-rank branch")
    )
    with fewstep.quantize(Model(), scheme, **SKIP) as handle:
        assert "0 feed-forward layers hand int8 rows" in handle.explain()
        assert reason in handle.explain()


def test_activations_that_products_lack_stay():
    model, x = Model("geglu-approximate"), draw()
    with fewstep.quantize(model, "w8a8", **SKIP) as handle:
        assert "0 activations" in handle.explain()
        assert model(x).isfinite().all()


def _adapted(how, **options):
    peft = pytest.importorskip("peft")
    model = Model(dtype=torch.float32)
    fewstep.quantize(model, "w8a8", **SKIP, activations=how)
    torch.manual_seed(0)
    options = {"r": 4, "init_lora_weights": False, "target_modules": ["proj"]} | options
    return peft.inject_adapter_in_model(peft.LoraConfig(**options), model)


@torch.no_grad()
def test_loras_join_the_product(monkeypatch):
    x = draw(torch.float32)
    fused, apart = (_adapted(how) for how in ("fuse", None))
    calls = counting(monkeypatch, "gemm_w8a8")
    got = fused(x)
    assert len(calls) == 2
    want = apart(x)
    assert (got - want).norm() < 1e-3 * want.norm()  # steps of the second layer's rows
    with_it = got
    for module in fused.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(False)
    assert not torch.equal(fused(x), with_it)


@pytest.mark.parametrize("case", ["drawn", "dora", "trained"])
def test_loras_that_do_not_join_run_as_before(case):
    x, outs = draw(torch.float32), []
    for how in ("fuse", None):
        model = _adapted(how, lora_dropout=0.5 * (case == "drawn"), use_dora=case == "dora")
        model.train(case == "drawn")
        torch.manual_seed(1)
        with torch.set_grad_enabled(case == "trained"):
            out = model(x)
        outs.append(out.detach())
        if case == "trained":
            out.square().sum().backward()
            outs[-1] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert torch.equal(*outs)


def test_gradients_and_tangents_are_those_of_the_layers_alone():
    results = []
    for how in ("fuse", None):
        model, x = Model("geglu", torch.float32), draw(torch.float32)
        fewstep.quantize(model, "w8a8", **SKIP, activations=how)
        results.append([*torch.func.jvp(model, (x,), (x,))])
        leaf = x.clone().requires_grad_()
        results[-1] += torch.autograd.grad(model(leaf).square().sum(), leaf)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_under_autocast():
    outs = []
    for how in ("fuse", None):
        model, x = Model(dtype=torch.float32), draw(torch.float32)
        with fewstep.quantize(model, "w8a8", **SKIP, activations=how), torch.autocast("cpu"):
            outs.append(model(x))
    assert outs[0].dtype == torch.bfloat16
    assert (outs[0] - outs[1]).norm() < 0.01 * outs[1].norm()


def test_compiles_without_graph_break():
    model, x = Model("geglu"), draw()
    with fewstep.quantize(model, "w8a8", **SKIP), torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_fused_too(how):
    model, x = Model("swiglu"), draw()
    handle = fewstep.quantize(model, "w8a8", **SKIP)
    want = model(x)
    if how == "pickle":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copy.deepcopy(model)
    handle.undo()
    assert type(twin.ff) is activations.FusedFeedForward
    assert torch.equal(twin(x), want)


def test_undo_below_a_forward_that_was_wrapped_meanwhile():
    model, x = Model(), draw()
    want = model(x)
    handle = fewstep.quantize(model, "w8a8", **SKIP)
    for module in (model.ff, model.ff.net[0]):
        _forward(module)
    handle.undo()
    assert torch.equal(model(x), want)


def test_undo_leaves_a_class_that_is_not_its_own():
    model = Model()
    handle = fewstep.quantize(model, "w8a8", **SKIP)

    class Other(FeedForward):
        pass

    model.ff.__class__ = Other
    handle.undo()
    assert type(model.ff) is Other
    assert not isinstance(model.ff.net[0], activations.FusedGELU)


def test_bad_values_leave_the_model_as_it_was():
    model = Model()
    with pytest.raises(ValueError, match="activations: expected None or one of fuse, got 'share'"):
        fewstep.quantize(model, "w8a8", **SKIP, activations="share")
    assert type(model.ff.net[2]) is nn.Linear
    with pytest.raises(ValueError, match="activations: expected None or one of fuse, got True"):
        fewstep.QuantizationConfig("w8a8", activations=True)


@pytest.mark.usefixtures("small_layers")
def test_patch_takes_both_options():
    pipe = build("pixart")
    plain = call(pipe, num_inference_steps=2)
    with fewstep.patch(pipe, quantize="w8a8", norms="fuse") as patch:
        text = patch.explain()
        assert "8 norms quantise for the layers behind them" in text
        assert "4 activations are part of the product" in text
        assert call(pipe, num_inference_steps=2).isfinite().all()
    assert torch.equal(call(pipe, num_inference_steps=2), plain)
    with fewstep.patch(pipe, quantize="w8a8", activations=None) as patch:
        assert "part of the product" not in patch.explain()
    with pytest.raises(ValueError, match="norms: expected quantize beside it, got none"):
        fewstep.patch(pipe, steps=2, norms="fuse")
    for value in (None, "share"):  # "fuse" is what goes without saying
        with pytest.raises(ValueError, match="activations: expected quantize beside it, got none"):
            fewstep.patch(pipe, steps=2, activations=value)
    with pytest.raises(ValueError, match="norms: expected one of share, fuse, got 'merge'"):
        fewstep.patch(pipe, quantize="w8a8", norms="merge")
    assert torch.equal(call(pipe, num_inference_steps=2), plain)


@torch.no_grad()
def test_loading_with_diffusers(tmp_path):
    model_type = type(small_sd3())
    small_sd3().save_pretrained(tmp_path / "plain")
    for norms, how in (("fuse", "fuse"), (None, None)):
        config = fewstep.QuantizationConfig("w8a8", norms=norms, activations=how)
        model = model_type.from_pretrained(tmp_path / "plain", quantization_config=config)
        model.save_pretrained(tmp_path / str(how))
        again = model_type.from_pretrained(tmp_path / str(how))
        twin = small_sd3()
        fewstep.quantize(twin, "w8a8", norms=norms, activations=how)
        for other in (model, again):
            kinds = [type(module) for module in other.modules()]
            assert kinds == [type(module) for module in twin.modules()]
            assert torch.equal(other(**inputs()).sample, twin(**inputs()).sample)
    model.dequantize()
    assert [type(module) for module in model.modules()] == [type(m) for m in small_sd3().modules()]


def test_a_model_is_freed_with_its_last_name():
    """Nothing waits for Python to look for cycles."""
    model = small_sd3()
    fewstep.quantize(model, "w8a8", norms="fuse", keep_originals=False)
    seen = weakref.ref(model.transformer_blocks[0])
    gc.collect()
    gc.disable()
    try:
        del model
        assert seen() is None
    finally:
        gc.enable()
