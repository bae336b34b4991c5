"""LoRAs on quantised layers: one product with the layer's own branch, and everything peft does."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.quantization import KINDS, QuantLinear, Scheme, quantize

peft = pytest.importorskip("peft")
from peft.tuners import lora  # noqa: E402
from peft.utils import hotswap  # noqa: E402

SCHEMES = ["w4a8-g32-r8" if kind == "w4a8" else kind for kind in KINDS]
K, N, R = 192, 100, 4


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.second(self.first(x))


def config(**kwargs):
    options = {"r": R, "lora_alpha": 6, "target_modules": ["first"], "init_lora_weights": False}
    return peft.LoraConfig(**options | kwargs)


def make(scheme="w8a8", dtype=torch.float32, **kwargs):
    model = Model().to(dtype)
    quantize(model, scheme, skip=lambda name, _: name != "first")
    return peft.inject_adapter_in_model(config(**kwargs), model, "one")


def peft_way(layer, x, **kwargs):
    """Return what peft's own class makes of the same layer."""
    twin = copy.copy(layer)
    twin.__class__ = lora.Linear
    return twin(x, **kwargs)


class Calls(TorchDispatchMode):
    """The names of the operators that are called from outside of another one."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name())
        return op(*args, **(kwargs or {}))

    def products(self):
        multiply = ("fewstep::gemm", "aten::mm", "aten::addmm", "aten::bmm", "aten::linear")
        return [name for name in self.names if name.startswith(multiply)]


def calls(layer, x):
    with Calls() as seen, torch.no_grad():
        layer(x)
    return seen


@torch.no_grad()
def test_is_one_product(scheme):
    layer, x = make(scheme).first, torch.randn(5, K)
    alone = calls(layer.base_layer, x)
    assert len(alone.products()) == 1
    layer.update_layer("two", 3, lora_alpha=3, config=config())
    for active in (["one"], ["one", "two"]):
        layer.set_adapter(active)
        seen = calls(layer, x)
        assert seen.products() == alone.products()
        assert not [name for name in seen.names if name.startswith("aten::add")]
    layer.enable_adapters(False)
    assert calls(layer, x).names == alone.names


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2])
def test_adds_the_scaled_product(scheme, dtype, count):
    layer, x = make(scheme, dtype).first, torch.randn(3, 5, K).to(dtype)
    if count == 2:
        layer.update_layer("two", 3, lora_alpha=7, config=config())
        layer.set_adapter(["one", "two"])
    base = layer.base_layer(x).double()
    want, size = base.clone(), base.abs()
    for name in layer.active_adapters:
        A, B = (f[name].weight.double() for f in (layer.lora_A, layer.lora_B))
        want += x.double() @ A.T @ B.T * layer.scaling[name]
        size += x.double().abs() @ A.abs().T @ B.abs().T * layer.scaling[name]
    got = layer(x)
    assert got.dtype == dtype
    # Roundings, each at most half a unit of what it rounds: s B, low, base, got. In float32 also
    # those of the sums: K + 8 for low, one per rank, and a few.
    terms = 4 + (K + 8 + 30 if dtype == torch.float32 else 1)
    assert ((got.double() - want).abs() <= terms * torch.finfo(dtype).eps / 2 * size).all()


@torch.no_grad()
def test_switched_off_or_removed_it_leaves_no_trace(scheme):
    model, x = make(scheme), torch.randn(5, K)
    layer = model.first
    quantised = layer.base_layer
    want = quantised(x)
    assert not torch.equal(layer(x), want)
    scale = layer.scaling["one"]
    layer.scaling["one"] = 0.0
    assert torch.equal(layer(x), want)
    layer.scaling["one"] = scale
    layer.enable_adapters(False)
    assert torch.equal(layer(x), want)
    layer.enable_adapters(True)
    layer.set_adapter([])
    assert torch.equal(layer(x), want)
    layer.set_adapter(["one"])
    assert not torch.equal(layer(x), want)
    layer.delete_adapter("one")
    assert torch.equal(layer(x), want)
    again = peft.get_peft_model(model_of(quantised), config()).unload()
    assert again.first is quantised
    assert torch.equal(again.first(x), want)


def model_of(quantised):
    model = Model()
    model.first = quantised
    return model


@torch.no_grad()
def test_follows_every_change_at_once(scheme):
    layer, x = make(scheme).first, torch.randn(5, K)
    A, B = layer.lora_A["one"], layer.lora_B["one"]
    for change in (
        lambda: A.weight.mul_(2),
        lambda: B.weight.data.mul_(-1),  # which no version counts: hot-swapping writes so
        lambda: setattr(B, "weight", nn.Parameter(torch.randn(N, R))),
        lambda: setattr(A.weight, "data", torch.randn(R, K)),
        lambda: layer.scale_layer(3.0),
        lambda: layer.set_scale("one", 0.25),
        lambda: layer.scaling.update(one=torch.tensor(0.7)),
        lambda: layer.scaling["one"].fill_(-2.0),
        lambda: layer.base_layer.weight_scale.mul_(0.5),
    ):
        before = layer(x)
        change()
        got, want = layer(x), peft_way(layer, x)
        assert not torch.equal(got, before)
        assert (got - want).norm() < 1e-6 * want.norm()


@pytest.mark.parametrize("autocast", [False, True])
def test_trains_as_peft_does(scheme, autocast):
    layer = make(scheme).first
    x = torch.randn(6, K, requires_grad=True)
    factors = [layer.lora_A["one"].weight, layer.lora_B["one"].weight]

    def gradients(call):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = call()
        return torch.autograd.grad(y.float().square().sum(), [x, *factors])

    found = gradients(lambda: layer(x))
    for got, want in zip(found, gradients(lambda: peft_way(layer, x)), strict=True):
        assert got.dtype == want.dtype
        # Sums in another order; in bfloat16 about three roundings of 2^-9 each on either side.
        assert (got - want).norm() < (0.02 if autocast else 1e-5) * want.norm()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert len(calls(layer, x).products()) == 1


def test_an_optimiser_trains_it(scheme):
    layer, x = make(scheme, init_lora_weights=True).first, torch.randn(64, K)
    target = layer.base_layer(x) + x @ torch.randn(K, 2) @ torch.randn(2, N) / K**0.5
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimiser = torch.optim.Adam(trained, lr=0.02)
    losses = []
    for _ in range(40):
        loss = (layer(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_forward_mode_reaches_the_factors(scheme):
    layer, x = make(scheme).first, torch.randn(5, K)
    values = {n: p.detach() for n, p in layer.named_parameters()}
    tangents = {n: torch.randn_like(p) for n, p in values.items()}

    def call(parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    y, t_y = torch.func.jvp(call, (values,), (tangents,))
    A, B = (values[f"lora_{f}.one.weight"].double() for f in "AB")
    t_A, t_B = (tangents[f"lora_{f}.one.weight"].double() for f in "AB")
    want = (x.double() @ t_A.T @ B.T + x.double() @ A.T @ t_B.T) * layer.scaling["one"]
    assert (y - layer(x)).norm() < 1e-6 * y.norm()
    assert (t_y.double() - want).norm() < 1e-5 * want.norm()


@torch.no_grad()
def test_rank_stabilised_scaling_joins():
    layer, x = make(use_rslora=True).first, torch.randn(5, K)
    assert layer.scaling["one"] == 6 / R**0.5
    assert len(calls(layer, x).products()) == 1
    want = peft_way(layer, x)
    assert (layer(x) - want).norm() < 1e-6 * want.norm()


def with_hook(layer):
    layer.lora_A["one"].register_forward_hook(lambda m, args, y: 2 * y)


@pytest.mark.parametrize(
    ("options", "prepare", "kwargs"),
    [
        ({"use_dora": True}, None, {}),
        ({"lora_bias": True}, None, {}),
        ({"lora_dropout": 0.5}, None, {}),
        ({}, with_hook, {}),
        ({}, None, {"adapter_names": ["one", "__base__", "one"]}),
    ],
    ids=["dora", "bias", "dropout", "hook", "adapter of each image"],
)
def test_what_the_branch_cannot_express_goes_pefts_way(options, prepare, kwargs):
    layer, x = make(**options).first.train(), torch.randn(3, K)
    if prepare is not None:
        prepare(layer)
    torch.manual_seed(1)
    got = layer(x, **kwargs)
    torch.manual_seed(1)
    assert torch.equal(got, peft_way(layer, x, **kwargs))
    assert not torch.equal(got, layer.base_layer(x))
    got.sum().backward()
    assert layer.lora_B["one"].weight.grad.abs().sum() > 0


@torch.no_grad()
def test_dropout_that_is_not_drawn_joins():
    layer, x = make(lora_dropout=0.5).first.eval(), torch.randn(3, K)
    assert len(calls(layer, x).products()) == 1


def test_float32_factors_under_16_bits():
    layer = make(dtype=torch.bfloat16).first
    for factor in (layer.lora_A, layer.lora_B):
        factor["one"].float()
    x = torch.randn(5, K).bfloat16()
    assert torch.equal(layer(x), peft_way(layer, x))  # training keeps their precision
    with torch.no_grad():
        got, want = layer(x), peft_way(layer, x)
        assert len(calls(layer, x).products()) == 1
        # x is rounded to 2^-9; so are A, the projection and the output of either.
        assert (got.float() - want.float()).norm() < 4 * 2**-9 * want.float().norm()


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["w4a8-g32-r8", "w8a8-h64", "w4a8-g32-r8-h64"])
def test_a_smoothed_or_rotated_layer_projects_x_as_it_is(scheme):
    layer = make(scheme).first
    quantised = layer.base_layer
    quantised.smooth = torch.rand(K) + 0.5
    x = torch.randn(5, K)
    want = peft_way(layer, x)
    assert (layer(x) - want).norm() < 1e-6 * want.norm()
    assert len(calls(layer, x).products()) == len(calls(quantised, x).products())


@torch.no_grad()
def test_copies_and_files(scheme):
    model, x = make(scheme), torch.randn(5, K)
    want = model(x)
    twin = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    model.first.lora_B["one"].weight.zero_()
    for other in (twin, loaded):
        assert torch.equal(other(x), want)
        assert len(calls(other.first, x).products()) == 1
    state = peft.get_peft_model_state_dict(twin, adapter_name="one")
    assert state.keys() == {"first.lora_A.weight", "first.lora_B.weight"}
    peft.set_peft_model_state_dict(model, state, adapter_name="one")
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_compiles_whole_and_swaps_without_compiling_again(scheme):
    model, x = make(scheme), torch.randn(5, K)
    other = make(scheme, r=3, lora_alpha=12)
    state = peft.get_peft_model_state_dict(other, adapter_name="one")
    hotswap.prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(x)
    assert (compiled(x) - want).norm() < 1e-6 * want.norm()
    keys = {k.replace(".weight", ".one.weight"): v for k, v in state.items()}
    hotswap.hotswap_adapter_from_state_dict(model, keys, "one", config(r=3, lora_alpha=12))
    assert model.first.scaling["one"] == 4
    swapped = model(x)
    assert not torch.equal(swapped, want)
    other.first.base_layer, other.second = model.first.base_layer, model.second
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert (compiled(x) - swapped).norm() < 1e-6 * want.norm()
    assert (other(x) - swapped).norm() < 1e-6 * want.norm()


def test_compiled_training():
    layer, x = make("w8a8").first, torch.randn(5, K)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    factors = [layer.lora_A["one"].weight, layer.lora_B["one"].weight]
    want = torch.autograd.grad(layer(x).square().sum(), factors)
    got = torch.autograd.grad(compiled(x).square().sum(), factors)
    assert all((a - b).norm() < 1e-5 * b.norm() for a, b in zip(got, want, strict=True))


def test_loading_does_not_compute_weights(scheme, monkeypatch):
    computed, layer_type = [], QuantLinear.kinds[Scheme.parse(scheme).kind]
    inner = layer_type.dequantize_weight

    def dequantize(quantized, scale):
        computed.append(quantized)
        return inner(quantized, scale)

    model = make(scheme, torch.bfloat16)
    monkeypatch.setattr(layer_type, "dequantize_weight", staticmethod(dequantize))
    peft.inject_adapter_in_model(config(), model, "two")
    fresh = model_of(model.first.base_layer)
    peft.inject_adapter_in_model(config(), fresh, "one")
    assert len(computed) <= 2
    assert fresh.first.lora_A["one"].weight.dtype == torch.bfloat16
    assert fresh.first.weight.dtype == torch.bfloat16
    assert fresh.first.weight.shape == (N, K)


def test_only_pefts_linear_around_a_quantised_layer_changes():
    model = make()
    assert isinstance(model.first, lora.Linear)
    peft.inject_adapter_in_model(config(target_modules=["second"]), model, "two")
    assert type(model.second) is lora.Linear
    loha = peft.LoHaConfig(r=R, target_modules=["first"])
    other = peft.inject_adapter_in_model(loha, model_of(model.first.base_layer))
    assert type(other.first).__module__.startswith("peft.")


def test_without_peft():
    code = """
import sys
sys.modules["peft"] = None
import torch
from torch import nn
from fewstep.quantization import QuantLinear
class Wrapper(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
wrapper = Wrapper(QuantLinear.from_linear(nn.Linear(64, 64)))
assert wrapper.base_layer(torch.randn(2, 64)).shape == (2, 64)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
