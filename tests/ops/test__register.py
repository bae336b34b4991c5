"""No registered op may lose a derivative: each way of asking for one is right or raises."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from fewstep import ops
from fewstep.ops._register import DerivativeError, register
from fewstep.ops._select import Implementation


def bind(op):
    """Return one floating input of the op's first gate case, and the op as a function of it."""
    args, kwargs, _, _ = ops.module(op).gate_cases(torch.device("cpu"))[0]
    function = getattr(ops, op)
    for key, value in enumerate(args):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value, lambda x, key=key: function(*args[:key], x, *args[key + 1 :], **kwargs)
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value, lambda x, key=key: function(*args, **{**kwargs, key: x})
    raise AssertionError(f"{op}: its gate case has no floating tensor")


def call_with(op, transform):
    """Call `op` on its first gate case with `transform` applied to one floating input."""
    value, function = bind(op)
    return function(transform(value))


@pytest.mark.parametrize("op", ops.OPS)
def test_func_jvp(op):
    def f(scale):
        return call_with(op, lambda x: x * scale)

    with pytest.raises(DerivativeError):
        torch.func.jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),))


@pytest.mark.parametrize("op", ops.OPS)
def test_dual_numbers(op):
    with forward_ad.dual_level(), pytest.raises(DerivativeError):
        call_with(op, lambda x: forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("op", ops.OPS)
def test_requires_grad(op):
    with pytest.raises(DerivativeError):
        call_with(op, lambda x: x.clone().requires_grad_())
    with torch.no_grad():
        call_with(op, lambda x: x.clone().requires_grad_())


@pytest.mark.parametrize("op", ops.OPS)
def test_func_vjp(op):
    with pytest.raises(DerivativeError):
        torch.func.vjp(lambda s: call_with(op, lambda x: x * s), torch.tensor(1.0))


@pytest.mark.parametrize("op", ops.OPS)
def test_jvp_around_compiled_code(op):
    value, function = bind(op)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    compiled(value)  # so that only the derivative can be what is refused below
    # Which layer refuses is torch's business; a plain result would be a lost tangent.
    with pytest.raises(Exception, match=r"."):
        torch.func.jvp(compiled, (value,), (value,))
    torch._dynamo.reset()  # the failed attempt would mark the op's frame as not compilable


def test_without_the_guard_the_tangent_is_lost():
    """The reason for the guard: a bare registered op returns an all-zero tangent, silently."""
    library = torch.library.Library("fewstep_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    x = torch.ones(3)
    _, tangent = torch.func.jvp(torch.ops.fewstep_test.twice, (x,), (x,))
    assert torch.equal(tangent, torch.zeros(3))


def test_register_refuses_through_the_public_path():
    implementation = Implementation("reference", lambda x: x * 2, lambda *a, **k: None)
    op = register(
        "test_only_twice",
        "(Tensor x, str impl) -> Tensor",
        [implementation],
        lambda x, impl: torch.empty_like(x),
    )
    x = torch.ones(3)
    assert torch.equal(op(x, "reference"), x * 2)
    with pytest.raises(DerivativeError, match="test_only_twice has no forward-mode rule"):
        torch.func.jvp(lambda a: op(a, "reference"), (x,), (x,))
