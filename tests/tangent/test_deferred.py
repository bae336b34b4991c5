"""Modulated norms and gated residuals written out: fused, and never read before they are there."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.tangent import deferred
from fewstep.tangent.deferred import Deferred, Intermediate
from helpers import relative_error
from tangent_nets import unfused_jvp

B, N, C = 2, 3, 8


@pytest.fixture
def calls(monkeypatch):
    """Ops that are called: "norm", with the modulation they were given, and "gate"."""
    found = []

    def norm(*args, fused=deferred.norm_jvp, **kwargs):
        given = [name for name in ("scale", "shift") if kwargs.get(name) is not None]
        found.append(" ".join(["norm", *given]))
        return fused(*args, **kwargs)

    def gate(*args, fused=deferred.modulate_jvp):
        found.append("gate")
        return fused(*args)

    monkeypatch.setattr(deferred, "norm_jvp", norm)
    monkeypatch.setattr(deferred, "modulate_jvp", gate)
    return found


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def by_duals(f, x, t):
    return fewstep.jvp(f, x, t)


def by_transform(f, x, t):
    with fewstep.forward_mode():
        return torch.func.jvp(f, (x,), (t,))


def mode_inside(f, x, t):
    def inside(x):
        with fewstep.forward_mode():
            return f(x)

    return torch.func.jvp(inside, (x,), (t,))


ways = pytest.mark.parametrize("way", [by_duals, by_transform, mode_inside])


class Point:
    """A point, a direction, and a map from x to modulations: v(x, i) [B, 1, C] has a tangent."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        self.x, self.t = (normal(B, N, C, dtype=dtype).requires_grad_() for _ in range(2))
        self.w = normal(5, C, C, dtype=dtype).requires_grad_()
        self.affine = [normal(C, dtype=dtype).requires_grad_() for _ in range(2)]

    @property
    def leaves(self):
        return self.x, self.t, self.w, *self.affine

    def v(self, x, i, keep=True):
        return (x.mean(1, keepdim=keep) @ self.w[i]).tanh()

    def compare(self, f, way):
        """Compare f with torch's own operators: values, and gradients through both."""
        want, got = unfused_jvp(f, self.x, self.t), way(f, self.x, self.t)
        assert [type(o) for o in got] == [torch.Tensor] * 2
        torch.testing.assert_close(tuple(got), want)
        sums = (out.sin().sum() + t_out.cos().sum() for out, t_out in (got, want))
        torch.testing.assert_close(
            *(torch.autograd.grad(s, self.leaves, allow_unused=True) for s in sums)
        )


def layer(x):
    return F.layer_norm(x, (C,), None, None, 1e-6)


def rms(x):
    return F.rms_norm(x, (C,), None, 1e-6)


def in_statements(p, x):
    scale, shift = p.v(x, 0, keep=False), p.v(x, 1, keep=False)
    y = layer(x)
    y = y * (1 + scale[:, None]) + shift[:, None]
    return y.sin()


def two_modulations_of_a_norm(p, x):
    a, b, c, d = (p.v(x, i) for i in range(4))
    y = layer(x)
    one = y * (1 + a) + b
    return one * (y * (1 + c) + d)


def gate_in_statements(p, x):
    gate, y = p.v(x, 0), x.sin()
    y = gate * y
    x = x + y
    return x.cos()


