"""Derivatives of the low-bit products through activation, gate and residual; tracing and batching.

test_gemm_*.py hold those of the sums themselves.
"""

import functools

import pytest
import torch

from epilogue_rules import OPS, UNIT, operands, weight_of
from fewstep import ops
from fewstep.ops._epilogue import ACTIVATIONS, activate, is_glu
from fewstep.ops._register import DerivativeError
from helpers import relative_error
from product_rules import branch_of

# float32 sums of at most n terms, relative to whole results; activations add a few roundings more.
TOLERANCE = 128 * UNIT
# Sines of derivatives, which reach some hundreds, and what follows from those: a relative error of
# TOLERANCE there is one of some thousand units here. A term that is missing is of order one.
NESTED = 2.0**-11


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def layer_of(op, impl, activation, outputs=11, K=64):
    """Return a layer of (x, bias, down, up, gate, residual), the same in float64, and inputs.

    The exact layer takes the rounding of x for the identity: its y has the value that the op's y
    has, and the derivatives of the dequantised linear layer.
    """
    N, R, rows = outputs * 2 if is_glu(activation) else outputs, 3, (2, 5)
    args, _ = operands(op, rows, N, K, torch.float32)
    weight, constants = weight_of(op, args), args[1:]
    shapes = [(*rows, K), (N,), (R, K), (N, R), (2, 1, outputs), (*rows, outputs)]
    values = tuple(torch.randn(shape) for shape in shapes)
    function = functools.partial(getattr(ops, op), impl=impl)

    def layer(x, bias, down, up, gate, residual):
        branch, end = {"bias": bias, "down": down, "up": up}, {"gate": gate, "residual": residual}
        return function(x, *constants, **branch, **end, activation=activation)

    x, bias, down, up = values[:4]
    seen = function(x, *constants, bias=bias, down=down, up=up).double()

    def exact(x, bias, down, up, gate, residual):
        y = x @ weight.mT + bias + (x @ down.mT) @ up.mT
        return residual + gate * activate(y + (seen - y.detach()), activation)

    return layer, exact, values


def test_opcheck(op):
    rows = (2, 6)
    args, bias = operands(op, rows, 20, dtype=torch.float32)
    prologue = [] if op == "gemm_w4a16" else [None, 0]
    dtype = [] if op == "gemm_w4a16" else [torch.float32]
    gate, residual = torch.randn(2, 1, 10), torch.randn(*rows, 10)
    low, up = branch_of(rows, 20, 3).values()
    epilogue = ("geglu", gate, residual)
    call = (*args, bias, *prologue, None, up, low, *epilogue, *dtype, "native")
    # The schema check compares tensors by arithmetic that torch lacks for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks if op == "gemm_fp8" else (*checks, "test_schema")
    int8 = getattr(torch.ops.fewstep, op + "_int8").default
    torch.library.opcheck(int8, call, test_utils=checks)
    for x in (args[0], gate, residual, bias):
        x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fewstep, op).default, call, test_utils=checks)


