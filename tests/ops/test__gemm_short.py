"""The short way of a product to its CPU kernel: the bits of the long one, and left in time."""

import copy
import itertools

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep import ops
from fewstep.ops._register import DerivativeError

OPS = ("gemm_w8a8", "gemm_w4a8")
N, K = 70, 128


class Watch:
    """Stands in for `run_short` in an op's module; `taken` is whether the last call was its own."""

    def __init__(self, module, monkeypatch):
        self.real, self.closed, self.taken = module.run_short, False, None
        monkeypatch.setattr(module, "run_short", self)

    def __call__(self, *args):
        out = None if self.closed else self.real(*args)
        self.taken = out is not None
        return out

    def long(self, call, *args, **kwargs):
        """Return what the call gives the long way."""
        self.closed = True
        try:
            return call(*args, **kwargs)
        finally:
            self.closed = False


@pytest.fixture(params=OPS)
def op(request):
    return request.param


@pytest.fixture
def watch(op, monkeypatch):
    return Watch(ops.module(op), monkeypatch)


def weight(op):
    return ops.quantize_int8(torch.randn(N, K)) if op == "gemm_w8a8" else quantize_int4()


def quantize_int4():
    return ops.quantize_int4(torch.randn(N, K), group=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_has_the_bits_of_the_long_way(op, watch, dtype):
    """Both under no_grad and with gradients on, where nothing requires one."""
    call, (w, w_scale) = getattr(ops, op), weight(op)
    rows = [(), (3,), (70,), (2, 5), (2, 1, 40), (0,), (4, 0)]
    down, up = torch.randn(6, K).to(dtype), torch.randn(N, 6).to(dtype)
    smooth, bias = torch.rand(K).to(dtype) + 0.5, torch.randn(N).to(dtype)
    options = itertools.product(
        (None, bias), (None, smooth), (0, 32), (None, "silu", "geglu"), (None, torch.float32)
    )
    for count, (b, s, rotate, activation, out_dtype) in enumerate(options):
        shape = rows[count % len(rows)]
        x = torch.randn(*shape, K).to(dtype)
        given = {"bias": b, "smooth": s, "rotate": rotate, "activation": activation}
        given["out_dtype"] = out_dtype
        given |= {"down": down, "up": up} if count % 5 < 2 else {}
        with torch.set_grad_enabled(rotate == 0):
            out = call(x, None, w, w_scale, **given)
            assert watch.taken == (len(shape) > 0 and 0 not in shape)
            want = watch.long(call, x, None, w, w_scale, **given)
        assert torch.equal(out, want)
        assert (out.shape, out.dtype, out.stride()) == (want.shape, want.dtype, want.stride())


def test_has_the_bits_of_the_long_way_for_integers(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    for shape in ((70,), (2, 3)):
        q, scale = ops.quantize_int8(torch.randn(*shape, K))
        for out_dtype in (None, torch.bfloat16):
            out = call(q, scale, w, w_scale, out_dtype=out_dtype)
            assert watch.taken
            assert torch.equal(out, watch.long(call, q, scale, w, w_scale, out_dtype=out_dtype))


def test_rows_may_lie_apart(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x = torch.randn(6, 4, 2 * K)
    # Rows of one stride are taken as they lie, also across axes; others, and columns apart, not.
    cases = {True: (x[:, 0, :K], x[..., :K], x[:1, :, K:]), False: (x[:, :3, :K], x[..., ::2])}
    for taken, views in cases.items():
        for view in views:
            out = call(view, None, w, w_scale)
            assert watch.taken is taken
            assert torch.equal(out, call(view.contiguous(), None, w, w_scale))


def test_weights_may_lie_apart(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x, bias = torch.randn(5, K), torch.randn(N, 2)
    for given in ({"w": w.t().contiguous().t()}, {"bias": bias[:, 0]}):
        given = {"w": w, "bias": None} | given
        out = call(x, None, given["w"], w_scale, bias=given["bias"])
        assert not watch.taken
        packed = {key: v if v is None else v.contiguous() for key, v in given.items()}
        assert torch.equal(out, call(x, None, packed["w"], w_scale, bias=packed["bias"]))
        assert watch.taken


class Tagged(torch.Tensor):
    """A tensor that sees what is done to it."""


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    names: tuple = ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names += (function.name(),)
        return function(*args, **(kwargs or {}))


def test_is_left_where_someone_watches(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x = torch.randn(5, K)
    want = call(x, None, w, w_scale)
    assert watch.taken
    with Functions():
        assert torch.equal(call(x, None, w, w_scale), want)
        assert not watch.taken
    with Dispatch() as mode:
        assert torch.equal(call(x, None, w, w_scale), want)
    assert f"fewstep::{op}" in mode.names
    with torch.profiler.profile() as profile:
        call(x, None, w, w_scale)
    assert f"fewstep::{op}" in {event.name for event in profile.events()}
    assert not watch.taken
    assert torch.equal(torch.vmap(lambda x: call(x, None, w, w_scale))(x[:, None])[:, 0], want)
    assert not watch.taken
    tagged = call(x.as_subclass(Tagged), None, w, w_scale)
    assert not watch.taken
    assert torch.equal(tagged.as_subclass(torch.Tensor), want)
    assert torch.equal(call(torch._neg_view(-x), None, w, w_scale), want)
    assert not watch.taken
    assert torch.equal(call(torch.nn.Parameter(x, requires_grad=False), None, w, w_scale), want)
    assert watch.taken


def test_is_left_where_something_is_differentiated(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x, bias = torch.randn(5, K), torch.randn(N)
    for name in ("x", "bias"):
        leaf = {"x": x, "bias": bias}[name].clone().requires_grad_()
        given = {"x": x, "bias": bias, name: leaf}
        call(given["x"], None, w, w_scale, bias=given["bias"]).sum().backward()
        assert not watch.taken
        assert leaf.grad.abs().sum() > 0
        with torch.no_grad():
            assert not call(given["x"], None, w, w_scale, bias=given["bias"]).requires_grad
            assert watch.taken
    _, tangent = torch.func.jvp(lambda x: call(x, None, w, w_scale), (x,), (x,))
    assert not watch.taken
    assert tangent.abs().sum() > 0
    with forward_ad.dual_level(), torch.no_grad():
        dual = forward_ad.make_dual(x, x)
        assert torch.equal(forward_ad.unpack_dual(call(dual, None, w, w_scale)).tangent, tangent)
    with pytest.raises(DerivativeError):
        call(x, None, w, w_scale.clone().requires_grad_())


def test_is_left_for_other_arguments(op, watch):
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x = torch.randn(5, K)
    want, gate = call(x, None, w, w_scale), torch.rand(N)
    assert watch.taken
    watch.taken = False
    branch = {"low": torch.randn(5, 3), "up": torch.zeros(N, 3)}
    assert torch.equal(call(x, None, w, w_scale, **branch), want)
    assert torch.equal(call(x, None, w, w_scale, gate=torch.ones(N)), want)
    assert torch.equal(call(x, None, w, w_scale, residual=torch.zeros(5, N)), want)
    q, scale = call(x, None, w, w_scale, gate=gate, out_dtype=torch.int8)
    assert (q.dtype, scale.shape) == (torch.int8, (5,))
    call(x, None, w, w_scale, impl="reference")
    assert not watch.taken
    assert torch.equal(call(x, None, w, w_scale, impl="native"), want)
    assert watch.taken


def test_reads_what_tensors_hold_now(op, watch):
    """Nothing is kept between calls: not of memory, not of values, not of sizes."""
    call, (w, w_scale) = getattr(ops, op), weight(op)
    x = torch.randn(5, K)
    call(x, None, w, w_scale)
    other, other_scale = weight(op)
    want = call(x, None, other, other_scale)
    w.copy_(other)
    w_scale.data = copy.deepcopy(other_scale)
    assert torch.equal(call(x, None, w, w_scale), want)
    w.data, w_scale.data = other[:9], other_scale[:9]
    assert torch.equal(call(x, None, w, w_scale), want[:, :9])
    assert watch.taken


WRONG = [
    {"a": None},
    {"a": [1.0]},
    {"a": torch.tensor(1.0)},
    {"a": torch.randn(5, K).double()},
    {"a": torch.ones(5, K, dtype=torch.int8)},
    {"a": torch.randn(5, K + 32)},
    {"a": torch.randn(5, K, device="meta")},
    {"a_scale": torch.ones(5)},
    {"a_scale": torch.ones(3, 2), "a": torch.ones(2, 3, K, dtype=torch.int8)},
    {"a_scale": torch.ones(6), "a": torch.ones(2, 3, K, dtype=torch.int8)},
    {"a_scale": torch.ones(5, 1), "a": torch.ones(5, K, dtype=torch.int8)},
    {"w": None},
    {"w": torch.zeros(N, dtype=torch.int8)},
    {"w": torch.randn(N, K)},
    {"w_scale": None},
    {"w_scale": torch.ones(N).double()},
    {"w_scale": torch.ones(N - 1)},
    {"bias": torch.ones(N - 1)},
    {"bias": torch.ones(N).double()},
    {"bias": 1.0},
    {"smooth": torch.ones(K).double()},
    {"smooth": torch.ones(K - 1)},
    {"smooth": torch.ones(K - 1), "a": torch.randn(0, K)},
    {"up": torch.randn(N, 3)},
    {"down": torch.randn(3, K)},
    {"down": torch.randn(3, K).bfloat16(), "up": torch.randn(N, 3)},
    {"down": torch.randn(3, K + 1), "up": torch.randn(N, 3)},
    {"down": torch.randn(3, K + 1), "up": torch.randn(N, 3), "a": torch.randn(0, K)},
    {"down": torch.randn(3, K), "up": torch.randn(N, 4)},
    {"down": torch.randn(3, K), "up": torch.randn(N, 3).double()},
    {"down": torch.randn(3), "up": torch.randn(N, 3)},
    {"rotate": False},
    {"rotate": 24},
    {"rotate": 1 << 70},
    {"rotate": 256},
    {"activation": ""},
    {"activation": "relu"},
    {"activation": ["gelu"]},
    {"out_dtype": torch.float64},
    {"out_dtype": torch.int32},
]


@pytest.mark.parametrize("change", WRONG, ids=lambda c: "-".join(c))
def test_says_of_bad_input_what_the_long_way_says(op, watch, change):
    w, w_scale = weight(op)
    given = {"a": torch.randn(5, K), "a_scale": None, "w": w, "w_scale": w_scale} | change
    said = []
    for call in (getattr(ops, op), lambda **given: watch.long(getattr(ops, op), **given)):
        with pytest.raises((TypeError, ValueError, ops.UnsupportedError)) as error:
            call(**given)
        said.append((error.type, str(error.value)))
    assert said[0] == said[1]


def test_an_odd_half_is_refused(op, watch):
    w, w_scale = weight(op)
    with pytest.raises(ValueError, match="w: expected an even N for geglu, got 69"):
        getattr(ops, op)(torch.randn(5, K), None, w[:-1], w_scale[:-1], activation="geglu")
