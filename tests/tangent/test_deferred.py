"""Modulated norms and gated residuals written out: which are fused, and what they give."""

import weakref

import pytest
import torch
import torch.nn.functional as F

import fewstep
from fewstep.tangent.deferred import Deferred
from helpers import relative_error
from tangent_nets import by_duals, unfused_jvp
from tangent_points import B, C, N, Point, layer, normal, rms, ways


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