def test_compiles_without_graph_break(op):
    args, bias = operands(op, (2, 6), 20, dtype=torch.bfloat16)
    function = getattr(ops, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    kwargs = {"bias": bias, "activation": "geglu", "gate": torch.randn(10)}
    assert torch.equal(compiled(*args, **kwargs), function(*args, **kwargs))
    kwargs["out_dtype"] = torch.int8
    for got, want in zip(compiled(*args, **kwargs), function(*args, **kwargs), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_derivatives_are_those_of_the_dequantised_layer(op, activation, impl):
    layer, exact, values = layer_of(op, impl, activation)
    wide = tuple(x.double() for x in values)
    out, pull = torch.func.vjp(exact, *wide)
    d_out = torch.randn(out.shape)
    want = pull(d_out.double())
    leaves = [x.clone().requires_grad_() for x in values]
    gradients = torch.autograd.grad(layer(*leaves), leaves, d_out)
    assert all(relative_error(*pair) <= TOLERANCE for pair in zip(gradients, want, strict=True))
    # Each alone: what is kept for the backward depends on what is asked for, and not on the kernel,
    # which in the interpreter takes its time.
    each = range(len(values)) if impl != "triton" else ()
    for i in each:
        alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(values)]
        (got,) = torch.autograd.grad(layer(*alone), alone[i], d_out)
        assert relative_error(got, want[i]) <= TOLERANCE
    tangents = [torch.randn_like(x) for x in values]
    plain = layer(*values)
    for only in (*each, None):
        chosen = tuple(t if only in (i, None) else t * 0 for i, t in enumerate(tangents))
        primal, tangent = torch.func.jvp(layer, values, chosen)
        assert torch.equal(primal, plain)
        _, want = torch.func.jvp(exact, wide, tuple(t.double() for t in chosen))
        assert relative_error(tangent, want) <= TOLERANCE


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_second_derivatives(op, activation):
    layer, exact, values = layer_of(op, "native", activation)

    def gradient_norm(f, inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(f(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    wide = [x.double() for x in values]
    pairs = zip(gradient_norm(layer, values), gradient_norm(exact, wide), strict=True)
    assert all(relative_error(got, want) <= NESTED for got, want in pairs)


def test_gradients_of_a_tangent(op):
    """As a training loss over forward mode takes them."""
    layer, exact, values = layer_of(op, "native", "geglu")

    def gradients(f, inputs):
        tangents = [torch.ones_like(x) for x in inputs]

        def loss(*inputs):
            return torch.func.jvp(f, inputs, tuple(tangents))[1].sin().sum()

        return torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)

    wide = [x.double() for x in values]
    pairs = zip(gradients(layer, values), gradients(exact, wide), strict=True)
    assert all(relative_error(got, want) <= NESTED for got, want in pairs)


def test_gradients_through_a_compiled_layer(op):
    layer, _, values = layer_of(op, "native", "swiglu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradients(layer):
        leaves = [x.clone().requires_grad_() for x in values]
        return torch.autograd.grad(layer(*leaves).square().sum(), leaves)

    for got, want in zip(gradients(compiled), gradients(layer), strict=True):
        assert relative_error(got, want) <= TOLERANCE


def test_a_frozen_layer_does_not_keep_its_input(op):
    """Only an activation, or a gate that learns, needs x again."""
    for activation, kept in ((None, False), ("silu", True)):
        args, _ = operands(op, (3,), 20, dtype=torch.float32)
        x, gate = args[0].requires_grad_(), torch.randn(20)
        out = getattr(ops, op)(*args, gate=gate, activation=activation)
        assert any(saved is x for saved in out.grad_fn.saved_tensors) == kept
        gate.requires_grad_()
        out = getattr(ops, op)(x.detach(), *args[1:], gate=gate, activation=activation)
        (gradient,) = torch.autograd.grad(out.sum(), gate)
        y = getattr(ops, op)(x.detach(), *args[1:])
        assert relative_error(gradient, activate(y, activation).sum(0)) <= TOLERANCE


def test_a_residual_may_be_written_to_before_the_backward():
    """Its gradient needs no values, as in x + residual."""
    (_, _, *weight), _ = operands("gemm_w8a8", (4,), 20, 32, torch.float32)
    x, residual = torch.randn(4, 32, requires_grad=True), torch.randn(4, 20)
    out = ops.gemm_w8a8(x, None, *weight, residual=residual)
    residual.add_(1)
    out.sum().backward()
    assert x.grad.isfinite().all()


def test_int8_outputs_have_no_derivative(op):
    args, _ = operands(op, (3,), 20, dtype=torch.float32)
    with pytest.raises(DerivativeError, match=f"{op}_int8 has no backward"):
        getattr(ops, op)(args[0].requires_grad_(), *args[1:], out_dtype=torch.int8)


def test_vmap(op):
    """A batch of rows, gates or residuals: the bits of one call for each."""
    args, _ = operands(op, (4, 3, 5), 20, dtype=torch.float32)
    function = functools.partial(getattr(ops, op), activation="gelu")
    for shape in ((20,), (3, 1, 20), (3, 5, 20)):
        gate, residual = torch.randn(4, *shape), torch.randn(4, 3, 5, 20)
        want = torch.stack(
            [function(x, *args[1:], gate=g, residual=r)
             for x, g, r in zip(args[0], gate, residual, strict=True)]
        )  # fmt: skip

        def layer(x, gate, residual):
            return function(x, *args[1:], gate=gate, residual=residual)

        assert torch.equal(torch.vmap(layer)(args[0], gate, residual), want)
        turned = torch.vmap(layer, (1, -1, 0))(args[0].movedim(0, 1), gate.movedim(0, -1), residual)
        assert torch.equal(turned, want)
        fixed = torch.vmap(layer, (0, None, None))(args[0], gate[1], residual[1])
        each = [layer(x, gate[1], residual[1]) for x in args[0]]
        assert torch.equal(fixed, torch.stack(each))
        only = torch.vmap(layer, (None, 0, None))(args[0][1], gate, residual[1])
        each = [layer(args[0][1], g, residual[1]) for g in gate]
        assert torch.equal(only, torch.stack(each))
