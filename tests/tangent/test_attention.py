"""fewstep.scaled_dot_product_attention against torch's unfused one, which has every derivative."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import _native, ops
from fewstep import scaled_dot_product_attention as fused


def unfused(*args, **kwargs):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


MASK = (2, 1, 1, 5, 4)
# Shapes of query, key, value; keywords.
SHAPES = {
    "no axis in front": ((3, 8), (4, 8), (4, 8), {}),
    "one": ((2, 3, 8), (2, 4, 8), (2, 4, 5), {}),
    "odd head dims": ((2, 3, 5, 7), (2, 3, 4, 7), (2, 3, 4, 9), {}),
    "three": ((2, 2, 3, 5, 8), (2, 2, 3, 4, 8), (2, 2, 3, 4, 8), {}),
    "three, broadcast": ((2, 1, 3, 5, 8), (1, 2, 3, 4, 8), (2, 2, 3, 4, 8), {"mask": MASK}),
    "missing axes": ((2, 4, 5, 8), (4, 6, 8), (6, 8), {}),
    "one query head": ((2, 1, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), {}),
    "one key head": ((2, 4, 5, 8), (2, 1, 6, 8), (2, 1, 6, 8), {}),
    "shared heads": ((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8), {"enable_gqa": True}),
    "shared heads, 3-d": ((4, 5, 8), (2, 6, 8), (2, 6, 8), {"enable_gqa": True}),
    "value heads of its own": ((2, 4, 5, 8), (2, 2, 6, 8), (2, 4, 6, 8), {"enable_gqa": True}),
    "causal": ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), {"is_causal": True}),
    "scale": ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8), {"mask": (5, 6), "scale": 0.3}),
    "wide": ((2, 1, 5, 300), (2, 1, 6, 300), (2, 1, 6, 300), {}),
}  # fmt: skip


def loss_of(f, **kwargs):
    return lambda *x: f(*x, **kwargs).sin().sum()


@pytest.mark.parametrize("name", SHAPES)
def test_semantics_of_torch(name):
    *shapes, kwargs = SHAPES[name]
    kwargs = dict(kwargs)
    x, t = ([normal(*shape) for shape in shapes] for _ in range(2))
    if "mask" in kwargs:
        kwargs["attn_mask"] = normal(*kwargs.pop("mask"))

    def all_of(f):
        along = torch.func.jvp(lambda *a: f(*a, **kwargs), tuple(x), tuple(t))
        partial = torch.func.jvp(lambda q: f(q, *x[1:], **kwargs), (x[0],), (t[0],))
        return along, partial, torch.func.grad(loss_of(f, **kwargs), (0, 1, 2))(*x)

    torch.testing.assert_close(all_of(fused), all_of(unfused))


def backward_of_jvp(f, x, t):
    leaves = tuple(a.clone().requires_grad_() for a in x)
    o, t_o = torch.func.jvp(f, leaves, tuple(t))
    return o, t_o, torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)


def twice(f, x):
    leaves = [a.clone().requires_grad_() for a in x]
    first = torch.autograd.grad(loss_of(f)(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)


TRANSFORMS = {
    "backward of jvp": backward_of_jvp,
    "autograd twice": lambda f, x, t: twice(f, x),
    "vjp": lambda f, x, t: torch.func.vjp(f, *x)[1](t[0]),
    "hessian": lambda f, x, t: torch.func.hessian(loss_of(f), 0)(*x),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f, 1)(*x),
    "jacrev of jacfwd": lambda f, x, t: torch.func.jacrev(torch.func.jacfwd(loss_of(f), 0), 1)(*x),
    "jacfwd of jacfwd": lambda f, x, t: torch.func.jacfwd(torch.func.jacfwd(loss_of(f), 0), 1)(*x),
    "vmap": lambda f, x, t: torch.vmap(f, (0, None, 1))(*x),
    "vmap of jvp": lambda f, x, t: torch.vmap(lambda *a: torch.func.jvp(f, a[:3], a[3:]))(*x, *t),
    "jvp of vmap": lambda f, x, t: torch.func.jvp(torch.vmap(f), tuple(x), tuple(t)),
    "grad of jvp": lambda f, x, t: torch.func.grad(
        lambda q: torch.func.jvp(lambda k: f(q, k, x[2]), (x[1],), (t[1],))[1].sin().sum()
    )(x[0]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name):
    x, t = ([normal(2, 2, 3, 8) for _ in range(3)] for _ in range(2))
    torch.testing.assert_close(TRANSFORMS[name](fused, x, t), TRANSFORMS[name](unfused, x, t))


def test_dual_numbers_and_backward():
    x, t = ([normal(2, 2, 3, 8) for _ in range(3)] for _ in range(2))
    leaves = [a.clone().requires_grad_() for a in x]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(leaves, t, strict=True)]
        o, t_o = forward_ad.unpack_dual(fused(*duals))
    gradients = torch.autograd.grad(o.sin().sum() + t_o.cos().sum(), leaves)
    torch.testing.assert_close((o, t_o, gradients), backward_of_jvp(unfused, x, t))


MASKS = {
    "grad": lambda f, x, t, m: torch.func.grad(lambda m: loss_of(f, attn_mask=m)(*x))(m),
    "jvp": lambda f, x, t, m: torch.func.jvp(lambda m: f(*x, attn_mask=m), (m,), (2 * m,)),
    "jvp of grad": lambda f, x, t, m: torch.func.jvp(
        torch.func.grad(lambda m: loss_of(f, attn_mask=m)(*x)), (m,), (2 * m,)
    ),
    "grad of jvp": lambda f, x, t, m: torch.func.grad(
        lambda m: torch.func.jvp(lambda q: f(q, *x[1:], attn_mask=m), (x[0],), (t[0],))[1].sum()
    )(m),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_differentiated(name):
    x, t = ([normal(2, 2, 3, 8) for _ in range(3)] for _ in range(2))
    m = normal(2, 3, 3)
    torch.testing.assert_close(MASKS[name](fused, x, t, m), MASKS[name](unfused, x, t, m))


def test_one_call_of_the_op_with_the_tangents_there_are(monkeypatch):
    from fewstep.tangent import attention

    calls = []

    def spy(q, k, v, *tangents, **kwargs):
        calls.append([t is not None for t in tangents])
        return ops.attention_jvp(q, k, v, *tangents, **kwargs)

    monkeypatch.setattr(attention, "attention_jvp", spy)
    q, k, v = (normal(2, 2, 3, 8) for _ in range(3))
    torch.func.jvp(lambda q: fused(q, k, v), (q,), (q,))
    assert calls == [[True, False, False]]


@pytest.mark.parametrize("name", ["vmap over tangents", "jacfwd"])
def test_one_call_of_the_kernel_for_all_directions(name, monkeypatch):
    """Directions share the primal's work only if they arrive together."""
    call, seen = _native.call, []

    def spy(op, *args):
        seen.append((op, args[0].shape, [None if x is None else x.shape for x in args[3:6]]))
        return call(op, *args)

    monkeypatch.setattr(_native, "call", spy)
    x = [normal(2, 2, 3, 8) for _ in range(3)]
    t = [normal(5, *a.shape) for a in x]
    shape = x[0].shape
    if name == "vmap over tangents":

        def along(f):
            return torch.vmap(lambda *t: torch.func.jvp(f, tuple(x), t), out_dims=(None, 0))(*t)

        want = [(5, *shape)] * 3
    else:

        def along(f):
            return torch.func.jacfwd(lambda q: f(q, *x[1:]))(x[0])

        want = [(x[0].numel(), *shape), None, None]
    got = along(fused)
    assert seen == [("attention_jvp", shape, want)]
    torch.testing.assert_close(got, along(unfused))


