"""QuantLinear: accuracy, and everything that is done to a module besides calling it."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import ops, reference
from fewstep.quantization import QuantLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


SCHEMES = ["w8a8", "fp8", "w4a8-g32-r8-h64", "w4a16"]


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def make(dtype=torch.float32, bias=True, inputs=192, outputs=100, scheme="w8a8"):
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    return linear, QuantLinear.from_linear(linear, scheme)


def sqnr(got, want):
    want = want.double()
    return 10 * torch.log10(want.square().sum() / (got.double() - want).square().sum()).item()


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


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


def test_inference_mode(scheme):
    with torch.inference_mode():
        _, quantized = make(scheme=scheme)
        x = torch.randn(4, 192)
        assert torch.equal(quantized(x), copy.deepcopy(quantized)(x))


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


def test_quantising_leaves_random_generators_alone():
    state = torch.get_rng_state()
    linear = nn.Linear(192, 100)
    torch.set_rng_state(state)
    QuantLinear.from_linear(linear, "w4a8-r8")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_frozen_layer_does_not_keep_its_input():
    _, quantized = make()
    saved = []
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t),
    ):
        quantized(torch.randn(1000, 192, requires_grad=True))
    assert torch.Size([1000, 192]) not in saved


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


def test_autocast_decides_the_dtype(scheme):
    _, quantized = make(scheme=scheme)
    x = torch.randn(4, 192)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantized(x), quantized(x.bfloat16()))
        assert quantized(x).dtype == torch.bfloat16


def test_compiles_without_graph_break(scheme):
    _, quantized = make(torch.bfloat16, scheme=scheme)
    x = torch.randn(2, 5, 192).bfloat16()
    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), quantized(x))
    quantized.load_state_dict(make(torch.bfloat16, scheme=scheme)[1].state_dict())
    assert torch.equal(compiled(x), quantized(x))


def swap_storage(layer, state):
    layer.quantized.data = state[layer.storage]
    layer.weight_scale.data = state["weight_scale"]


def replace_buffers(layer, state):
    for name in (layer.storage, "weight_scale"):
        layer._buffers[name] = state[name]


def cast_after_a_write(layer, state):
    replace_buffers(layer, {name: value.clone() for name, value in state.items()})
    layer.float()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer, state: layer.load_state_dict(state),
        lambda layer, state: layer.load_state_dict(state, assign=True),
        lambda layer, state: layer.quantized.copy_(state[layer.storage]),
        lambda layer, state: layer.weight_scale.mul_(0.5),
        swap_storage,
        replace_buffers,
        cast_after_a_write,
    ],
    ids=["load", "assign", "write", "scale", "storage", "buffers", "cast"],
)
def test_a_compiled_graph_follows_the_weight(scheme, change):
    layer, other = make(scheme=scheme)[1], make(scheme=scheme)[1]
    x = torch.randn(4, 192)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    assert torch.equal(compiled(x), before)
    change(layer, other.state_dict())
    want = copy.deepcopy(layer)(x)
    assert not torch.equal(want, before)
    assert torch.equal(compiled(x), want)
    assert torch.equal(layer(x), want)


def test_other_weights_in_a_functional_call(scheme):
    layer, x = make(scheme=scheme)[1], torch.randn(4, 192)
    states = [make(scheme=scheme)[1].state_dict() for _ in range(2)]

    def call(state, x):
        return torch.func.functional_call(layer, state, (x,))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = layer(x)
    for state in (*states, states[0]):
        other = make(scheme=scheme)[1]
        other.load_state_dict(state)
        assert torch.equal(compiled(state, x), other(x))
        assert torch.equal(call(state, x), other(x))
        y, t_y = torch.func.jvp(lambda x, s=state: call(s, x), (x,), (x,))
        assert torch.equal(y, other(x))
        assert t_y.isfinite().all()
    assert torch.equal(layer(x), want)
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
    both = torch.func.vmap(call, (0, None))(stacked, x)
    assert torch.equal(both, torch.stack([call(s, x) for s in states]))


def test_no_mode_leaves_anything_behind():
    for call in (
        lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
        lambda layer, x: torch.func.vmap(layer)(x),
        torch.inference_mode()(lambda layer, x: layer(x)),
    ):
        layer, x = make()[1], torch.randn(4, 192)
        want = layer(x)
        layer = copy.deepcopy(layer)
        call(layer, x)
        assert torch.equal(layer(x), want)
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            layer(leaf).sum().backward()
        assert leaf.grad.isfinite().all()


def test_an_exported_program_reads_its_own_weight(scheme):
    layer, x = make(scheme=scheme)[1], torch.randn(4, 192)
    program = torch.export.export(layer, (x,)).module()
    assert torch.equal(program(x), layer(x))
    other = make(scheme=scheme)[1]
    program.load_state_dict(other.state_dict())
    assert torch.equal(program(x), other(x))


def test_gradients_and_tangents_are_those_of_the_dequantised_layer(scheme):
    _, quantized = make(scheme=scheme)
    exact = nn.Linear(192, 100).double().requires_grad_(False)
    exact.weight.copy_(quantized.weight)
    x, t_x, d_y = torch.randn(4, 192), torch.randn(4, 192), torch.randn(4, 100)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(quantized(leaf), leaf, d_y)
    y, t_y = torch.func.jvp(quantized, (x,), (t_x,))
    assert torch.equal(y, quantized(x))
    for got, want in (
        (gradient, d_y.double() @ exact.weight),
        (t_y, t_x.double() @ exact.weight.T),
    ):
        assert (got.double() - want).norm() < 2e-6 * want.norm()


class Seen(TorchDispatchMode):
    """The names of the operators that run, in order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*SCHEMES, "smoothed"])
def test_can_be_captured_in_a_graph(kind):
    # What a CUDA graph asks of the layer, seen on the CPU: no value is read on the host, no tensor
    # is made there, and nothing that it keeps changes place between two calls.
    layer = make(torch.bfloat16, scheme="w4a8-g32-r8" if kind == "smoothed" else kind)[1]
    if kind == "smoothed":
        layer.smooth = torch.rand(192).bfloat16() + 0.5
    x = torch.randn(4, 192).bfloat16()
    layer(x)
    kept = {n: v.data_ptr() for n, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    kept |= {n: v.data_ptr() for n, v in layer.named_buffers()}
    runs = []
    for rows in (x, 100 * x, torch.zeros_like(x)):
        with Seen() as seen:
            layer(rows)
        runs.append(seen.names)
    assert runs[0] == runs[1] == runs[2]
    host = ("_local_scalar_dense", "is_nonzero", "nonzero", "lift_fresh", "scalar_tensor", "equal")
    assert not [name for name in runs[0] if name.partition("::")[2].split(".")[0] in host]
    now = {n: v.data_ptr() for n, v in vars(layer).items() if isinstance(v, torch.Tensor)}
    assert now | {n: v.data_ptr() for n, v in layer.named_buffers()} == kept


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