FUSED = {
    "adaLN": (
        lambda p, x: layer(x) * (1 + p.v(x, 0)) + p.v(x, 1),
        ["norm", "norm"],
    ),
    "modulation drawn before": (
        lambda p, x: (lambda a, b: layer(x) * (1 + a) + b)(p.v(x, 0), p.v(x, 1)),
        ["norm scale shift"],
    ),
    "other order": (
        lambda p, x: (lambda a, b: b + (a + 1) * rms(x))(p.v(x, 0), p.v(x, 1)),
        ["norm scale shift"],
    ),
    "in statements": (in_statements, ["norm scale shift"]),
    "functions": (
        lambda p, x: (lambda a, b: torch.add(torch.mul(layer(x), torch.add(a, 1)), b))(
            p.v(x, 0), p.v(x, 1)
        ),
        ["norm scale shift"],
    ),
    "axes afterwards": (
        lambda p, x: (lambda a, b: rms(x) * (1 + a)[:, None, :] + b.unsqueeze(1))(
            p.v(x, 0, False), p.v(x, 1, False)
        ),
        ["norm scale shift"],
    ),
    "per token": (lambda p, x: (lambda a: layer(x) * (1 + a) + a)(x.sin()), ["norm scale shift"]),
    "weight, bias, scale alone": (
        lambda p, x: (lambda a: F.layer_norm(x, (C,), *p.affine) * (1 + a))(p.v(x, 0)),
        ["norm scale"],
    ),
    "shift alone": (lambda p, x: (lambda b: layer(x) + b)(p.v(x, 0)), ["norm shift"]),
    "post-norm": (lambda p, x: x + rms(x), ["norm shift"]),
    "cast to its own dtype": (
        lambda p, x: (lambda a: layer(x).to(torch.float64) * (1 + a) + a)(p.v(x, 0)),
        ["norm scale shift"],
    ),
    "twice": (two_modulations_of_a_norm, ["norm scale shift", "norm scale shift"]),
    "gate": (lambda p, x: (lambda g, y: x + g * y)(p.v(x, 0), x.sin()), ["gate"]),
    "gate, other order": (lambda p, x: (lambda g, y: y * g + x)(p.v(x, 0), x.sin()), ["gate"]),
    "gate in statements": (gate_in_statements, ["gate"]),
    "gate without a tangent": (
        lambda p, x: (lambda y: x + p.affine[0] * y)(x.sin()),
        ["gate"],
    ),
    "branch without a tangent": (
        lambda p, x: (lambda g: x + g * p.t.detach())(p.v(x, 0)),
        ["gate"],
    ),
    "gate of one plus": (
        lambda p, x: (lambda a, y: x + y * (1 + a))(p.v(x, 0), x.sin()),
        ["gate"],
    ),
}
FUSED["adaLN"] = (FUSED["modulation drawn before"][0], ["norm scale shift"])


@ways
@pytest.mark.parametrize("name", FUSED)
def test_fused(name, way, calls):
    f, ops = FUSED[name]
    point = Point()
    way(lambda x: f(point, x), point.x, point.t)
    assert calls == ops
    point.compare(lambda x: f(point, x), way)


@pytest.mark.parametrize("name", FUSED)
def test_a_loss_of_the_output_alone_leaves_the_tangents_alone(name):
    """Its backward doesn't walk through what has led to the tangents, with zeros."""
    point, walked = Point(), []
    t = point.t.sin()
    t.register_hook(walked.append)
    out, t_out = by_duals(lambda x: FUSED[name][0](point, x), point.x, t)
    (got,) = torch.autograd.grad(out.sin().sum(), point.x, retain_graph=True)
    assert not walked
    plain = FUSED[name][0](point, point.x)
    torch.testing.assert_close(got, torch.autograd.grad(plain.sin().sum(), point.x)[0])
    t_out.sum().backward()
    assert walked


UNFUSED = {
    "another factor": lambda p, x: layer(x) * p.v(x, 0) + p.v(x, 1),
    "a number": lambda p, x: 2 * layer(x) + 1,
    "a norm plus one": lambda p, x: (layer(x) + 1) * (1 + x),
    "two norms": lambda p, x: layer(x) + rms(x) * layer(x),
    "subtraction": lambda p, x: x - p.v(x, 0) * x,
    "alpha": lambda p, x: torch.add(x, p.v(x, 0) * x, alpha=2),
    "out of place, then in place": lambda p, x: (1 * layer(x)).mul_(1 + p.v(x, 0)).add_(x),
    "in place on a norm": lambda p, x: layer(x).mul_(1 + p.v(x, 0)).add_(p.v(x, 1)),
    "in place with a branch": lambda p, x: x.clone().add_(p.v(x, 0) * x),
    "a branch of a wider result": lambda p, x: x[:, :1] + p.v(x, 0) * x,
    "a norm of a wider result": lambda p, x: layer(x[:, :1]) + x,
    "two branches": lambda p, x: p.v(x, 0) * x + p.v(x, 1) * x.sin(),
    "items": lambda p, x: torch.stack([y * 2 for y in layer(x)]) + layer(x)[..., :1],
    "concatenated": lambda p, x: torch.cat([layer(x), p.v(x, 0) * x, 1 + p.v(x, 0)], 1),
    "einsum": lambda p, x: torch.einsum("bnc,bmc->bnm", layer(x), p.v(x, 0) * x),
    "unary": lambda p, x: (1 + p.v(x, 0)).exp() * layer(x).sin(),
    "where": lambda p, x: torch.where(x > 0, layer(x), p.v(x, 0) * x),
    "used again after fusing": lambda p, x: (
        lambda y, a: (y * (1 + a) + a) * y.sin() * (1 + a).cos()
    )(layer(x), p.v(x, 0)),
    "branch used again": lambda p, x: (lambda y: (x + y) * y)((lambda g: g * x)(p.v(x, 0))),
    "softmax": lambda p, x: (p.v(x, 0) * x).softmax(-1),
    "another norm": lambda p, x: layer(rms(p.v(x, 0) * x)),
}