def test_a_query_without_keys():
    x, t = ([normal(1, 1, 3, 300) for _ in range(3)] for _ in range(2))
    mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
    for width in (8, 300):
        inputs = tuple(a[..., :width] for a in x)
        tangents = tuple(a[..., :width] for a in t)
        o, t_o, gradients = backward_of_jvp(lambda *a: fused(*a, attn_mask=mask), inputs, tangents)
        assert not o[..., 1, :].any()
        assert not t_o[..., 1, :].any()
        assert not gradients[0][..., 1, :].any()
        assert all(g.isfinite().all() for g in gradients)


def test_float32_masks_beside_16_bit_queries():
    x = [torch.randn(1, 2, 4, 8, dtype=torch.bfloat16) for _ in range(3)]
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -1e9)
    got = fused(*x, attn_mask=mask)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, fused(*x, is_causal=True), rtol=0, atol=0)
    # A row of float32's lowest number adds the same to all scores: it is not one without keys.
    half = [a.half() for a in x]
    lowest = torch.full((4, 4), torch.finfo(torch.float32).min)
    torch.testing.assert_close(fused(*half, attn_mask=lowest), fused(*half), rtol=0, atol=2e-3)


def test_autocast():
    x = [torch.randn(1, 2, 4, 8) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        got, want = fused(*x), F.scaled_dot_product_attention(*x)
    assert got.dtype == want.dtype == torch.bfloat16
    # Outputs of order 1, rounded once by each.
    torch.testing.assert_close(got, want, rtol=2**-8, atol=2**-8)


def test_dropout():
    """The weights that are kept are the same for the primal and the tangent."""
    q, k = normal(1, 1, 6, 8), normal(1, 1, 6, 8)
    v = torch.eye(6, dtype=torch.float64)[None, None]
    p, t_p = torch.func.jvp(lambda q: fused(q, k, v, dropout_p=0.5), (q,), (q,))
    assert 0 < int((p == 0).sum()) < 36
    assert torch.equal(t_p == 0, p == 0)


@pytest.mark.parametrize(
    ("name", "shapes", "kwargs"),
    [
        ("query", [(8,), (4, 8), (4, 8)], {}),
        ("key", [(3, 8), (4, 7), (4, 8)], {}),
        ("value", [(3, 8), (4, 8), (5, 8)], {}),
        ("key", [(4, 3, 8), (2, 4, 8), (2, 4, 8)], {}),
        ("key", [(4, 3, 8), (3, 4, 8), (3, 4, 8)], {"enable_gqa": True}),
        ("key, value", [(2, 4, 3, 8), (3, 4, 4, 8), (3, 4, 4, 8)], {}),
        ("attn_mask", [(3, 8), (4, 8), (4, 8)], {"attn_mask": torch.zeros(3, 5)}),
        ("attn_mask", [(3, 8), (4, 8), (4, 8)], {"attn_mask": torch.zeros(3, 4, dtype=torch.int)}),
        ("is_causal", [(3, 8), (4, 8), (4, 8)], {"attn_mask": torch.ones(3, 4), "is_causal": True}),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(name, shapes, kwargs):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        fused(*(torch.randn(shape) for shape in shapes), **kwargs)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", [1.0]),
        ("key", None),
        ("attn_mask", [True]),
        ("dropout_p", None),
        ("is_causal", 1),
        ("scale", "a"),
        ("enable_gqa", torch.tensor(True)),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(name, value):
    good = dict.fromkeys(("query", "key", "value"), torch.randn(2, 3, 8))
    with pytest.raises(TypeError, match=f"^{name}: expected"):
        fused(**{**good, name: value})


def test_queries_without_columns():
    """All scores are zero: a mean of the values, as torch has it."""
    q, v = torch.randn(2, 3, 0), torch.randn(2, 3, 8)
    torch.testing.assert_close(fused(q, q, v), v.mean(-2, keepdim=True).expand(2, 3, 8))


def test_other_dtypes_and_devices_are_refused():
    q = torch.randn(2, 3, 8)
    with pytest.raises(ValueError, match=r"^value: expected the dtype and device of query"):
        fused(q, q, q.double())
    with pytest.raises(ValueError, match=r"^key: expected the dtype and device of query"):
        fused(q, q.to("meta"), q)
    with pytest.raises(ValueError, match=r"^query: expected a floating dtype"):
        fused(q.int(), q.int(), q.int())
