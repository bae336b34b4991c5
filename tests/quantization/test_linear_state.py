"""The buffers of a QuantLinear: saved, loaded, copied, cast, moved, written to."""

import copy
import io

import pytest
import torch
from torch import nn

from fewstep.quantization import QuantLinear
from fewstep.quantization.errors import sqnr
from quantized_linear import SCHEMES, make

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


STATE = {
    "w8a8": {"weight_int8": torch.int8, "weight_scale": torch.float32},
    "fp8": {"weight_fp8": torch.float8_e4m3fn, "weight_scale": torch.float32},
    "w4a8-g32-r8-h64": {
        "weight_int4_h64": torch.uint8,
        "weight_scale": torch.bfloat16,
        "down": torch.bfloat16,
        "up": torch.bfloat16,
    },
    "w4a16": {"weight_int4": torch.uint8, "weight_scale": torch.bfloat16},
}


def test_state_dict_round_trip(scheme):
    _, quantized = make(torch.bfloat16, scheme=scheme)
    x = torch.randn(4, 192).bfloat16()
    state = quantized.state_dict()
    dtypes = {name: value.dtype for name, value in state.items()}
    assert dtypes == STATE[scheme] | {"bias": torch.bfloat16}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    for assign in (False, True):
        _, other = make(torch.bfloat16, scheme=scheme)
        assert not torch.equal(other(x), quantized(x))
        other.load_state_dict(torch.load(buffer), assign=assign)
        buffer.seek(0)
        assert torch.equal(other(x), quantized(x))


def test_deepcopy_is_independent(scheme):
    _, quantized = make(scheme=scheme)
    x = torch.randn(4, 192)
    want = quantized(x)
    twin = copy.deepcopy(quantized)
    assert torch.equal(twin(x), want)
    twin.weight_scale.zero_()
    twin.bias.zero_()
    if twin.up is not None:
        twin.up.zero_()
    assert (twin(x) == 0).all()
    assert torch.equal(quantized(x), want)


def test_other_weights_in_place_and_as_buffers():
    _, quantized = make()
    x = torch.randn(4, 192)
    quantized.weight_int8.neg_()  # in place
    quantized.bias.neg_()
    negated = quantized(x)
    quantized._buffers["weight_int8"] = -quantized.weight_int8  # as offloading hooks do
    quantized._buffers["bias"] = -quantized.bias
    assert torch.equal(quantized(x), -negated)


def test_meta_and_back(scheme):
    linear, quantized = make(scheme=scheme)
    x = torch.randn(4, 192)
    want, state = quantized(x), quantized.state_dict()
    empty = QuantLinear.empty(192, 100, scheme, device="meta")
    assert empty(x.to("meta")).shape == (4, 100)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(state)
    assert torch.equal(empty(x), want)
    moved = copy.deepcopy(quantized).to("meta")
    assert moved.weight_scale.is_meta
    moved.load_state_dict(state, assign=True)
    assert torch.equal(moved(x), want)
    assert linear.weight.device.type == "cpu"


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.bfloat16(),
        lambda m: m.type(torch.bfloat16),
        lambda m: nn.Sequential(m).to(torch.bfloat16)[0],
    ],
)
def test_casts_keep_the_weight_and_its_scale(cast, scheme):
    _, quantized = make(scheme=scheme)
    scale, weight = quantized.weight_scale.clone(), quantized.quantized.clone()
    quantized = cast(quantized)
    assert quantized.weight_scale.dtype == scale.dtype
    assert torch.equal(quantized.weight_scale, scale)
    assert torch.equal(quantized.quantized, weight)
    assert quantized.bias.dtype == torch.bfloat16
    assert quantized.weight.dtype == torch.bfloat16
    x = torch.randn(5, 192).bfloat16()
    weight, bias = quantized.weight.double(), quantized.bias.double()
    # The rounding of x alone: int8's, or e4m3's 31.6 (test_gemm_fp8.py).
    want = nn.functional.linear(x.double(), weight, bias)
    assert sqnr(quantized(x), want) > (31 if scheme == "fp8" else 35)


def test_writes_to_the_scale_and_to_data_are_followed():
    _, quantized = make(scheme="w4a8-g32-r8")
    x = torch.randn(4, 192)
    for change in (
        lambda: quantized.weight_scale[:, ::2].mul_(4),
        lambda: setattr(quantized.quantized, "data", quantized.quantized.roll(1, 0)),
    ):
        quantized(x)
        change()
        want = copy.deepcopy(quantized)(x)
        assert torch.equal(quantized(x), want)


def test_nothing_is_kept_beside_the_buffers(scheme):
    _, quantized = make(scheme=scheme)
    assert set(dict(quantized.named_buffers())) == set(quantized.state_dict())
    buffer = io.BytesIO()
    torch.save(quantized, buffer)
    stored = sum(v.numel() * v.element_size() for v in quantized.state_dict().values())
    assert len(buffer.getvalue()) < stored + 16_000
    buffer.seek(0)
    x = torch.randn(3, 192)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), quantized(x))


def test_undoing_gives_back_the_bias(scheme):
    linear, quantized = make(scheme=scheme)
    before = linear.bias.clone()
    quantized.bias.add_(1)
    assert torch.equal(linear.bias, before)


def test_wrong_state_is_refused_and_nothing_is_changed(scheme):
    _, quantized = make(scheme=scheme)
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    scale = before["weight_scale"]
    for name, value, message in (
        (quantized.storage, before[quantized.storage].float(), "expected .*got torch.float"),
        (quantized.storage, before[quantized.storage][:, 2:], "expected .*, .*got .*, .*"),
        ("weight_scale", torch.full_like(scale, float("nan")), "expected finite .*got inf or NaN"),
        ("weight_scale", scale.neg(), "expected finite .*got a negative one"),
    ):
        for assign in (False, True):
            with pytest.raises(RuntimeError, match=rf"{name}: {message}"):
                quantized.load_state_dict(before | {name: value}, assign=assign)
            now = quantized.state_dict()
            assert all(torch.equal(now[n], kept) for n, kept in before.items())
    with pytest.raises(RuntimeError, match="reset_parameters: expected"):
        quantized.reset_parameters()


def test_a_layer_takes_no_file_of_another_rotation():
    linear, plain = make()
    rotated = [QuantLinear.from_linear(linear, f"w8a8-h{block}") for block in (32, 64)]
    assert "weight_int8_h64" in rotated[1].state_dict()
    for a, b in ((plain, rotated[0]), (rotated[0], plain), (rotated[0], rotated[1])):
        with pytest.raises(RuntimeError, match=r"Missing key.*weight_int8"):
            a.load_state_dict(b.state_dict())
    empty = QuantLinear.empty(192, 100, "w8a8-h")
    assert str(empty.scheme) == "w8a8-h64"
    empty.load_state_dict(rotated[1].state_dict())
    x = torch.randn(3, 192)
    assert torch.equal(empty(x), rotated[1](x))