@ways
@pytest.mark.parametrize("name", UNFUSED)
def test_computed_when_used_otherwise(name, way):
    f, point = UNFUSED[name], Point()
    point.compare(lambda x: f(point, x), way)


READS = {
    "shape": lambda y: tuple(y.shape) == (B, N, C),
    "size": lambda y: y.size(1) == N,
    "dtype": lambda y: y.dtype is torch.float64,
    "device": lambda y: y.device.type == "cpu",
    "len": lambda y: len(y) == B,
    "repr": lambda y: repr(y).startswith("tensor("),
    "format": lambda y: f"{y}".startswith("tensor("),
    "stride": lambda y: y.stride() == (N * C, C, 1),
    "data_ptr": lambda y: y.data_ptr() > 0,
    "numpy": lambda y: y.detach().numpy().shape == (B, N, C),
    "isinstance": lambda y: isinstance(y, torch.Tensor) and torch.is_tensor(y),
    "requires_grad": lambda y: y.requires_grad,
    "grad_fn": lambda y: y.grad_fn is not None,
    "contiguous": lambda y: y.is_contiguous(),
    "storage": lambda y: y.untyped_storage().nbytes() == B * N * C * 8,
    "bool": lambda y: bool((y == y).all()),
    "item": lambda y: isinstance(y[0, 0, 0].item(), float),
    "list": lambda y: len(y.tolist()) == B,
    "hash": lambda y: hash(y) == id(y),
    "iteration": lambda y: len(list(y)) == B,
    "weak reference": lambda y: weakref.ref(y)() is y,
    "view": lambda y: y.view(-1).numel() == y.numel(),
}


ALLOWED = ("isinstance", "hash", "weak reference")
"""What doesn't look inside. The object is the same before and after."""


@pytest.mark.parametrize("kind", ["norm", "branch"])
@pytest.mark.parametrize("name", READS)
def test_every_way_to_look_at_one(name, kind):
    point = Point()

    def f(x, look=True):
        gate = point.v(x, 0)
        y = layer(x) if kind == "norm" else gate * x
        if look:
            assert type(y) is Deferred
            assert READS[name](y)
            assert type(y) is (Deferred if name in ALLOWED else torch.Tensor)
        return y

    got = by_duals(f, point.x, point.t)
    want = unfused_jvp(lambda x: f(x, look=False), point.x, point.t)
    torch.testing.assert_close(tuple(got), want)


def test_an_object_that_is_looked_at_stays_the_same_object():
    point = Point()

    def f(x):
        y = layer(x)
        held = {"y": y}
        y.sin()
        assert held["y"] is y
        assert type(y) is torch.Tensor
        return held["y"]

    point.compare(f, by_duals)


@ways
def test_inputs_that_are_written_to(way):
    """What is deferred is computed before anything is written."""
    point = Point()

    def f(x):
        x, gate = x.clone(), point.v(x, 0)
        y = layer(x)
        x.mul_(2)
        z = gate * x
        gate.zero_()
        u = 1 + gate
        gate += 1
        a = layer(x) * (1 + gate)
        x[0] = 0
        return y + z + u + a * x

    def without(x):
        kept = torch.tensor([0.0, 1.0]).double().view(B, 1, 1)
        return layer(x) + point.v(x, 0) * 2 * x + 1 + layer(2 * x) * 2 * kept * 2 * x

    got, want = way(f, point.x, point.t), unfused_jvp(without, point.x, point.t)
    torch.testing.assert_close(tuple(got), want)


