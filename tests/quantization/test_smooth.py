"""QuantLinear with smoothing factors: y = (x / smooth) @ W.T + bias + (x @ down.T) @ up.T."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep.quantization import QuantLinear
from fewstep.quantization.scheme import Scheme

pytestmark = pytest.mark.usefixtures("no_grad")
SCHEMES = ["w8a8", "w4a8", "w4a16-g32", "w8a8-r8", "w4a8-r8", "w4a16-r8"]


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def make(scheme, dtype=torch.float32):
    """Return (layer, the same without smoothing and branch) of a weight with uneven columns."""
    layer_type = QuantLinear.kinds[Scheme.parse(scheme).kind]
    smooth = (torch.rand(192) * 4 - 2).exp2().to(dtype)
    linear = nn.Linear(192, 100).to(dtype)
    linear.weight.mul_(smooth)
    plain = QuantLinear.from_linear(linear, scheme)
    parts = plain.quantized, plain.weight_scale, plain.bias
    bare = layer_type(*parts, dtype=dtype)
    return layer_type(*parts, plain.down, plain.up, smooth, dtype=dtype), bare


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_smooth_divides_what_is_quantised_and_not_what_the_branch_sees(scheme, dtype):
    layer, bare = make(scheme, dtype)
    x = torch.randn(2, 5, 192).to(dtype)
    if layer.kind == "w4a16":
        want = bare(x / layer.smooth)
    else:  # one float32 division a column and one product a value, where x is quantised
        want = bare(x.float() * (1 / layer.smooth.float())).to(dtype)
    if layer.down is None:
        assert torch.equal(layer(x), want)
        return
    want = want.double() + F.linear(x.double(), layer.up.double() @ layer.down.double())
    # Two roundings of results and one of 8 values of the branch, each to a unit of the dtype.
    limit = 10 * torch.finfo(dtype).eps * want.abs().max()
    assert (layer(x) - want).abs().max() < limit


def test_weight_reads_without_the_smoothing(scheme):
    layer, bare = make(scheme)
    want = bare.weight.double() / layer.smooth.double()
    if layer.down is not None:
        want = want + layer.up.double() @ layer.down.double()
    assert (layer.weight - want).abs().max() < 1e-6 * want.abs().max()
    assert str(layer.scheme).endswith("-smooth")


def test_gradients_and_tangents_see_the_smoothing(scheme):
    layer, _ = make(scheme)
    weight = layer.weight.double()
    x, t_x, d_y = torch.randn(4, 192), torch.randn(4, 192), torch.randn(4, 100)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(leaf), leaf, d_y)
    y, t_y = torch.func.jvp(layer, (x,), (t_x,))
    assert torch.equal(y, layer(x))
    for got, want in ((gradient, d_y.double() @ weight), (t_y, t_x.double() @ weight.T)):
        assert (got.double() - want).norm() < 2e-6 * want.norm()


def test_state_casts_copies_and_compilation(scheme):
    layer, _ = make(scheme)
    x = torch.randn(3, 192)
    want, state = layer(x), layer.state_dict()
    assert "smooth" in state
    other = QuantLinear.empty(192, 100, layer.scheme)
    other.load_state_dict(state)
    assert torch.equal(other(x), want)
    assert torch.equal(copy.deepcopy(layer)(x), want)
    torch._dynamo.reset()  # one forward for all schemes: its graphs count towards the limit
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), want)
    half = copy.deepcopy(layer).bfloat16()
    assert half.smooth.dtype == torch.bfloat16
    assert torch.equal(half.weight_scale, layer.weight_scale)


@pytest.mark.parametrize("assign", [False, True])
def test_float16_scales_survive_a_state_dict(assign):
    bare = make("w4a8")[1]
    scale = (bare.weight_scale.float() * 1.001).half()
    layer = type(bare)(bare.quantized, scale, bare.bias)
    other = make("w4a8")[1]
    other.load_state_dict(layer.state_dict(), assign=assign)
    assert other.weight_scale.dtype == torch.float16
    assert torch.equal(other.weight_scale, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_made_with_factors_divides_by_them_and_multiplies_the_weight(scheme, dtype):
    linear = nn.Linear(192, 100).to(dtype)
    linear.weight[:, ::7] *= 4  # directions for the branch that smoothing turns
    smooth = (torch.rand(192) * 4 - 2).exp2()
    layer = QuantLinear.from_linear(linear, scheme, smooth=smooth)
    assert str(layer.scheme) == str(Scheme.parse(f"{scheme}-smooth"))
    assert torch.equal(layer.smooth, smooth.to(dtype))
    # The error of the quantised weight, read back, is that of the smoothed one: as far from it as
    # if the smoothed weight had been quantised alone.
    s = layer.smooth.double()
    error = ((layer.weight.double() - linear.weight.double()) * s).norm()
    smoothed = nn.Linear(192, 100, bias=False)
    smoothed.weight.copy_(linear.weight.double() * s)
    plain = QuantLinear.from_linear(smoothed, scheme).weight.double()
    # What reads back is rounded to the dtype, and so are down and up; the split is another draw.
    limit = (
        1.1 * (plain - smoothed.weight).norm() + 2 * torch.finfo(dtype).eps * smoothed.weight.norm()
    )
    assert error < limit


def test_factors_that_do_not_fit_are_refused():
    linear = nn.Linear(64, 64)
    for smooth, message in (
        (torch.ones(63), r"smooth: expected floating \[64\], got torch.float32 \[63\]"),
        (torch.ones(64, dtype=torch.int8), r"smooth: expected floating \[64\], got torch.int8"),
        (torch.zeros(64), "smooth: expected positive finite factors"),
        (torch.full((64,), float("nan")), "smooth: expected positive finite factors"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantLinear.from_linear(linear, "w8a8", smooth=smooth)
    with pytest.raises(ValueError, match="smooth: expected factors for w8a8-smooth, got none"):
        QuantLinear.from_linear(linear, "w8a8-smooth")
    with pytest.raises(ValueError, match="smooth: expected positive finite factors"):
        # 1e6 is inf in float16.
        QuantLinear.from_linear(linear.half(), "w8a8", smooth=torch.full((64,), 1e6))
