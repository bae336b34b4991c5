"""QuantLinear: accuracy, its formula, what it refuses.

test_linear_state.py and test_linear_modes.py hold what else is done to a module.
"""

import pytest
import torch
from torch import nn

from fewstep import ops, reference
from fewstep.quantization import QuantLinear
from fewstep.quantization.errors import sqnr
from quantized_linear import SCHEMES, make

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_accuracy_on_gaussian_data(dtype, bias):
    # Uniform noise of a step of amax / 127 on each side; for 192 Gaussians amax is about 3 sigma:
    # 20 log10(127 / 3 * sqrt(12)) = 43 dB per operand, 40 dB together; 37 at amax = 4 sigma.
    linear = nn.Linear(192, 100, bias=bias)
    nn.init.normal_(linear.weight)
    linear = linear.to(dtype)
    x = torch.randn(3, 50, 192).to(dtype)
    quantized = QuantLinear.from_linear(linear)
    out = quantized(x)
    exact = nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    )
    assert out.dtype == dtype
    assert out.shape == (3, 50, 100)
    assert sqnr(out, exact) > 37
    assert sqnr(quantized.weight, linear.weight) > 40


def test_is_the_two_ops_in_sequence():
    linear, quantized = make(torch.bfloat16)
    x = torch.randn(7, 192).bfloat16()
    w, w_scale = ops.quantize_int8(linear.weight.detach())
    q, scale = ops.quantize_int8(x)
    want = ops.gemm_w8a8(q, scale, w, w_scale, bias=linear.bias, out_dtype=torch.bfloat16)
    assert torch.equal(quantized(x), want)
    assert torch.equal(quantized(x[0]), want[0])


def test_weight_reads_like_a_linear_layers():
    linear, quantized = make(torch.float16)
    assert quantized.weight.dtype == torch.float16
    assert quantized.weight.device == linear.weight.device
    assert quantized.weight.shape == linear.weight.shape
    assert (quantized.in_features, quantized.out_features) == (192, 100)
    back = quantized.dequantize()
    assert type(back) is nn.Linear
    assert torch.equal(back.weight, quantized.weight)
    assert torch.equal(back.bias, linear.bias)
    assert "in_features=192, out_features=100, bias=True, scheme=w8a8" in repr(quantized)


def test_is_a_linear_layer_whose_weight_is_read_only(scheme):
    linear, quantized = make(torch.bfloat16, scheme=scheme)
    assert isinstance(quantized, nn.Linear)
    assert not list(quantized.parameters())
    assert quantized.weight.dtype == torch.bfloat16
    assert type(quantized.weight + 1) is torch.Tensor
    assert sqnr(quantized.weight, linear.weight) > (40 if scheme == "w8a8" else 18)
    with pytest.raises(RuntimeError, match="weight: expected to be read only"):
        quantized.weight.data += 1
    plain = quantized.dequantize()
    x = torch.randn(5, 192).bfloat16()
    assert sqnr(quantized(x), plain(x)) > 30
    assert str(quantized.scheme) == {"w4a16": "w4a16-g64"}.get(scheme, scheme)
    assert f"scheme={quantized.scheme}" in repr(quantized)


def test_the_low_rank_branch_takes_the_largest_directions():
    # A few directions hold nearly all of the weight: with them out, the groups have small scales.
    linear = nn.Linear(256, 192)
    linear.weight.copy_(torch.randn(192, 4) @ torch.randn(4, 256) + 0.05 * torch.randn(192, 256))
    plain = QuantLinear.from_linear(linear, "w4a8")
    branch = QuantLinear.from_linear(linear, "w4a8-r4")
    assert sqnr(branch.weight, linear.weight) > sqnr(plain.weight, linear.weight) + 20
    again = QuantLinear.from_linear(linear, "w4a8-r4")
    assert all(torch.equal(branch.state_dict()[n], t) for n, t in again.state_dict().items())


def test_zeros_in_a_weight_cost_the_rest_nothing(scheme):
    linear = nn.Linear(256, 96)
    nn.init.normal_(linear.weight, std=0.02)
    whole = sqnr(QuantLinear.from_linear(linear, scheme).weight, linear.weight)
    linear.weight[:, 64:128] = 0
    layer = QuantLinear.from_linear(linear, scheme)
    assert sqnr(layer.weight, linear.weight) > whole - 1
    x = torch.randn(5, 256)
    assert sqnr(layer(x), linear(x)) > whole - 4  # x is rounded too, about as much