def test_what_was_fused_and_then_changed_raises():
    point = Point()

    def f(x):
        x, gate = x.clone(), point.v(x, 0)
        y = gate * x
        out = x + y
        x.mul_(2)
        return out * y

    with pytest.raises(RuntimeError, match="changed in place"):
        by_duals(f, point.x, point.t)


@ways
def test_gradient_modes(way):
    """Values are computed as if at once: with or without a graph."""
    point = Point()

    def f(x):
        with torch.no_grad():
            y, a = layer(x), point.v(x, 0)
            z, one = a * x, 1 + a
        assert not (y + 0).requires_grad
        u = layer(x)
        with torch.no_grad():
            w = u * (1 + a) + a
        assert not w.requires_grad
        return u * one + x + z + y * w

    got, want = way(f, point.x, point.t), torch.func.jvp(f, (point.x,), (point.t,))
    torch.testing.assert_close(tuple(got), want)


@ways
def test_detached(way):
    point = Point()
    point.compare(lambda x: layer(x.detach()) * x + point.v(x, 0).detach() * x.sin(), way)

    def f(x):
        return layer(x).detach() * x + (point.v(x, 0) * x).detach()

    got, want = way(f, point.x, point.t), torch.func.jvp(f, (point.x,), (point.t,))
    torch.testing.assert_close(tuple(got), want)


