"""What is deferred is never read before it is there, nor from inputs that have changed."""

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
from tangent_nets import by_duals, by_transform, unfused_jvp
from tangent_points import B, C, N, Point, layer, ways


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
