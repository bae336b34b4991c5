"""Every way of asking for a derivative of attention: it is right, or it raises. Never zeros.

The ways are those in which public attention kernels were seen to return wrong derivatives without
an error (tangents dropped by torch.compile, by functionalization, by registered ops; gradients of a
tangent dropped by autograd.Functions; tangents of some inputs only). Each is listed with what it
does here, so that one that starts to raise is noticed as well.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import fewstep


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


X = tuple(normal(i, 2, 2, 3, 8) for i in range(3))
T = tuple(normal(3 + i, 2, 2, 3, 8) for i in range(3))


def op(q, k, v):
    return fewstep.ops.attention_jvp(q, k, v)[0]


def in_forward_mode(q, k, v):
    with fewstep.forward_mode():
        return F.scaled_dot_product_attention(q, k, v)


def oracle(q, k, v):
    return (q @ k.mT * 8**-0.5).softmax(-1) @ v


SUBJECTS = {
    "op": op,
    "sdpa": fewstep.scaled_dot_product_attention,
    "forward_mode": in_forward_mode,
}


def loss_of(f):
    return lambda *x: f(*x).sin().sum()


def jvp(f, x=X, t=T):
    return torch.func.jvp(f, x, t)


def duals(f, x=X, t=T):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, x, t))))


def partial(*positions):
    def way(f):
        def of_some(*some):
            x = list(X)
            for i, value in zip(positions, some, strict=True):
                x[i] = value
            return f(*x)

        return jvp(of_some, tuple(X[i] for i in positions), tuple(T[i] for i in positions))

    return way


def backward_through_the_tangent(f):
    leaves = tuple(x.clone().requires_grad_() for x in X)
    _, t_o = jvp(f, leaves)
    return torch.autograd.grad(t_o.sin().sum(), leaves)


def backward_into_the_tangents(f):
    leaves = tuple(t.clone().requires_grad_() for t in T)
    o, t_o = jvp(f, X, leaves)
    return torch.autograd.grad((o * t_o).sum(), leaves)


def batched_gradients(f):
    leaves = tuple(x.clone().requires_grad_() for x in X)
    return torch.autograd.grad(f(*leaves), leaves, torch.stack(T), is_grads_batched=True)


def checkpointed(reentrant):
    def way(f):
        leaves = tuple(x.clone().requires_grad_() for x in X)
        with fewstep.forward_mode():
            o, t_o = jvp(lambda *x: checkpoint(f, *x, use_reentrant=reentrant), leaves)
        return torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)

    return way


class Holder(torch.nn.Module):
    """What a checkpointed block reads beside its arguments: an attribute, or a parameter."""

    def __init__(self, f, v=None):
        super().__init__()
        self.f = f
        self.v = v if v is None else torch.nn.Parameter(v)

    def forward(self, q, k):
        return self.f(q, k, self.v)


def reading_beside_the_arguments(block_of):
    """A block whose values have a tangent too, but are not among the arguments of checkpoint."""

    def way(f):
        leaves = tuple(x.clone().requires_grad_() for x in X)

        def model(q, k, v):
            block, args = block_of(f, q, k, v.sin())
            return block(*args) if f is oracle else checkpoint(block, *args, use_reentrant=False)

        with fewstep.forward_mode():
            o, t_o = jvp(model, leaves)
        return torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)

    return way


def by_closure(f, q, k, v):
    return (lambda q, k: f(q, k, v)), (q, k)


def by_closure_and_argument(f, q, k, v):
    return (lambda a: f(a, k, v) * a), (q,)


def by_attribute(f, q, k, v):
    module = Holder(f)
    module.v = v
    return module, (q, k)


def by_object(f, q, k, v):
    box = SimpleNamespace(v=v)
    return (lambda q, k, box: f(q, k, box.v)), (q, k, box)


def by_functional_call(f):
    inner = Holder(f, X[2])
    outer = Holder(lambda q, k, _: checkpoint(inner, q, k, use_reentrant=False))
    outer.inner = inner

    def model(q, k, v):
        return torch.func.functional_call(outer, {"inner.v": v.sin()}, (q, k))

    leaves = tuple(x.clone().requires_grad_() for x in X)
    with fewstep.forward_mode():
        o, t_o = jvp(model, leaves)
    return torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)


def by_attribute_set_again(f):
    module = Holder(f)

    def model(q, k, v):
        module.v = v.sin()
        o = checkpoint(module, q, k, use_reentrant=False)
        module.v = v.cos()
        return o

    leaves = tuple(x.clone().requires_grad_() for x in X)
    o, t_o = fewstep.jvp(model, leaves, T)
    return torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)


def checkpointed_gradient(f):
    leaves = tuple(x.clone().requires_grad_() for x in X)
    return torch.autograd.grad(checkpoint(loss_of(f), *leaves, use_reentrant=False), leaves)


def compiled(f):
    return torch.compile(f, backend="aot_eager", fullgraph=True) if f is not oracle else f


def gradient_of_compiled(f):
    leaves = tuple(x.clone().requires_grad_() for x in X)
    return torch.autograd.grad(loss_of(compiled(f))(*leaves), leaves)


def traced(f):
    if f is oracle:
        return jvp(f)
    return make_fx(lambda *x: torch.func.jvp(f, x, T))(*X)(*(2 * x for x in X))


def in_inference_mode(f):
    with torch.inference_mode():
        return jvp(f)


def entered_inside(context, by):
    """The derivative of a function decorated with no_grad or inference_mode: that of the function.

    torch.inference_mode drops tangents, also those of fewstep's functions; forward_mode keeps them.
    """

    def way(f):
        if f is oracle:
            return jvp(f)
        with fewstep.forward_mode():
            return by(context()(f))

    return way


def inference_tensors(by):
    """Inputs that were made in inference mode."""

    def way(f):
        with torch.inference_mode():
            x, t = (tuple(a.clone() for a in b) for b in (X, T))
        with fewstep.forward_mode():
            return by(f, x, t)

    return way


def by_fewstep_in_inference_mode(f):
    with torch.inference_mode():
        return fewstep.jvp(f, tuple(x.clone() for x in X), tuple(t.clone() for t in T))


def hvp(f):
    return jvp(torch.func.grad(loss_of(f), (0, 1, 2)))


RIGHT = {
    "jvp": jvp,
    "duals": duals,
    **{f"tangents of {p}": partial(*p) for p in ((0,), (1,), (2,), (0, 1), (0, 2), (1, 2))},
    "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1, 2))(*X),
    "jacrev": lambda f: torch.func.jacrev(f, (0, 1, 2))(*X),
    "vmap": lambda f: torch.vmap(lambda *x: torch.func.jvp(f, x[:3], x[3:]))(*X, *T),
    "hvp": hvp,
    "hvp, reverse over forward": lambda f: torch.func.grad(
        lambda *x: torch.func.jvp(loss_of(f), x, T)[1], (0, 1, 2)
    )(*X),
    "hessian": lambda f: torch.func.hessian(loss_of(f), (0, 1, 2))(*X),
    "third": lambda f: torch.func.jacfwd(torch.func.hessian(loss_of(f)))(*X),
    "backward through the tangent": backward_through_the_tangent,
    "backward into the tangents": backward_into_the_tangents,
    "batched gradients": batched_gradients,
    "checkpointed": checkpointed(False),
    "checkpointed gradient": checkpointed_gradient,
    **{
        f"checkpointed, read {block.__name__}": reading_beside_the_arguments(block)
        for block in (by_closure, by_closure_and_argument, by_attribute, by_object)
    },
    "functionalize": lambda f: torch.func.functionalize(f)(*X),
    "inference mode": in_inference_mode,
    "fewstep.jvp in inference mode": by_fewstep_in_inference_mode,
    **{
        f"{by.__name__} of inputs from inference mode": inference_tensors(by) for by in (jvp, duals)
    },
    **{
        f"{context.__name__} inside {by.__name__}": entered_inside(context, by)
        for context in (torch.no_grad, torch.inference_mode)
        for by in (jvp, duals)
    },
}
DerivativeError = fewstep.ops._autograd.DerivativeError
NO_FUNCTIONALIZE = RuntimeError, "Functionalize rule for custom_function_call"
# Each with its error: another one would be a bug of ours that looks like a refusal.
RAISES = {
    "functionalize of jvp": (
        lambda f: torch.func.functionalize(lambda *x: jvp(f, x)[1])(*X),
        NO_FUNCTIONALIZE,
    ),
    "reentrant checkpoint": (checkpointed(True), (RuntimeError, "setup_context staticmethod")),
    # Inside of functionalize no derivative is seen: the bare op refuses, as does torch's attention.
    "jvp of functionalize": (
        lambda f: jvp(torch.func.functionalize(f)),
        (RuntimeError, "no forward-mode rule|forward AD with .* not been implemented"),
    ),
    "functionalize of grad": (
        lambda f: torch.func.functionalize(torch.func.grad(loss_of(f)))(*X),
        NO_FUNCTIONALIZE,
    ),
    "checkpointed, parameters of functional_call": (
        by_functional_call,
        (DerivativeError, r"checkpointed block .* \[2, 2, 3, 8\]"),
    ),
    "checkpointed, attribute set again": (
        by_attribute_set_again,
        (DerivativeError, "as an argument of torch.utils.checkpoint"),
    ),
}
# Slow: one call of the compiler each.
COMPILED = {
    "compiled gradient": gradient_of_compiled,
    "jvp of compiled": lambda f: jvp(compiled(f)),
    "compiled jvp": lambda f: compiled(lambda *x: torch.func.jvp(f, x, T))(*X),
    "compiled grad": lambda f: compiled(torch.func.grad(loss_of(f)))(*X),
    "compiled vmap": lambda f: compiled(torch.vmap(f))(*X),
}
# What raises does so while compiling; with anything else the compiled function is right.
COMPILED_RAISES = {
    "jvp of compiled": ("Unsupported", "functorch"),
    "compiled jvp": ("TorchRuntimeError", r"fewstep\.attention_jvp"),
    "compiled grad": ("TorchRuntimeError", r"fewstep\.attention_jvp"),
}


@pytest.mark.parametrize("way", RIGHT)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_right(subject, way):
    torch.testing.assert_close(RIGHT[way](SUBJECTS[subject]), RIGHT[way](oracle))


@pytest.mark.parametrize("way", RAISES)
@pytest.mark.parametrize("subject", SUBJECTS)
def test_raises(subject, way):
    run, (error, message) = RAISES[way]
    with pytest.raises(error, match=message):
        run(SUBJECTS[subject])


@pytest.mark.parametrize("way", COMPILED)
@pytest.mark.parametrize("subject", ["op", "sdpa"])
def test_compiled(subject, way):
    if way in COMPILED_RAISES:
        error, message = COMPILED_RAISES[way]
        with pytest.raises(getattr(torch._dynamo.exc, error), match=message):
            COMPILED[way](SUBJECTS[subject])
        torch._dynamo.reset()  # a failed attempt marks the frame as not compilable
        return
    torch.testing.assert_close(COMPILED[way](SUBJECTS[subject]), COMPILED[way](oracle))


NUMBERS = {
    "attention_jvp, scale": lambda s: fewstep.ops.attention_jvp(*X, scale=s)[0],
    "sdpa, scale": lambda s: fewstep.scaled_dot_product_attention(*X, scale=s),
    "sdpa, dropout_p": lambda s: fewstep.scaled_dot_product_attention(*X, dropout_p=s),
    "norm_jvp, eps": lambda s: fewstep.ops.norm_jvp(X[0], eps=s)[0],
    "linear_attention_jvp, eps": lambda s: fewstep.ops.linear_attention_jvp(*X, eps=s)[0],
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_has_no_derivative(name):
    """A tensor in its place would have one: zero, without a word."""
    s = torch.tensor(0.3, dtype=torch.float64)
    message = f"{name.split()[1]}: expected a number, got a tensor"
    for way in (
        lambda: NUMBERS[name](s.clone().requires_grad_()),
        lambda: torch.func.grad(lambda s: NUMBERS[name](s).sum())(s),
        lambda: torch.func.jvp(NUMBERS[name], (s,), (s,)),
    ):
        with pytest.raises(TypeError, match=message):
            way()
    assert NUMBERS[name](0.3).isfinite().all()


@pytest.mark.parametrize("subject", SUBJECTS)
def test_traced_graph_is_right_for_other_inputs(subject):
    """make_fx records the tangent's computation, not its value."""
    got = traced(SUBJECTS[subject])
    want = torch.func.jvp(oracle, tuple(2 * x for x in X), T)
    torch.testing.assert_close(tuple(got), want)


