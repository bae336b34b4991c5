"""QuantLinear.forward goes straight to the CPU kernel where nobody watches, with the same bits."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fewstep.quantization import QuantLinear, linear
from quantized_linear import SCHEMES, make

SHORT = ["w8a8", "w8a8-h64", "w8a8-r8", "w4a8-g32", "w4a8-g64-r8-h64"]


@pytest.fixture
def took(monkeypatch):
    """Return a list that gets whether the short way was taken, of each call that asked for it."""
    real, answers = linear.run_short, []

    def ask(*args):
        out = real(*args)
        answers.append(out is not None)
        return out

    monkeypatch.setattr(linear, "run_short", ask)
    return answers


def long(layer, *args, **options):
    """Return what the layer gives without its short way."""
    layer.short = None
    try:
        return layer(*args, **options)
    finally:
        del layer.short


@pytest.mark.parametrize("scheme", SHORT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_has_the_bits_of_the_long_way(took, scheme, dtype, bias):
    _, layer = make(dtype, bias, scheme=scheme)
    smoothed = type(layer)(
        *(layer.quantized, layer.weight_scale, layer.bias, layer.down, layer.up),
        torch.rand(192).to(dtype) + 0.5,
        rotate=layer.rotate,
        dtype=dtype,
    )
    x = torch.randn(2, 5, 192).to(dtype)
    for module in (layer, smoothed):
        for activation in (None, "gelu_tanh", "swiglu"):
            out = module(x, activation=activation)
            assert torch.equal(out, long(module, x, activation=activation))
    assert took == [True] * 6


@pytest.mark.parametrize("scheme", ["fp8", "w4a16"])
def test_other_layers_take_the_long_way(took, scheme):
    _, layer = make(scheme=scheme)
    layer(torch.randn(3, 192))
    assert not any(took)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_is_left_where_it_has_to_be(took, scheme):
    _, layer = make(scheme=scheme)
    x = torch.randn(3, 192)
    layer(x)
    assert took == [True]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer(x, rows=True)
    layer(x, lambda down, up, dtype: (torch.zeros(2, 192), torch.zeros(100, 2)))
    assert took == [True]
    leaf = x.clone().requires_grad_()
    layer(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, layer.weight.sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert not took[-1]
    layer.bias.requires_grad_()
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((100,), 3.0))
    assert not took[-1]
    calls = len(took)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    assert took[calls:] == [True]  # the one that was not compiled


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8-g32"])
def test_follows_its_buffers(took, scheme):
    """Written in place, replaced, loaded, cast, copied: each call reads what there is now."""
    _, layer = make(scheme=scheme)
    _, other = make(scheme=scheme)
    x = torch.randn(3, 192)
    layer(x)
    layer.bias += 1
    layer.quantized.copy_(other.quantized)
    assert torch.equal(layer(x), long(layer, x))
    layer._buffers["weight_scale"] = other.weight_scale
    assert torch.equal(layer(x), long(layer, x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied(x), other(x))
        copied.bias.zero_()
        assert not torch.equal(copied(x), other(x))
    layer.bfloat16()
    assert torch.equal(layer(x.bfloat16()), long(layer, x.bfloat16()))
    assert torch.equal(layer(x), long(layer, x))
    state = {"bias": torch.zeros(100)}
    called = torch.func.functional_call(layer, state, (x,))
    layer.bias = torch.zeros(100)
    assert torch.equal(called, layer(x))
    assert all(took)
    assert set(layer.state_dict()) == set(other.state_dict())


def test_a_bias_that_became_a_parameter_is_used(took):
    _, layer = make()
    layer.bias = None
    del layer.bias
    layer.bias = nn.Parameter(torch.ones(100))
    x = torch.randn(3, 192)
    out = layer(x)
    assert not any(took)
    layer.bias.data.zero_()
    torch.testing.assert_close(out, layer(x) + 1)


def test_a_layer_that_computes_otherwise_takes_the_long_way(took):
    """By a method of its own or of a mixin; one that has none keeps the short way."""
    _, layer = make()

    class Doubled:
        def _multiply(self, x, options):
            return 2 * super()._multiply(x, options)

    class Shifted(type(layer)):
        def _expect_input(self, x):
            return super()._expect_input(x) + 1

    class Renamed(type(layer)):
        pass

    x = torch.randn(3, 192)
    want, shifted = layer(x), layer(x + 1)
    expected = {type("Mixed", (Doubled, type(layer)), {}): 2 * want, Shifted: shifted}
    taken = len(took)
    for kind, out in expected.items():
        layer.__class__ = kind
        assert torch.equal(layer(x), out)
    assert not any(took[taken:])
    layer.__class__ = Renamed
    assert torch.equal(layer(x), want)
    assert took[-1]


def test_hooks_are_called(took):
    _, layer = make()
    layer.register_forward_hook(lambda module, args, out: out * 0)
    assert not layer(torch.randn(3, 192)).any()
    assert took == [True]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(3, 191), r"x: expected \[..., 192\], got \[3, 191\]"),
        (torch.randn(3, 192).double(), "x: expected float32, bfloat16 or float16"),
        (torch.tensor(1.0), r"x: expected \[..., 192\], got \[\]"),
        ([1.0], "input: expected a tensor, got list"),
        (None, "input: expected a tensor, got None"),
    ],
    ids=["size", "dtype", "scalar", "list", "none"],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bad_input_names_the_argument(scheme, x, message):
    _, layer = make(scheme=scheme)
    assert isinstance(layer, QuantLinear)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(x)
