"""Smoothing factors from calibration: found where columns differ, left out where they do not."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fewstep.quantization import Calibration, QuantLinear, Scheme, calibrate, quantize
from fewstep.quantization.errors import error_energy
from fewstep.quantization.samples import Samples
from fewstep.quantization.smoothing import ALPHAS, RANGE, factors, quantize_smoothed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(128, 192)
        self.second = nn.Linear(192, 128)
        self.unused = nn.Linear(128, 128)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


def uneven(rows=256, columns=128, seed=0):
    """Return inputs with a few columns of 30 times the others' size."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    x[:, 5::40] *= 30
    return x


@pytest.fixture
def calls():
    return [{"x": uneven(seed=seed)} for seed in range(2)]


def largest(x):
    """Return what a calibration on x holds."""
    return (x / x.square().mean(1, keepdim=True).sqrt()).abs().amax(0)


def errors(linear, layer, x):
    with torch.no_grad():
        return error_energy(layer(x), linear(x))


def test_factors_follow_the_formula():
    amax_x, amax_w = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    s = factors(amax_x, amax_w, 0.3)
    want = amax_x**0.3 / amax_w**0.7
    assert torch.allclose(s / s[0], want / want[0])
    assert s.log().mean().abs() < 1e-6
    assert torch.allclose(s, factors(8 * amax_x, amax_w / 4, 0.3))  # units do not count


def test_dead_columns_have_harmless_factors():
    amax_x, amax_w = torch.rand(64) + 0.5, torch.rand(64) + 0.5
    amax_x[3] = amax_w[7] = 0
    for alpha in ALPHAS:
        s = factors(amax_x, amax_w, alpha)
        assert s.isfinite().all()
        assert s.min() >= 1 / RANGE
        assert s.max() <= RANGE
    assert factors(torch.zeros(8), torch.ones(8), 0.5).isfinite().all()


@pytest.mark.parametrize("scheme", ["w8a8", "fp8", "w4a8", "w4a8-r16"])
def test_outlier_columns_are_smoothed_and_others_are_not(scheme):
    linear, parsed = nn.Linear(128, 96), Scheme.parse(scheme)
    x, unseen = uneven(), uneven(seed=1)
    plain = QuantLinear.from_linear(linear, scheme)
    layer = quantize_smoothed(linear, parsed, Samples.of(x), largest(x))
    assert layer.scheme.smooth
    # In units of the output, which the large columns make up: their weights, 30 times larger once
    # smoothed, get their group's range, and the branch holds what they cost the others. e4m3 has
    # the same relative error at any size, so there is little to even out.
    gain = {"w8a8": 7, "fp8": 1.3, "w4a8": 2, "w4a8-r16": 15}[scheme]
    assert gain * errors(linear, layer, unseen) < errors(linear, plain, unseen)
    even = torch.randn(256, 128)
    layer = quantize_smoothed(linear, parsed, Samples.of(even), largest(even))
    assert not layer.scheme.smooth
    assert torch.equal(layer.quantized, plain.quantized)


