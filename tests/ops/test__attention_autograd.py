"""Derivatives of attention_jvp of every kind, against torch's own derivatives of the formula.

Everything is float64: tolerances are those of gradcheck and of assert_close for float64. The
formula here is written without logsumexp, whose own forward derivative torch 2.13 can't
differentiate again in eager mode (it writes in place).
"""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.autograd import gradcheck, gradgradcheck

from fewstep.ops import UnsupportedError, attention_jvp
from fewstep.ops._register import DerivativeError
from fewstep.reference.attention_jvp import allowed_pairs, share_heads

H, NQ, NK, D = 2, 3, 4, 8
OFFSETS = {"cu_seqlens_q": [0, 2, 3], "cu_seqlens_k": [0, 1, 4]}


def normal(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def case(name):
    """Return (primals, tangents, keywords)."""
    batch, groups, kwargs = 2, H, {}
    if name == "causal":
        kwargs = {"is_causal": True}
    elif name == "additive":
        kwargs = {"attn_mask": normal(H, NQ, NK, seed=9)}
    elif name == "boolean":
        mask = normal(2, 1, NQ, NK, seed=9) > -0.3
        mask[1, 0, 1] = False  # a query that meets no key
        kwargs = {"attn_mask": mask}
    elif name == "shared heads":
        groups = 1
    elif name == "sequences":
        batch = 1
        kwargs = {key: torch.tensor(x, dtype=torch.int32) for key, x in OFFSETS.items()}
    shapes = [(batch, H, NQ, D), (batch, groups, NK, D), (batch, groups, NK, D)]
    primals = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    tangents = [normal(*shape, seed=3 + i) for i, shape in enumerate(shapes)]
    return primals, tangents, kwargs


CASES = ["plain", "causal", "additive", "boolean", "shared heads", "sequences"]


def formula(q, k, v, *, attn_mask=None, **kwargs):
    """(o, lse) of attention."""
    k, v = share_heads(k, q.shape[-3]), share_heads(v, q.shape[-3])
    s = q @ k.mT * q.shape[-1] ** -0.5
    allowed = allowed_pairs(q, k, **kwargs)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        s = s + attn_mask
    s = s if allowed is None else s.masked_fill(~allowed, -torch.inf)
    top = s.detach().amax(-1, keepdim=True)
    e = (s - top.masked_fill(top == -torch.inf, 0)).exp()
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    o = e / total.masked_fill(empty, 1) @ v
    # lse of a query without keys is -inf; it is left out of the losses below.
    return o, (total.masked_fill(empty, 1).log() + top.masked_fill(empty, 0))[..., 0]


def op(*inputs, **kwargs):
    o, _, lse, _ = attention_jvp(*inputs, **kwargs, return_stats=True)
    return o, lse.masked_fill(lse == -torch.inf, 0)


def dual(*inputs, **kwargs):
    """(o, t_o, lse, mu) from the explicit op."""
    o, t_o, lse, mu = attention_jvp(*inputs, **kwargs, return_stats=True)
    return o, t_o, lse.masked_fill(lse == -torch.inf, 0), mu


def dual_formula(*inputs, **kwargs):
    primals, tangents = tuple(inputs[:3]), tuple(inputs[3:])
    (o, lse), (t_o, mu) = torch.func.jvp(lambda *x: formula(*x, **kwargs), primals, tangents)
    return o, t_o, lse, mu


def loss_of(f, **kwargs):
    return lambda *x: sum(o.sin().sum() for o in f(*x, **kwargs))


def eager(f, inputs, order, **kwargs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    loss = loss_of(f, **kwargs)(*leaves)
    for _ in range(order - 1):
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        loss = sum(g.sin().sum() for g in gradients)
    return torch.autograd.grad(loss, leaves)


def duals(f, x, t, **kwargs):
    with forward_ad.dual_level():
        outputs = f(*(forward_ad.make_dual(a, b) for a, b in zip(x, t, strict=True)), **kwargs)
        return [forward_ad.unpack_dual(o).tangent for o in outputs]


def autograd_of_duals(f, x, t, **kwargs):
    leaves = [a.clone().requires_grad_() for a in x]
    return torch.autograd.grad(sum(a.sin().sum() for a in duals(f, leaves, t, **kwargs)), leaves)


def duals_of_autograd(f, x, t, **kwargs):
    with forward_ad.dual_level():
        leaves = [
            forward_ad.make_dual(a.clone().requires_grad_(), b) for a, b in zip(x, t, strict=True)
        ]
        gradients = torch.autograd.grad(loss_of(f, **kwargs)(*leaves), leaves)
        return [forward_ad.unpack_dual(g).tangent for g in gradients]


def of_jvp(f, x, t, **kwargs):
    def loss(*x):
        outputs = torch.func.jvp(lambda *a: f(*a, **kwargs), x, tuple(t))
        return sum(o.sin().sum() for pair in outputs for o in pair)

    return torch.func.grad(loss, (0, 1, 2))(*x)


def stacked(x):
    return [torch.stack([a, 2 * a]) for a in x]


# Of (o, lse) as a function of q, k, v.
RULES = {
    "autograd": lambda f, x, t, **kw: eager(f, x, 1, **kw),
    "autograd twice": lambda f, x, t, **kw: eager(f, x, 2, **kw),
    "jvp": lambda f, x, t, **kw: torch.func.jvp(lambda *a: f(*a, **kw), tuple(x), tuple(t)),
    "jvp of q": lambda f, x, t, **kw: torch.func.jvp(
        lambda q: f(q, *x[1:], **kw), (x[0],), (t[0],)
    ),
    "duals": duals,
    "grad": lambda f, x, t, **kw: torch.func.grad(loss_of(f, **kw), (0, 1, 2))(*x),
    "jacrev": lambda f, x, t, **kw: torch.func.jacrev(lambda *a: f(*a, **kw)[0][0, 0], 0)(*x),
    "jacfwd": lambda f, x, t, **kw: torch.func.jacfwd(lambda *a: f(*a, **kw), (0, 2))(*x),
    "hvp": lambda f, x, t, **kw: torch.func.jvp(
        torch.func.grad(loss_of(f, **kw), (0, 1, 2)), tuple(x), tuple(t)
    ),
    "duals of autograd": duals_of_autograd,
    "autograd of duals": autograd_of_duals,
    "grad of jvp": of_jvp,
    "hessian": lambda f, x, t, **kw: torch.func.hessian(loss_of(f, **kw), 1)(*x),
}
# Rarer, and slow; the plain case is enough.
RARE = {
    "autograd thrice": lambda f, x, t: eager(f, x, 3),
    "jacrev twice": lambda f, x, t: torch.func.jacrev(torch.func.jacrev(loss_of(f), 1), 0)(*x),
    "jacfwd twice": lambda f, x, t: torch.func.jacfwd(torch.func.jacfwd(loss_of(f), 0), 2)(*x),
    "vmap": lambda f, x, t: torch.vmap(f)(*stacked(x)),
    "vmap of q": lambda f, x, t: torch.vmap(f, (0, None, None))(stacked(x)[0], *x[1:]),
    "vmap of v, other axis": lambda f, x, t: torch.vmap(f, (None, None, 3))(
        *x[:2], torch.stack([x[2], t[2]], 3)
    ),
    "vmap of grad": lambda f, x, t: torch.vmap(torch.func.grad(loss_of(f)))(*stacked(x)),
    "vmap of jvp": lambda f, x, t: torch.vmap(
        lambda *a: torch.func.jvp(f, tuple(x), a), (0, None, 0)
    )(stacked(t)[0], t[1], stacked(t)[2]),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_attention(name, rule):
    primals, tangents, kwargs = case(name)
    got = RULES[rule](op, primals, tangents, **kwargs)
    torch.testing.assert_close(got, RULES[rule](formula, primals, tangents, **kwargs))


@pytest.mark.parametrize("rule", RARE)
def test_rarer_derivatives_of_attention(rule):
    primals, tangents, _ = case("plain")
    torch.testing.assert_close(
        RARE[rule](op, primals, tangents), RARE[rule](formula, primals, tangents)
    )


# Of (o, t_o, lse, mu) as a function of primals and tangents.
DUAL_RULES = {
    "autograd": lambda f, x, **kw: eager(f, x, 1, **kw),
    "autograd twice": lambda f, x, **kw: eager(f, x, 2, **kw),
    "grad": lambda f, x, **kw: torch.func.grad(loss_of(f, **kw), tuple(range(6)))(*x),
    "jvp": lambda f, x, **kw: torch.func.jvp(
        lambda *a: f(*a, **kw), tuple(x), (*x[3:], *x[:3])
    ),
    "hvp": lambda f, x, **kw: torch.func.jvp(
        torch.func.grad(loss_of(f, **kw), (0, 4)), tuple(x), (*x[3:], *x[:3])
    ),
    "vmap of the tangents": lambda f, x, **kw: torch.vmap(
        lambda *t: f(*x[:3], *t, **kw), (0, None, 0)
    )(stacked(x)[3], x[4], stacked(x)[5]),
}  # fmt: skip


@pytest.mark.parametrize("rule", DUAL_RULES)
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_the_dual_op(name, rule):
    primals, tangents, kwargs = case(name)
    inputs = [*primals, *tangents]
    got = DUAL_RULES[rule](dual, inputs, **kwargs)
    torch.testing.assert_close(got, DUAL_RULES[rule](dual_formula, inputs, **kwargs))


@pytest.mark.parametrize("name", CASES)
def test_directions_are_summed(name):
    """A loss over R directions: its gradient is that of R calls, and of those cotangents alone."""
    primals, tangents, kwargs = case(name)

    def together(q, k, v, t_q, t_k, t_v):
        o, t_o = attention_jvp(q, k, v, t_q, t_k, t_v, **kwargs)
        return o.sin().sum() + t_o.sin().sum()

    def apart(q, k, v, *tangents):
        total = attention_jvp(q, k, v, **kwargs)[0].sin().sum()
        for r in range(2):
            total = (
                total + attention_jvp(q, k, v, *(t[r] for t in tangents), **kwargs)[1].sin().sum()
            )
        return total

    inputs = [*primals, *stacked(tangents)]
    wanted = tuple(range(6))
    torch.testing.assert_close(
        torch.func.grad(together, wanted)(*inputs), torch.func.grad(apart, wanted)(*inputs)
    )


def test_a_stopped_gradient_pays_for_the_primal_only(monkeypatch):
    """No cotangent of t_o: the backward gets no tangents, and is asked for three gradients."""
    from fewstep.ops import module

    calls = []
    backward = module("attention_jvp_backward")
    original = backward.attention_jvp_backward

    def spy(*args, needs, **kwargs):
        gradients = original(*args, needs=needs, **kwargs)
        calls.append((args[1], args[7:10], needs))
        return gradients

    monkeypatch.setattr(backward, "attention_jvp_backward", spy)
    primals, tangents, _ = case("plain")
    leaves = [x.clone().requires_grad_() for x in [*primals, *tangents]]
    o, t_o = attention_jvp(*leaves)
    (o + t_o.detach()).sum().backward()
    assert calls == [(None, (None, None, None), ("q", "k", "v"))]
    assert [x.grad is not None for x in leaves] == [True] * 3 + [False] * 3
    calls.clear()
    leaves = [x.clone().requires_grad_(i == 2) for i, x in enumerate(primals)]
    attention_jvp(*leaves)[0].sum().backward()
    assert calls[0][2] == ("v",)


def implementations():
    """What can serve float64 on the CPU."""
    primals, tangents, _ = case("plain")
    for impl in ("reference", "native"):
        try:
            attention_jvp(*primals, *tangents, impl=impl)
        except UnsupportedError:
            continue
        yield impl


@pytest.mark.parametrize("impl", implementations())
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, impl):
    primals, tangents, kwargs = case(name)
    inputs = [x.clone().requires_grad_() for x in [*primals, *tangents]]

    def f(*x):
        try:
            o, t_o, lse, mu = attention_jvp(*x, **kwargs, return_stats=True, impl=impl)
        except UnsupportedError as reason:
            pytest.skip(str(reason))
        return o, t_o, lse.masked_fill(lse == -torch.inf, 0), mu

    assert gradcheck(f, inputs, fast_mode=True, check_batched_grad=True)
    assert gradcheck(
        lambda *x: f(*x)[::2], inputs[:3], fast_mode=True, check_forward_ad=True,
        check_batched_grad=True, check_batched_forward_grad=True,
    )  # fmt: skip
    assert gradgradcheck(lambda *x: f(*x)[::2], inputs[:3], fast_mode=True, check_fwd_over_rev=True)


def test_gradgradcheck_of_the_dual_op():
    primals, tangents, kwargs = case("plain")
    inputs = [x.clone().requires_grad_() for x in [*primals, *tangents]]
    assert gradgradcheck(lambda *x: dual(*x, **kwargs), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["boolean", "sequences"])
def test_compiled(name):
    """Explicit tangents compile in one graph, with gradients through all outputs."""
    primals, tangents, kwargs = case(name)
    inputs = [*primals, *tangents]
    compiled = torch.compile(lambda *x: dual(*x, **kwargs), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), dual(*inputs, **kwargs))
    torch.testing.assert_close(eager(compiled, inputs, 1), eager(dual, inputs, 1, **kwargs))


@pytest.mark.parametrize("directions", [None, 1, 2])
@pytest.mark.parametrize(
    ("batch", "nq", "nk"), [(1, 4, 0), (1, 0, 3), (0, 4, 3), (1, 0, 0)], ids=str
)
def test_gradients_of_what_is_empty(batch, nq, nk, directions):
    """Zeros of the right shape, as a sum over nothing has."""
    shapes = [(batch, 2, nq, 8), (batch, 2, nk, 8), (batch, 2, nk, 8)]
    lead = () if directions is None else (directions,)
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in (*shapes, *((*lead, *shape) for shape in shapes))
    ]
    o, t_o = attention_jvp(*leaves)
    for gradient, leaf in zip(
        torch.autograd.grad(o.sum() + t_o.sum(), leaves), leaves, strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    many = [torch.stack([x.detach()] * 3) for x in leaves]
    loss = torch.func.grad(lambda *x: sum(a.sum() for a in attention_jvp(*x)), tuple(range(6)))
    assert [x.shape for x in torch.vmap(loss)(*many)] == [x.shape for x in many]


def test_vmap_does_not_copy_what_is_broadcast(monkeypatch):
    """A mask that is one row for all queries and heads is folded as one row."""
    from fewstep.ops import module

    op_module, masks = module("attention_jvp"), []
    original = op_module._op

    def spy(*args):
        masks.append(args[6])
        return original(*args)

    monkeypatch.setattr(op_module, "_op", spy)
    (q, k, v), _, _ = case("plain")
    mask = normal(2, 1, 1, NK, seed=9)
    many = torch.stack([q, 2 * q, 3 * q])
    got = torch.vmap(lambda q: attention_jvp(q, k, v, attn_mask=mask)[0])(many)
    want = [attention_jvp(q, k, v, attn_mask=mask)[0] for q in many]
    torch.testing.assert_close(got, torch.stack(want))
    handed = [m for m in masks if not torch._C._functorch.is_batchedtensor(m)]
    assert max(m.untyped_storage().nbytes() for m in handed) == 3 * mask.nbytes


def test_masks_without_a_gradient():
    primals, _, kwargs = case("additive")
    mask = kwargs["attn_mask"].requires_grad_()
    with pytest.raises(DerivativeError, match="no gradient for attn_mask"):
        attention_jvp(*primals, attn_mask=mask)
    with pytest.raises(DerivativeError, match="no gradient for attn_mask"):
        torch.func.grad(lambda m: attention_jvp(*primals, attn_mask=m)[0].sum())(mask.detach())
    with pytest.raises(DerivativeError, match="no gradient for attn_mask"):
        torch.func.grad(
            lambda m: torch.vmap(lambda q: attention_jvp(q, *primals[1:], attn_mask=m)[0])(
                primals[0][None]
            ).sum()
        )(mask.detach())


def test_tangent_of_an_additive_mask():
    primals, tangents, kwargs = case("additive")
    mask = kwargs["attn_mask"]

    def along(f):
        return torch.func.jvp(
            lambda q, m: f(q, *primals[1:], attn_mask=m), (primals[0], mask), (tangents[0], mask)
        )

    torch.testing.assert_close(along(op), along(formula))
    only = torch.func.jvp(lambda m: op(*primals, attn_mask=m), (mask,), (mask,))
    torch.testing.assert_close(
        only, torch.func.jvp(lambda m: formula(*primals, attn_mask=m), (mask,), (mask,))
    )
