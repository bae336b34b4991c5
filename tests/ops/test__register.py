"""No registered op may lose a derivative: each way of asking for one is right or raises."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from fewstep import ops
from fewstep.ops._autograd import Derivative, composite
from fewstep.ops._register import DerivativeError, register
from fewstep.ops._select import Implementation


def floating_inputs(op):
    """Yield each floating input of the op's first gate case, and the op as a function of it."""
    args, kwargs, *_ = ops.module(op).gate_cases(torch.device("cpu"))[0]
    function = getattr(ops, op)
    for key, value in enumerate(args):

        def call(x, key=key):
            return function(*args[:key], x, *args[key + 1 :], **kwargs)

        if isinstance(value, list) and value[-1].is_floating_point():
            yield value[-1], lambda x, call=call, rest=value[:-1]: call([*rest, x])
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value, call
    for key, value in kwargs.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value, lambda x, key=key: function(*args, **{**kwargs, key: x})


def has_backward(op):
    """Say whether the op declared a derivative."""
    return ops.module(op)._op.derivative is not None


def choose(op):
    """Return which of these inputs has a derivative: the first that does, 0 where none has.

    An op with a derivative may hold some inputs constant, as the scales of a quantised weight; its
    own tests say which, and that asking for theirs raises.
    """
    for index, (value, function) in enumerate(floating_inputs(op) if has_backward(op) else ()):
        try:
            function(value.clone().requires_grad_())
        except DerivativeError:
            continue
        return index
    return 0


CHOSEN = {op: choose(op) for op in ops.OPS}  # here, because no transform is active yet


def bind(op):
    """Return one floating input of the op's first gate case, and the op as a function of it."""
    return list(floating_inputs(op))[CHOSEN[op]]


def check_gradient(op, gradient_of):
    """Compare a gradient of the op with a difference quotient along a random direction.

    `gradient_of(loss, x)` takes the gradient. A loss of 1e3 terms of order 1 in float32 over a step
    of 1e-2 leaves 1e-3 of rounding and truncation; a lost gradient is off by 1.
    """
    value, function = bind(op)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(value.shape, generator=generator)
    weights = [torch.randn(o.shape, generator=generator) for o in outputs_of(function(value))]

    def loss(x):
        pairs = zip(outputs_of(function(x)), weights, strict=True)
        return sum((o.double() * w).sum() for o, w in pairs)

    slope = (loss(value + 5e-3 * direction) - loss(value - 5e-3 * direction)) / 1e-2
    gradient = gradient_of(loss, value)
    torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=2e-2, atol=2e-1)


def outputs_of(result):
    """Return the floating outputs of an op as a tuple."""
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(x for x in outputs if isinstance(x, torch.Tensor) and x.is_floating_point())


def call_with(op, transform):
    """Call `op` on its first gate case with `transform` applied to one floating input."""
    value, function = bind(op)
    return function(transform(value))


def has_jvp(op):
    """Say whether the op declared a rule for tangents."""
    return has_backward(op) and ops.module(op)._op.derivative.jvp is not None


def check_tangents(op, tangents_of):
    """Compare tangents with a difference quotient, as `check_gradient` does."""
    value, function = bind(op)
    direction = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
    ends = [outputs_of(function(value + step * direction)) for step in (5e-3, -5e-3)]
    tangents = tangents_of(lambda x: outputs_of(function(x)), value, direction)
    for tangent, above, below in zip(tangents, *ends, strict=True):
        torch.testing.assert_close(tangent, (above - below) / 1e-2, rtol=2e-2, atol=5e-3)


@pytest.mark.parametrize("op", ops.OPS)
def test_func_jvp(op):
    if has_jvp(op):
        return check_tangents(op, lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1])

    def f(scale):
        return call_with(op, lambda x: x * scale)

    with pytest.raises(DerivativeError):
        torch.func.jvp(f, (torch.tensor(1.0),), (torch.tensor(1.0),))


@pytest.mark.parametrize("op", ops.OPS)
def test_dual_numbers(op):
    def tangents_of(f, x, t):
        with forward_ad.dual_level():
            return [forward_ad.unpack_dual(o).tangent for o in f(forward_ad.make_dual(x, t))]

    if has_jvp(op):
        return check_tangents(op, tangents_of)
    with forward_ad.dual_level(), pytest.raises(DerivativeError):
        call_with(op, lambda x: forward_ad.make_dual(x, torch.ones_like(x)))


