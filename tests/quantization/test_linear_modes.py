"""A QuantLinear under torch's modes: compiled, exported, captured, autocast, differentiated."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from quantized_linear import SCHEMES, make

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def test_inference_mode(scheme):
    with torch.inference_mode():
        _, quantized = make(scheme=scheme)
        x = torch.randn(4, 192)
        assert torch.equal(quantized(x), copy.deepcopy(quantized)(x))


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


def test_a_frozen_layer_does_not_keep_its_input():
    _, quantized = make()
    saved = []
    with (
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape), lambda t: t),
    ):
        quantized(torch.randn(1000, 192, requires_grad=True))
    assert torch.Size([1000, 192]) not in saved


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