class Double(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * t


class Norm(Double):
    """Whose forward itself uses what is deferred elsewhere."""

    @staticmethod
    def forward(x):
        y = F.layer_norm(x, (C,))
        assert type(y) is not Deferred
        return 2 * x + 0 * y


@ways
@pytest.mark.parametrize("function", [Double, Norm])
def test_autograd_functions(function, way):
    point = Point()

    def f(x):
        gate = point.v(x, 0)
        y = gate * x
        out = x + y  # y is spent, and still held
        return function.apply(layer(x)) + function.apply(gate * x) + function.apply(y) * out

    point.compare(f, way)


@pytest.mark.parametrize("way", [by_duals, by_transform])
def test_checkpointed(way):
    point = Point()

    def block(x):
        gate, scale = point.v(x, 0), point.v(x, 1)
        y = layer(x) * (1 + scale) + gate
        branch = gate * y
        x = x + branch
        return gate * x

    def f(x):
        for _ in range(2):
            x = checkpoint(block, x, use_reentrant=False)
        return x

    want = unfused_jvp(lambda x: block(block(x)), point.x, point.t)
    got = way(f, point.x, point.t)
    torch.testing.assert_close(tuple(got), want)
    leaves = (point.x, point.t, point.w)
    grads = [
        torch.autograd.grad(out.sin().sum() + t_out.cos().sum(), leaves)
        for out, t_out in (got, want)
    ]
    torch.testing.assert_close(*grads)


def test_other_transforms_use_it_as_it_is_today(calls):
    point = Point()

    def f(x):
        return layer(x) * (1 + point.v(x, 0)) + point.v(x, 1) * x

    with fewstep.forward_mode():
        got = torch.func.jacfwd(f)(point.x)
    torch.testing.assert_close(got, torch.func.jacrev(f)(point.x))
    with fewstep.forward_mode():
        _, twice = torch.func.jvp(
            lambda x: torch.func.jvp(f, (x,), (point.t,))[1], (point.x,), (point.t,)
        )
    step = 1e-5
    slopes = [unfused_jvp(f, point.x + s * point.t, point.t)[1] for s in (step, -step)]
    # A central difference: truncation of some step^2, rounding of 2^-52 / step.
    torch.testing.assert_close(twice, (slopes[0] - slopes[1]) / (2 * step), rtol=1e-6, atol=1e-7)
    assert not any("scale" in call for call in calls)


TRANSFORMS = {
    "vmap": lambda y: torch.func.vmap(torch.sin)(y),
    "vmap, closed over": lambda y: torch.func.vmap(lambda z: z * y)(y),
    "grad": lambda y: torch.func.grad(lambda z: (z * z).sum())(y),
    "grad, closed over": lambda y: torch.func.grad(lambda z: (z * y).sum())(y.sin()),
    "jvp": lambda y: torch.func.jvp(torch.sin, (y,), (y,))[1],
    "vjp": lambda y: torch.func.vjp(torch.sin, y)[1](y)[0],
    "vjp, closed over": lambda y: torch.func.vjp(lambda z: z * y, torch.ones(C).double())[1](y)[0],
}


@pytest.mark.parametrize("kind", ["norm", "branch", "spent branch"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_used_inside_a_transform_of_the_model_s_own(name, kind):
    point = Point()

    def f(x):
        gate = point.v(x, 0)
        y = layer(x) if kind == "norm" else gate * x
        out = x + y if kind == "spent branch" else 1
        return TRANSFORMS[name](y) * out

    if kind == "spent branch" and name in ("grad", "vjp"):
        # Wrapped in C++ before any torch function has seen it.
        with pytest.raises(RuntimeError, match="not computed yet"):
            by_transform(f, point.x, point.t)
    else:
        point.compare(f, by_transform)


def test_a_derivative_inside_the_model():
    point = Point()

    def f(x):
        y = layer(x)
        return fewstep.jvp(lambda z: z * y, x, x)[1]

    point.compare(f, by_transform)


@ways
def test_what_comes_out_is_computed(way):
    """Also in structures, and what was taken in by an op."""
    point = Point()

    def f(x):
        gate = point.v(x, 0)
        branch = gate * x
        return {"norm": layer(x), "out": x + branch, "branch": branch, "one": 1 + gate}

    got, t_got = way(f, point.x, point.t)
    for name in got:
        assert type(got[name]) in (torch.Tensor, Intermediate)
        want = unfused_jvp(lambda x, name=name: f(x)[name], point.x, point.t)
        torch.testing.assert_close((got[name], t_got[name]), want)


def test_stashed_results_after_the_level_has_ended():
    point, stash = Point(), []

    def f(x):
        gate = point.v(x, 0)
        branch = gate * x
        stash.extend([layer(x), branch, 1 + gate])
        return x + branch

    by_duals(f, point.x, point.t)
    assert all(type(y) is not Deferred for y in stash)
    torch.testing.assert_close(stash[0].detach(), layer(point.x).detach())
    with fewstep.forward_mode(), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(point.x, point.t))
        assert type(y) is Deferred
    assert type(y) is torch.Tensor


def test_an_error_inside_leaves_nothing_behind():
    point = Point()

    def f(x):
        f.held = layer(x)
        raise KeyError

    with pytest.raises(KeyError):
        by_duals(f, point.x, point.t)
    assert not deferred._state.nodes
    torch.testing.assert_close(f.held.detach(), layer(point.x).detach())


def test_a_gradient_with_respect_to_what_was_fused_raises():
    """It would be a part of what it looks like."""
    point = Point()

    def f(x):
        gate = point.v(x, 0)
        y = gate * x
        return x + y, y, y.sin()

    for ask in (
        lambda out, y: torch.autograd.grad(out.sum(), y),
        lambda out, y: torch.autograd.grad(out.sum(), inputs=[y]),
        lambda out, y: y.register_hook(print),
        lambda out, y: y.retain_grad(),
        lambda out, y: y.grad_fn,
    ):
        with forward_ad.dual_level(), fewstep.forward_mode():
            out, y, _ = f(forward_ad.make_dual(point.x, point.t))
            with pytest.raises(RuntimeError, match="with respect to"):
                ask(out, y)


def test_a_gradient_with_respect_to_what_was_looked_at():
    """A hook that asks at once has the gradients: nothing is fused over it."""
    point, seen = Point(), []
    module = torch.nn.LayerNorm(C, elementwise_affine=False).double()

    def hook(module, args, out):
        if out.requires_grad:
            out.register_hook(seen.append)

    module.register_forward_hook(hook)

    def f(x):
        a = point.v(x, 0)
        return module(x) * (1 + a) + a

    out, _ = by_duals(f, point.x, point.t)
    out.sum().backward()
    want = (1 + point.v(point.x, 0)).expand(B, N, C)
    torch.testing.assert_close(seen[0], want)


def test_another_thread_raises_or_has_it():
    point, found = Point(), []

    def use(y):
        try:
            found.append(y.sin())
        except RuntimeError as error:
            found.append(error)

    def f(x):
        y = layer(x)
        thread = threading.Thread(target=use, args=(y,))
        thread.start()
        thread.join()
        return y

    point.compare(f, by_duals)
    assert "isn't taken any more" in str(found[1])


def test_below_torch_functions_it_raises():
    point = Point()
    with fewstep.forward_mode(), forward_ad.dual_level():
        y = layer(forward_ad.make_dual(point.x, point.t))
        with torch._C.DisableTorchFunction(), pytest.raises(RuntimeError, match="not computed yet"):
            torch.ops.aten.sin(y)


class Looking(TorchFunctionMode):
    """Looks at the arguments of all functions, as a profiler does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for x in args:
            if isinstance(x, torch.Tensor):
                assert x.dim() >= 0
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inner", [True, False])
def test_with_another_mode(inner):
    point = Point()

    def f(x):
        gate = point.v(x, 0)
        with Looking() if inner else contextlib.nullcontext():
            return x + gate * layer(x) * (1 + gate)

    with contextlib.nullcontext() if inner else Looking():
        point.compare(f, by_duals)


def test_nobody_differentiates():
    point = Point()
    with fewstep.forward_mode():
        y = layer(point.x)
        z = point.v(point.x, 0) * point.x
        assert type(y) is type(z) is type(1 + y) is torch.Tensor
        with forward_ad.dual_level():
            y = layer(point.x)
            z = point.v(point.x, 0) * point.x
            assert type(y) is type(z) is torch.Tensor


def test_unused_results_are_never_computed(calls):
    point = Point()

    def f(x):
        layer(x)
        point.v(x, 0) * x
        return x.sin()

    by_duals(f, point.x, point.t)
    assert calls == []


def test_inputs_are_let_go():
    point = Point()
    with fewstep.forward_mode(), forward_ad.dual_level():
        x = forward_ad.make_dual(point.x, point.t).sin()
        gone = weakref.ref(x)
        y = x + point.affine[0].detach() * x
        y = y.detach().sin()
        del x
        gc.collect()
        assert gone() is None
    assert not deferred._state.nodes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accuracy(dtype, calls):
    """At least that of torch's operators in the same precision, also where 1 + scale is small."""
    torch.manual_seed(0)
    x, t, y = (normal(4, 64, 96, dtype=dtype) for _ in range(3))
    scale, shift, gate = (normal(4, 1, 96, dtype=dtype) for _ in range(3))
    scale[..., :48] = -1 + scale[..., :48] * 2**-6

    def f(x):
        scale_of, shift_of, gate_of, y_of = (v.to(x.dtype) for v in (scale, shift, gate, y))
        scale_of = scale_of * (1 + 2**-8 * x.mean(1, keepdim=True))
        z = F.layer_norm(x, (96,)) * (1 + scale_of) + shift_of
        return z, x + gate_of * (y_of * x)

    with fewstep.forward_mode():
        got = torch.func.jvp(f, (x,), (t,))
    assert calls == ["norm scale shift", "gate"]
    unfused = torch.func.jvp(f, (x,), (t,))
    want = torch.func.jvp(f, (x.double(),), (t.double(),))
    for mine, theirs, right in zip(*(sum(r, ()) for r in (got, unfused, want)), strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert relative_error(mine, right) <= 1.05 * relative_error(theirs, right)


def test_promotion_is_torch_s(calls):
    """A norm in bfloat16 times a scale in float32 is float32, and isn't fused."""
    x, t = (normal(B, N, C, dtype=torch.bfloat16) for _ in range(2))
    scale = normal(B, 1, C, dtype=torch.float32)
    gate = normal(B, 1, C, dtype=torch.float32)
    for f in (lambda x: layer(x) * (1 + scale) + scale, lambda x: x + gate * x):
        got, want = by_duals(f, x, t), torch.func.jvp(f, (x,), (t,))
        for mine, theirs in zip(got, want, strict=True):
            assert mine.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-2)
    assert "gate" not in calls
    assert not any("scale" in call for call in calls)


def test_under_autocast():
    x, t = (normal(B, N, C, dtype=torch.float32) for _ in range(2))
    linear = torch.nn.Linear(C, C)

    def f(x):
        scale = linear(x.mean(1, keepdim=True))
        return x + linear(layer(x) * (1 + scale) + scale) * scale

    with torch.autocast("cpu", torch.bfloat16):
        got, want = by_duals(f, x, t), torch.func.jvp(f, (x,), (t,))
    for mine, theirs in zip(got, want, strict=True):
        assert mine.dtype == theirs.dtype
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
