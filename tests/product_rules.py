"""What the tests of the low-bit products share: the low-rank branch, derivatives, what is refused.

A test hands over its op as `op(x, **kwargs)`, bound to a weight, and that weight dequantised, in
float64. Derivatives are compared with those of the dequantised linear layer

    y = x W^T + bias + (x down^T) up^T

in float64: float32 sums of at most n terms are off by at most n 2^-24 of the terms' sizes, which is
also what random terms leave relative to a whole result.
"""

import pytest
import torch

from fewstep.ops._register import DerivativeError
from helpers import relative_error

BRANCH_DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16),
]


def branch_of(rows, N, R, dtypes=BRANCH_DTYPES[0]):
    """Return {"low": [*rows, R], "up": [N, R]}."""
    return {"low": torch.randn(*rows, R).to(dtypes[0]), "up": torch.randn(N, R).to(dtypes[1])}


def add_branch(exact, before, low, up):
    """Return the exact result with a branch, and the bound before rounding to the out dtype."""
    low, up = low.double(), up.double()
    exact = exact + low @ up.mT
    terms = low.abs() @ up.abs().mT
    # See the docstring of ops/_gemm.py. `before` was made without the branch, so it lacks the
    # 2^-24 |exact| of the branch's part.
    return exact, before + (up.shape[1] + 7) * 2.0**-24 * (exact.abs() + terms)


def within(out, exact, before):
    """Return whether out is exact to `before` and half a unit of its dtype (eps is a whole one)."""
    unit = torch.finfo(out.dtype).eps / 2 if out.dtype != torch.float32 else 0
    bound = before + unit * (exact.abs() + before) + torch.finfo(out.dtype).tiny
    return bool(((out.double() - exact).abs() <= bound).all())


def operands(K, N, R, rows=(2, 5)):
    """Return the differentiable inputs of a layer, by name, x first."""
    shapes = {"x": (*rows, K), "bias": (N,), "down": (R, K), "up": (N, R)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def linear(weight):
    """Return the dequantised layer in float64 as a function of tensors in order of `operands`."""

    def layer(x, bias, down, up, low=None):
        low = x @ down.mT if low is None else low
        return x @ weight.mT + bias + low @ up.mT

    return layer


def check_derivatives(op, weight, R=3):
    """Compare gradients and tangents of every differentiable input with the exact ones."""
    N, K = weight.shape
    tolerance = max(N, K) * 2.0**-24
    inputs = operands(K, N, R)
    names, values = list(inputs), tuple(inputs.values())
    wide = tuple(x.double() for x in values)

    def layer(*args):
        return op(args[0], **dict(zip(names[1:], args[1:], strict=True)))

    d_y = torch.randn(2, 5, N)
    _, pull = torch.func.vjp(linear(weight), *wide)
    leaves = [x.clone().requires_grad_() for x in values]
    gradients = torch.autograd.grad(layer(*leaves), leaves, d_y)
    for name, got, want in zip(names, gradients, pull(d_y.double()), strict=True):
        assert relative_error(got, want) <= tolerance, name

    # One direction at a time, so that none hides behind the others, then all together.
    directions = [tuple(torch.randn_like(x) for x in values)]
    directions += [
        tuple(t if i == only else torch.zeros_like(t) for i, t in enumerate(directions[0]))
        for only in range(len(values))
    ]
    for tangents in directions:
        primal, tangent = torch.func.jvp(layer, values, tangents)
        assert torch.equal(primal, layer(*values))
        _, want = torch.func.jvp(linear(weight), wide, tuple(t.double() for t in tangents))
        assert relative_error(tangent, want) <= tolerance


def check_low_derivatives(op, weight, x, R=3):
    """As above for `low` in the place of down, of an x that is constant."""
    N, K = weight.shape
    low, up = torch.randn(*x.shape[:-1], R), torch.randn(N, R)

    def layer(low, up):
        return op(x, low=low, up=up)

    def exact(low, up):
        return low @ up.mT

    wide = (low.double(), up.double())
    d_y = torch.randn(*x.shape[:-1], N)
    leaves = [low.clone().requires_grad_(), up.clone().requires_grad_()]
    gradients = torch.autograd.grad(layer(*leaves), leaves, d_y)
    for got, want in zip(gradients, torch.func.vjp(exact, *wide)[1](d_y.double()), strict=True):
        assert relative_error(got, want) <= max(N, K) * 2.0**-24
    tangents = (torch.randn_like(low), torch.randn_like(up))
    _, tangent = torch.func.jvp(layer, (low, up), tangents)
    _, want = torch.func.jvp(exact, wide, tuple(t.double() for t in tangents))
    assert relative_error(tangent, want) <= max(N, K) * 2.0**-24


def check_vmap(op, K, N, R=3):
    """A batch of rows is more rows, to the bit; a batch of anything else is a loop."""
    x, bias, down, up = operands(K, N, R, (4, 3, 5)).values()

    def layer(x):
        return op(x, bias=bias, down=down, up=up)

    want = torch.stack([layer(part) for part in x])
    assert torch.equal(torch.vmap(layer)(x), want)
    assert torch.equal(torch.vmap(layer, in_dims=1)(x.movedim(0, 1)), want)
    ups = torch.randn(2, N, R)
    batched = torch.vmap(lambda up: op(x[0], down=down, up=up))(ups)
    assert torch.equal(batched, torch.stack([op(x[0], down=down, up=up) for up in ups]))
    # Tangents of many directions at once, as jacfwd takes them.
    jacobian = torch.func.jacfwd(lambda b: op(x[0], bias=b))(bias)
    assert torch.equal(jacobian, torch.eye(N).expand(3, 5, N, N))


def check_constants_are_refused(call, constants):
    """call(**constants) must refuse a gradient or a tangent of each of these, by name."""
    for name, value in constants.items():
        with pytest.raises(DerivativeError, match=f"{name}: expected a constant"):
            call(**constants | {name: value.clone().requires_grad_()})
        others = {k: v for k, v in constants.items() if k != name}
        with pytest.raises(DerivativeError, match=f"{name}: expected a constant"):
            torch.func.jvp(
                lambda v, name=name, others=others: call(**others, **{name: v}), (value,), (value,)
            )


# A change of the operands of a product with 6 rows, N = 20, K and R = 2, and what it must say.
def bad_branches(K, x="a"):
    """Return (change, message) for branches that are not whole or do not fit."""
    up, low = torch.ones(20, 2), torch.ones(6, 2)
    return [
        ({"low": low}, r"low: expected none without up, got \[6, 2\]"),
        ({"down": torch.ones(2, K)}, rf"down: expected none without up, got \[2, {K}\]"),
        ({"up": up}, "down, low: expected one of them with up, got none"),
        (
            {"up": up, "low": low, "down": torch.ones(2, K)},
            "down, low: expected one of them with up, got both",
        ),
        ({"up": up[0], "low": low}, r"up: expected \[N, R\], got \[2\]"),
        ({"up": up[:9], "low": low}, r"up: expected shape \[20, 2\], got \[9, 2\]"),
        ({"up": up, "low": low[:, :1]}, r"low: expected shape \[6, 2\], got \[6, 1\]"),
        ({"up": up.double(), "low": low}, "up: expected torch.float32 or .*, got torch.float64"),
    ]