@pytest.mark.parametrize("subject", ["sdpa", "forward_mode"])
def test_under_autocast(subject):
    """bfloat16 inside: within its rounding of the right tangent, which is of order 1."""
    wanted = jvp(oracle)
    x, t = (tuple(a.float() for a in b) for b in (X, T))
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.func.jvp(lambda *x: SUBJECTS[subject](*x), x, t)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2**-5)


def test_explicit_tangents_compile_with_the_gradient_of_everything():
    def f(*x):
        o, t_o = fewstep.ops.attention_jvp(*x)
        return o.sin().sum() + t_o.cos().sum()

    def want(*x):
        o, t_o = torch.func.jvp(oracle, x[:3], x[3:])
        return o.sin().sum() + t_o.cos().sum()

    leaves = tuple(a.clone().requires_grad_() for a in (*X, *T))
    torch.testing.assert_close(
        torch.autograd.grad(compiled(f)(*leaves), leaves),
        torch.autograd.grad(want(*leaves), leaves),
    )


def test_the_hazards_are_real():
    """Attention raises, inference mode loses tangents; a detached query is a lost tangent."""
    with pytest.raises(NotImplementedError):
        jvp(F.scaled_dot_product_attention)
    with sdpa_kernel(SDPBackend.MATH):
        right = jvp(F.scaled_dot_product_attention)[1]
    torch.testing.assert_close(right, jvp(oracle)[1])
    assert not jvp(torch.inference_mode()(torch.sin), X[:1], T[:1])[1].any()
    lost = jvp(lambda q, k, v: oracle(q.detach(), k, v))[1]
    with pytest.raises(AssertionError):
        torch.testing.assert_close(lost, right)