@pytest.mark.parametrize("op", ops.OPS)
def test_requires_grad(op):
    def gradient_of(loss, x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(loss(x), x)[0]

    if has_backward(op):
        return check_gradient(op, gradient_of)
    with pytest.raises(DerivativeError):
        call_with(op, lambda x: x.clone().requires_grad_())
    with torch.no_grad():
        call_with(op, lambda x: x.clone().requires_grad_())


@pytest.mark.parametrize("op", ops.OPS)
def test_func_vjp(op):
    if has_backward(op):
        return check_gradient(op, lambda loss, x: torch.func.grad(loss)(x))
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
    op = register(
        "test_only_twice",
        "(Tensor x, str impl) -> Tensor",
        implemented_by(lambda x: x * 2),
        lambda x, impl: torch.empty_like(x),
    )
    x = torch.ones(3)
    assert torch.equal(op(x, "reference"), x * 2)
    with pytest.raises(DerivativeError, match="test_only_twice has no forward-mode rule"):
        torch.func.jvp(lambda a: op(a, "reference"), (x,), (x,))


def implemented_by(function):
    return [Implementation("reference", function, lambda *a, **k: None)]


def cube(x, w, scale):
    """The formula of an op with two outputs and a float: what a new op has to declare."""
    return scale * w * x**3, (x * x).sum(-1)


def cube_backward(d_y, d_s, x, w, scale):
    return 3 * scale * w * x**2 * d_y + 2 * x * d_s[..., None], scale * x**3 * d_y


def _setup(ctx, inputs, output):
    x, w, ctx.scale, _ = inputs
    ctx.save_for_backward(x, w)


def _backward(ctx, d_y, d_s):
    return _cube_backward_op(d_y, d_s, *ctx.saved_tensors, ctx.scale, "reference")


_cube_backward_op = register(
    "test_only_cube_backward",
    "(Tensor d_y, Tensor d_s, Tensor x, Tensor w, float scale, str impl) -> (Tensor, Tensor)",
    implemented_by(cube_backward),
    lambda d_y, d_s, x, w, scale, impl: (torch.empty_like(x), torch.empty_like(w)),
    composite(lambda *args: cube_backward(*args[:-1])),
)
_cube_op = register(
    "test_only_cube",
    "(Tensor x, Tensor w, float scale, str impl) -> (Tensor, Tensor)",
    implemented_by(cube),
    lambda x, w, scale, impl: (torch.empty_like(x), x.new_empty(x.shape[:-1])),
    Derivative(_setup, _backward),
)
BARE = torch.ops.fewstep.test_only_cube.default


def declared(x, w):
    return _cube_op(x, w, 2.0, "reference")


def bare(x, w):
    return BARE(x, w, 2.0, "reference")


def plain(x, w):
    return cube(x, w, 2.0)


def loss_of(f):
    return lambda x, w: sum(o.sin().sum() for o in f(x, w))


def first_order(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(loss_of(f)(x, w), (x, w))


def second_order(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    gradients = torch.autograd.grad(loss_of(f)(x, w), (x, w), create_graph=True)
    return torch.autograd.grad(sum(g.cos().sum() for g in gradients), (x, w))


def through_vmap(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(loss_of(torch.vmap(f))(x, w), (x, w))


def through_functionalize(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(loss_of(torch.func.functionalize(f))(x, w), (x, w))


def pulled_back(f, x, w):
    outputs, pull = torch.func.vjp(f, x, w)
    return pull(tuple(o.cos() for o in outputs))


REVERSE = {
    "autograd": first_order,
    "create_graph": second_order,
    "grad": lambda f, x, w: torch.func.grad(loss_of(f), (0, 1))(x, w),
    "vjp": pulled_back,
    "jacrev": lambda f, x, w: torch.func.jacrev(f, (0, 1))(x, w),
    "jacrev twice": lambda f, x, w: torch.func.jacrev(torch.func.jacrev(f, 0), 1)(x, w),
    "vmap": lambda f, x, w: torch.vmap(f, (0, None))(x, w[0]),
    "vmap of grad": lambda f, x, w: torch.vmap(torch.func.grad(loss_of(f)))(x, w),
    "grad of vmap": lambda f, x, w: torch.func.grad(loss_of(torch.vmap(f)))(x, w),
    "autograd of vmap": through_vmap,
    "autograd of functionalize": through_functionalize,
}


@pytest.fixture
def inputs():
    return torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", REVERSE)
def test_declared_backward(name, inputs):
    torch.testing.assert_close(REVERSE[name](declared, *inputs), REVERSE[name](plain, *inputs))


@pytest.mark.parametrize("name", REVERSE)
def test_bare_op_with_declared_backward(name, inputs):
    """Called past the public function, as code under torch.compile is: right or raises."""
    try:
        got = REVERSE[name](bare, *inputs)
    except DerivativeError:
        assert name in {"grad", "vjp", "jacrev", "jacrev twice", "vmap of grad", "grad of vmap"}
        return
    torch.testing.assert_close(got, REVERSE[name](plain, *inputs))


@pytest.mark.parametrize("f", [declared, bare])
def test_declared_backward_compiles(f, inputs):
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), plain(*inputs))
    torch.testing.assert_close(first_order(compiled, *inputs), first_order(plain, *inputs))


@pytest.mark.parametrize("f", [declared, bare])
def test_a_tangent_still_raises(f, inputs):
    with pytest.raises(DerivativeError, match="test_only_cube has no forward-mode rule"):
        torch.func.jvp(f, inputs, inputs)
    with forward_ad.dual_level(), pytest.raises(DerivativeError, match="no forward-mode rule"):
        f(forward_ad.make_dual(*inputs), inputs[1])


def composed(a, w):
    return _cube_backward_op(a, a.sum(-1), a, w, 2.0, "reference")


def plain_composed(a, w):
    return cube_backward(a, a.sum(-1), a, w, 2.0)


def by_duals(f, x, w):
    with forward_ad.dual_level():
        outputs = f(forward_ad.make_dual(x, w), forward_ad.make_dual(w, x))
        return [forward_ad.unpack_dual(o).tangent for o in outputs]


def grad_of_jvp(f, x, w):
    def loss(x, w):
        return sum(o.sin().sum() for pair in torch.func.jvp(f, (x, w), (w, x)) for o in pair)

    return torch.func.grad(loss, (0, 1))(x, w)


def autograd_of_duals(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    return torch.autograd.grad(sum(t.sin().sum() for t in by_duals(f, x, w)), (x, w))


def autograd_of_jvp(f, x, w):
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    tangents = torch.func.jvp(f, (x, w), (w, x))[1]
    return torch.autograd.grad(sum(t.sin().sum() for t in tangents), (x, w))


FORWARD = {
    "grad of jvp": grad_of_jvp,
    "autograd of duals": autograd_of_duals,
    "autograd of jvp": autograd_of_jvp,
    "duals": by_duals,
    "jvp": lambda f, x, w: torch.func.jvp(f, (x, w), (w, x)),
    "jacfwd": lambda f, x, w: torch.func.jacfwd(f, (0, 1))(x, w),
    "hessian": lambda f, x, w: torch.func.hessian(f, (0, 1))(x, w),
    "jvp twice": lambda f, x, w: torch.func.jacfwd(torch.func.jacfwd(f))(x, w),
}


@pytest.mark.parametrize("name", [*REVERSE, *FORWARD])
def test_composite(name, inputs):
    """Rules made from a formula answer to everything, forward mode too."""
    rule = {**REVERSE, **FORWARD}[name]
    torch.testing.assert_close(rule(composed, *inputs), rule(plain_composed, *inputs))


def test_composite_compiles(inputs):
    compiled = torch.compile(composed, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(first_order(compiled, *inputs), first_order(plain_composed, *inputs))


def test_opcheck_of_an_op_with_a_backward(inputs):
    x, w = inputs
    torch.library.opcheck(BARE, (x.requires_grad_(), w.requires_grad_(), 2.0, "reference"))


def test_vmap_over_nothing_says_so(inputs):
    x, w = inputs
    with pytest.raises(ValueError, match="at least one element"):
        torch.vmap(declared)(x[:0], w[:0])


class Seen(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_short_way_is_taken_only_where_nobody_looks():
    """A plain eager call skips torch's dispatcher; modes, the profiler, tracing and -x do not."""
    x = torch.randn(4, 8)
    want = ops.quantize_int8(x)
    with Seen() as seen:
        ops.quantize_int8(x)
    assert "fewstep::quantize_int8" in seen.names
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.quantize_int8(x)
    assert any(event.key == "fewstep::quantize_int8" for event in profile.key_averages())
    traced = torch.jit.trace(lambda x: ops.quantize_int8(x), x, check_trace=False)
    assert "fewstep::quantize_int8" in str(traced.graph)
    negated = torch.complex(torch.zeros(4, 8), -x).conj().imag
    assert negated.is_neg()
    for got, exact in zip(ops.quantize_int8(negated), want, strict=True):
        assert torch.equal(got, exact)
    meta = ops.quantize_int8(x.to("meta"), impl="reference")
    assert meta[0].is_meta
    assert meta[0].dtype == torch.int8
    with torch.inference_mode():
        assert ops.quantize_int8(x)[0].is_inference()


WRAPPED = {
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
    "vmap": lambda f, x: torch.vmap(f)(x[None])[0],
    "the old vmap": lambda f, x: torch._vmap_internals._vmap(f)(x[None])[0],
    "jvp that has ended": lambda f, x: f(escaped(x)),
    "efficient zeros": lambda f, x: f(x) + f(torch._efficientzerotensor(x.shape)),
}


def escaped(x):
    kept = []
    torch.func.jvp(lambda y: kept.append(y) or y, (x,), (x,))
    return kept[0]


@pytest.mark.parametrize("name", WRAPPED)
def test_tensors_without_memory_do_not_take_the_short_way(name):
    x = torch.randn(4, 8)
    got = WRAPPED[name](lambda x: ops.quantize_int8(x)[0].float(), x)
    assert torch.equal(got, ops.quantize_int8(x)[0].float())