def test_a_model_is_smoothed_from_a_calibration_or_its_file(calls, tmp_path):
    model = Net()
    calibration = calibrate(model, calls, rows=128)
    calibration.save(tmp_path / "seen.safetensors")
    x = uneven(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = []
    for smooth in (calibration, tmp_path / "seen.safetensors", str(tmp_path / "seen.safetensors")):
        with torch.no_grad(), quantize(model, "w8a8", smooth=smooth) as handle:
            outputs.append(model(x))
            plan = handle.plan()
            assert handle.replaced["first"].scheme.smooth
            assert not handle.replaced["unused"].scheme.smooth  # no call reached it
            assert "1 linear layer in w8a8-smooth" in handle.explain()
    assert all(torch.equal(outputs[0], y) for y in outputs)
    assert all(torch.equal(before[n], value) for n, value in model.state_dict().items())
    with torch.no_grad():
        with quantize(model, plan=plan, smooth=calibration) as handle:
            assert torch.equal(model(x), outputs[0])
            assert handle.plan() == plan
        with quantize(model, "w8a8"):
            plain = model(x)
        want = model(x)
        assert 2 * (outputs[0] - want).norm() < (plain - want).norm()
        quantize(model, "w8a8", smooth=calibration, keep_originals=False)
        assert torch.equal(model(x), outputs[0])


def test_a_scheme_with_smoothing_takes_it_even_where_it_does_not_help():
    model = nn.Sequential(nn.Linear(128, 128))
    calibration = calibrate(model, [{"input": torch.randn(64, 128)}])
    with quantize(model, "w8a8", smooth=calibration) as handle:
        assert not handle.replaced["0"].scheme.smooth
    with quantize(model, "w8a8-smooth", smooth=calibration) as handle:
        assert handle.replaced["0"].scheme.smooth


@pytest.mark.parametrize("keep_originals", [True, False])
def test_bad_input_is_named_and_the_model_is_left_as_it_was(calls, tmp_path, keep_originals):
    model = Net()
    calibration = calibrate(model, calls, rows=16)
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def refuse(error, message, scheme="w8a8", **given):
        with pytest.raises(error, match=message):
            quantize(model, scheme, keep_originals=keep_originals, **given)
        assert all(type(m) is nn.Linear for m in model.children())
        assert all(torch.equal(state[n], value) for n, value in model.state_dict().items())

    missing = "first: smooth: expected a calibration for w8a8-smooth; none was given"
    refuse(ValueError, missing, "w8a8-smooth")
    unreached = "unused: smooth: expected .* none of its calls reached this layer"
    refuse(ValueError, unreached, "w8a8-smooth", smooth=calibration)
    other = Calibration({"first": torch.ones(4, 64)}, amax={"first": torch.ones(64)})
    refuse(ValueError, "first: smooth: expected inputs of 128, got 64", smooth=other)
    stranger = Calibration({"third": torch.ones(4, 64)}, amax={"third": torch.ones(64)})
    refuse(ValueError, "smooth: expected a calibration of Net, got one of .*third", smooth=stranger)
    calibration.amax["first"][3] = float("nan")
    refuse(ValueError, "first: smooth: expected finite inputs", smooth=calibration)
    refuse(TypeError, "smooth: expected a Calibration or a file with one, got int", smooth=3)
    (tmp_path / "no.safetensors").write_bytes(b"12345678")
    refuse(
        ValueError,
        "expected a file as Calibration.save writes it",
        smooth=tmp_path / "no.safetensors",
    )


def test_smoothing_before_a_rotation_is_searched_with_it():
    linear, x, unseen = nn.Linear(128, 96), uneven(), uneven(seed=1)
    scheme = Scheme.parse("w4a8-r16-h64")
    layer = quantize_smoothed(linear, scheme, Samples.of(x), largest(x))
    assert str(layer.scheme) == "w4a8-g64-r16-h64-smooth"
    plain = QuantLinear.from_linear(linear, "w4a8-r16-h64")
    assert 2 * errors(linear, layer, unseen) < errors(linear, plain, unseen)


def test_layers_that_saw_few_rows_are_not_smoothed():
    model, row = Net(), uneven(rows=1).expand(200, -1)  # one row, over and over
    seen = calibrate(model, [{"x": row}], rows=128)
    few = "layers that saw fewer than 64 different rows, not smoothed: 2"
    with quantize(model, "w8a8", smooth=seen) as handle:
        assert not any(layer.scheme.smooth for layer in handle.replaced.values())
        assert few in handle.explain().splitlines()
    told = {"smooth": seen, "skip": lambda name, _: name == "unused"}
    with quantize(model, "w8a8-smooth", **told) as handle:
        assert all(layer.scheme.smooth for layer in handle.replaced.values())
        assert few not in handle.explain()