def test_refining_the_branch_does_not_hurt(monkeypatch):
    linear = nn.Linear(256, 192)
    nn.init.normal_(linear.weight)
    refined = sqnr(QuantLinear.from_linear(linear, "w4a8-r16").weight, linear.weight)
    monkeypatch.setattr("fewstep.quantization.low_rank.ROUNDS", 0)
    once = sqnr(QuantLinear.from_linear(linear, "w4a8-r16").weight, linear.weight)
    assert refined > once + 0.1


def test_quantising_leaves_random_generators_alone():
    state = torch.get_rng_state()
    linear = nn.Linear(192, 100)
    torch.set_rng_state(state)
    QuantLinear.from_linear(linear, "w4a8-r8")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_row_that_is_not_finite_stays_visible(scheme):
    _, quantized = make(scheme=scheme)
    x = torch.randn(4, 192)
    x[1, 7] = float("nan")
    out = quantized(x)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("kind", ["w8a8", "w4a8-g32"])
def test_a_rotated_layer_is_its_formula(kind):
    linear = nn.Linear(192, 100)
    nn.init.normal_(linear.weight)
    linear = linear.bfloat16()
    layer, smooth = QuantLinear.from_linear(linear, f"{kind}-r8-h64"), torch.rand(192) + 0.5
    smoothed = QuantLinear.from_linear(linear, f"{kind}-h64", smooth=smooth)
    x = torch.randn(5, 192).bfloat16()
    for each in (layer, smoothed):
        a, a_scale = reference.quantize_int8(x, smooth=each.smooth, rotate=64)
        product = getattr(reference, f"gemm_{each.kind}")
        low = None if each.up is None else x.double() @ each.down.double().T
        weight = each.quantized, each.weight_scale
        want = product(a, a_scale, *weight, bias=each.bias, low=low, up=each.up)
        # Half a unit of bfloat16, 2^-8, of the output and of low; a tenth for float32's roundings.
        terms = 0 if low is None else low.abs() @ each.up.double().abs().T
        assert ((each(x) - want).abs() <= 1.1 * 2**-8 * (want.abs() + terms)).all()
    # The weight reads unrotated, and a Gaussian one is as close as without a rotation.
    plain = QuantLinear.from_linear(linear, f"{kind}-r8")
    assert sqnr(layer.weight, linear.weight) > sqnr(plain.weight, linear.weight) - 1


def test_rotation_takes_outliers_off_the_scale():
    """Channels 30 times as large as the others: the rows' scales shrink, and the noise with them.

    Without, amax is 60 of 1 at most; with blocks of 128, 30 / sqrt(128) of an outlier and of 4
    deviations of it: 11. The weight is Gaussian and stays it. 20 log10(60 / 11) is 15 dB of the
    activations' noise; with the weight's noise of 40 dB beside both, at least 6 are seen.
    """
    linear = nn.Linear(512, 64)
    nn.init.normal_(linear.weight)
    x = torch.randn(200, 512)
    x[:, [3, 200, 400]] *= 30
    linear.weight[:, [3, 200, 400]] /= 30  # so that the outliers are not all of the output
    want = linear(x)
    plain, rotated = (QuantLinear.from_linear(linear, s)(x) for s in ("w8a8", "w8a8-h128"))
    assert sqnr(rotated, want) > sqnr(plain, want) + 6


def test_bad_input_names_the_argument():
    _, quantized = make()
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., 192\], got \[4, 191\]"):
        quantized(torch.randn(4, 191))
    with pytest.raises(ValueError, match=r"x: expected float32, .* got torch.float64"):
        quantized(torch.randn(4, 192, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"linear: expected an nn\.Linear, got Conv2d"):
        QuantLinear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"linear: expected float32.*got torch.float64"):
        QuantLinear.from_linear(nn.Linear(4, 4).double())
    with pytest.raises(ValueError, match="linear: expected weights, got a layer on the meta"):
        QuantLinear.from_linear(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match=r"expected a layer that is not quantised, got .* w8a8"):
        QuantLinear.from_linear(quantized)
    with pytest.raises(ValueError, match="inputs that are a multiple of group 64, got 96"):
        QuantLinear.from_linear(nn.Linear(96, 4), "w4a16")
    with pytest.raises(ValueError, match="expected a rank below 4 for its shape, got 4"):
        QuantLinear.from_linear(nn.Linear(96, 4), "w8a8-r4")
    bad = nn.Linear(4, 4)
    bad.weight[2, 1] = float("inf")
    for scheme in ("w8a8", "w8a8-r1"):
        with pytest.raises(ValueError, match="expected finite weights, got inf or NaN in row 2"):
            QuantLinear.from_linear(bad, scheme)
