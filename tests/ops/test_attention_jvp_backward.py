"""attention_jvp_backward: every implementation against autograd through the fp64 reference."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from attention_masks import NEVER, masked, meets
from fewstep import _native, ops, reference
from helpers import padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAMES = ops.module("attention_jvp_backward").NAMES


def wide(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


@dataclass
class Problem:
    """A call of attention_jvp and cotangents of its four results, None where absent."""

    inputs: list[torch.Tensor | None]
    cotangents: list[torch.Tensor | None]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def exact(self):
        """The gradients by autograd through the fp64 reference; absent tangents are zeros there."""
        primals = [*self.inputs[:3], *self.inputs[:3]]
        leaves = [
            (torch.zeros_like(p) if x is None else x.detach().clone()).double().requires_grad_()
            for x, p in zip(self.inputs, primals, strict=True)
        ]
        outputs = reference.attention_jvp(*leaves, **{k: wide(v) for k, v in self.kwargs.items()})
        loss = sum(
            # lse is -inf in rows without a key, and its gradient there is nothing.
            (out.masked_fill(out == NEVER, 0) * wide(cotangent)).sum()
            for out, cotangent in zip(outputs, self.cotangents, strict=True)
            if cotangent is not None
        )
        return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)

    def arguments(self):
        """The arguments of the backward, with the statistics of the fp64 reference."""
        d_o, dt_o, d_lse, d_mu = self.cotangents
        kwargs = {name: wide(value) for name, value in self.kwargs.items()}
        o, t_o, lse, mu = reference.attention_jvp(*map(wide, self.inputs), **kwargs)
        delta0, delta1 = torch.zeros_like(lse), torch.zeros_like(lse)
        if dt_o is not None:
            delta0 = (wide(dt_o) * o).sum(-1)
            delta1 = (wide(dt_o) * t_o).sum(-1)
        if d_mu is not None:
            delta0 = delta0 - wide(d_mu)
        if d_o is not None:
            delta1 = delta1 + (wide(d_o) * o).sum(-1)
        if d_lse is not None:
            delta1 = delta1 - wide(d_lse)
        stat = torch.float64 if self.inputs[0].dtype == torch.float64 else torch.float32
        delta0, delta1, lse, mu = (x.to(stat) for x in (delta0, delta1, lse, mu))
        if dt_o is None and d_mu is None:
            delta0 = None
        if all(x is None for x in self.inputs[3:]) and "t_attn_mask" not in self.kwargs:
            mu = None
        return d_o, dt_o, delta0, delta1, *self.inputs, lse, mu


def problem(
    nq, nk, d=24, dv=40, heads=(4, 2), batch=2, dtype=torch.float32, absent="", **kwargs
) -> Problem:
    """A random problem; `absent` names tangents and cotangents that are None."""
    q, k, v = (batch, heads[0], nq, d), (batch, heads[1], nk, d), (batch, heads[1], nk, dv)
    names = ("t_q", "t_k", "t_v", "d_o", "dt_o", "d_lse", "d_mu")
    shapes = (q, k, v, (*q[:3], dv), (*q[:3], dv), q[:3], q[:3])
    primals = [torch.randn(shape).to(dtype) for shape in (q, k, v)]
    stat = torch.float64 if dtype == torch.float64 else torch.float32
    others = [
        None
        if name in absent.split()
        else torch.randn(shape).to(stat if name in ("d_lse", "d_mu") else dtype)
        for name, shape in zip(names, shapes, strict=True)
    ]
    return Problem([*primals, *others[:3]], others[3:], kwargs)


def check(x: Problem, impl="native", needs=NAMES):
    """Compare with autograd in fp64; the budget is what the oracle loses in the same precision."""
    arguments = x.arguments()
    got = ops.attention_jvp_backward(*arguments, needs=needs, impl=impl, **x.kwargs)
    plain = reference.attention_jvp_backward(*arguments, **x.kwargs)
    exact = x.exact()
    dtype = x.inputs[0].dtype
    # Twice: the two sum in another order. Some units: a short sum may come out exact in one of
    # them; in fp64 what they are compared with is itself off by as much as they are.
    slack = (8 if dtype == torch.float64 else 2) * torch.finfo(dtype).eps
    for name, ours, theirs, want in zip(NAMES, got, plain, exact, strict=True):
        if name not in needs:
            assert ours.numel() == 0, name
            continue
        assert ours.shape == want.shape, name
        assert ours.dtype == dtype, name
        theirs = theirs.to(dtype)
        assert relative_error(ours, want) < 2 * relative_error(theirs, want) + slack, name
    return got


MASKS = ["causal", "bool", "bool, keys", "additive", "minus infinity"]


@pytest.mark.parametrize("name", [None, *MASKS])
def test_oracle_is_what_autograd_finds(name):
    kwargs = {} if name is None else masked(name, 33, 50, torch.float64)
    x = problem(33, 50, dtype=torch.float64, **kwargs)
    got = reference.attention_jvp_backward(*x.arguments(), **x.kwargs)
    for ours, want in zip(got, x.exact(), strict=True):
        assert relative_error(ours, want) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_autograd(dtype, impl):
    for nq, nk in ((1, 1), (15, 31), (33, 65), (65, 33), (129, 64), (1, 200)):
        check(problem(nq, nk, dtype=dtype), impl)


@pytest.mark.parametrize("d", [8, 16, 40, 64, 72, 128, 160, 256])
def test_head_dims(d):
    for dtype in (torch.float32, torch.float64):
        check(problem(35, 70, d, 264 - d, heads=(1, 1), batch=1, dtype=dtype))


@pytest.mark.parametrize("n", [1, 15, 31, 33, 515, 999])
@pytest.mark.parametrize("is_causal", [False, True])
def test_lengths(n, is_causal):
    check(problem(n, n, 16, 8, heads=(2, 1), batch=1, is_causal=is_causal))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    for nq, nk in ((33, 130), (130, 65)):
        check(problem(nq, nk, dtype=dtype, **masked(name, nq, nk, dtype)))


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_shared_heads(heads):
    check(problem(37, 70, heads=heads))
    check(problem(37, 70, heads=heads, is_causal=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_sequences(is_causal):
    # One without queries, one without keys; ends inside tiles; several ranges of keys in one.
    offsets_q, offsets_k = torch.tensor([0, 5, 5, 75, 90]), torch.tensor([0, 65, 70, 70, 701])
    kwargs = {"cu_seqlens_q": offsets_q, "cu_seqlens_k": offsets_k, "is_causal": is_causal}
    x = problem(90, 701, batch=1, **kwargs)
    got = check(x)
    for s in range(4):
        rows, keys = (slice(*o[s : s + 2].tolist()) for o in (offsets_q, offsets_k))
        alone = Problem(
            [t[..., rows if i in (0, 3) else keys, :] for i, t in enumerate(x.inputs)],
            [c[:, :, rows] for c in x.cotangents],
            {"is_causal": is_causal},
        )
        parts = [g[..., rows if i in (0, 3) else keys, :] for i, g in enumerate(got)]
        for packed, single in zip(parts, check(alone), strict=True):
            assert relative_error(packed, single) < 1e-6


COTANGENTS = ["", "dt_o d_mu", "d_o", "dt_o", "d_o d_lse d_mu", "d_o dt_o", "d_o dt_o d_lse"]


@pytest.mark.parametrize("cotangents", COTANGENTS)
@pytest.mark.parametrize("tangents", ["", "t_k t_v", "t_q", "t_v", "t_q t_k", "t_q t_k t_v"])
def test_what_is_absent_is_zero(cotangents, tangents):
    check(problem(35, 70, heads=(2, 1), batch=1, absent=f"{cotangents} {tangents}"))


def test_a_tangent_of_the_mask_alone():
    mask, t_mask = torch.randn(35, 70), torch.randn(35, 70)
    for cotangents in COTANGENTS:
        absent = f"t_q t_k t_v {cotangents}"
        check(problem(35, 70, absent=absent, attn_mask=mask, t_attn_mask=t_mask))


@pytest.mark.parametrize("absent", ["", "d_o", "dt_o", "dt_o d_mu", "t_k t_v", "t_q"])
def test_what_is_not_wanted_is_not_computed_and_changes_no_bit(absent):
    x = problem(35, 70, heads=(2, 1), batch=1, absent=absent)
    arguments = x.arguments()
    whole = ops.attention_jvp_backward(*arguments, impl="native")
    for count in range(6):
        for needs in itertools.combinations(NAMES, count):
            some = ops.attention_jvp_backward(*arguments, needs=needs, impl="native")
            for name, one, every in zip(NAMES, some, whole, strict=True):
                assert torch.equal(one, every) if name in needs else one.numel() == 0


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_and_keys_that_meet_nothing_get_exactly_zero(additive, impl):
    allowed = meets(70, 130)
    allowed[:, 0] = allowed[0] = True
    allowed[3] = allowed[31:45] = allowed[69] = False
    allowed[:, 64:129] = False
    kwargs = {"attn_mask": allowed}
    if additive:
        mask = torch.zeros(70, 130).masked_fill(~allowed, NEVER)
        kwargs = {"attn_mask": mask, "t_attn_mask": torch.randn(70, 130)}
    got = check(problem(70, 130, **kwargs), impl)
    for i, grad in enumerate(got):
        empty = ~allowed.any(1 if i in (0, 3) else 0)
        assert not grad[:, :, empty].any()
        assert grad[:, :, ~empty].any()


def test_adjoint_of_the_forward():
    """<dt_o, t_o> = <dt_q, t_q> + <dt_k, t_k> + <dt_v, t_v>: t_o is linear in the tangents."""
    x = problem(37, 130, dtype=torch.float64, absent="d_o d_lse d_mu", is_causal=True)
    t_o = ops.attention_jvp(*x.inputs, impl="native", is_causal=True)[1]
    grads = ops.attention_jvp_backward(*x.arguments(), impl="native", is_causal=True)[3:]
    pairs = list(zip(grads, x.inputs[3:], strict=True))
    terms = torch.stack([(grad * tangent).sum() for grad, tangent in pairs])
    # Sums of some ten thousand products of random sign, in units of the products' total size.
    size = sum((grad * tangent).abs().sum() for grad, tangent in pairs)
    assert (terms.sum() - (x.cotangents[1] * t_o).sum()).abs() < 1e-14 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_logits(dtype):
    # Scores of about +-200, each off by about a unit of its size: as much as P is off by.
    x = problem(33, 200, dtype=dtype, scale=8.0)
    got = ops.attention_jvp_backward(*x.arguments(), impl="native", scale=8.0)
    for ours, want in zip(got, x.exact(), strict=True):
        assert relative_error(ours, want) < 200 * torch.finfo(dtype).eps


def test_statistics_of_the_forward_fit():
    """With lse and mu of the native forward, and o and t_o as it rounds them."""
    x = problem(70, 200)
    arguments = list(x.arguments())
    o, t_o, arguments[10], arguments[11] = ops.attention_jvp(*x.inputs, return_stats=True)
    d_o, dt_o, d_lse, d_mu = x.cotangents
    arguments[2] = (dt_o * o).sum(-1) - d_mu
    arguments[3] = (d_o * o + dt_o * t_o).sum(-1) - d_lse
    got = ops.attention_jvp_backward(*arguments, impl="native")
    # Each of the two has the error of a few fp32 roundings of its parts.
    for ours, want in zip(got, x.exact(), strict=True):
        assert relative_error(ours, want) < 2e-6


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout):
    x = problem(35, 70)
    x.inputs = [layout(t) for t in x.inputs]
    x.cotangents = [layout(t) for t in x.cotangents]
    x.kwargs = {"attn_mask": layout(torch.randn(4, 35, 70))}
    check(x)


def test_gradients_have_the_axis_order_of_their_primal(monkeypatch):
    x = problem(35, 70)
    x.inputs = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in x.inputs]
    seen = []
    call = _native.call
    monkeypatch.setattr(_native, "call", lambda op, *a: (seen.append(a), call(op, *a)))
    for grad in check(x):
        assert grad.transpose(1, 2).is_contiguous()
    for used, given in zip(seen[0][4:10], x.inputs, strict=True):
        assert used.data_ptr() == given.data_ptr()
    # Cotangents that a sum leaves: one number, expanded.
    x.cotangents[0] = torch.ones(()).expand(x.cotangents[0].shape)
    check(x)


def test_writes_stay_inside():
    x = problem(35, 70, attn_mask=torch.randn(2, 4, 35, 70))
    outputs = [padded(torch.zeros(t.shape)) for t in x.inputs]
    masking = (x.kwargs["attn_mask"], None, None, None, False)
    scale = x.inputs[0].shape[-1] ** -0.5
    _native.call("attention_jvp_backward", *x.arguments(), None, *masking, *outputs, scale)
    assert all(padding_intact(out) for out in outputs)
    for ours, want in zip(outputs, x.exact(), strict=True):
        assert relative_error(ours, want) < 2e-6


def test_empty():
    for batch, nq, nk in ((0, 5, 6), (2, 0, 6), (2, 5, 0)):
        x = problem(nq, nk, batch=batch)
        got = ops.attention_jvp_backward(*x.arguments(), impl="native")
        for grad, primal in zip(got, x.inputs, strict=True):
            assert torch.equal(grad, torch.zeros_like(primal))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in DTYPES:
        check(problem(1, 1, 8, 8, dtype=dtype))
        check(problem(20, 129, 72, 256, heads=(1, 1), batch=1, dtype=dtype))
        check(problem(33, 70, dtype=dtype, absent="dt_o d_mu t_q t_k t_v"))
        for name in ("causal", "bool, keys", "minus infinity"):
            check(problem(35, 70, dtype=dtype, **masked(name, 35, 70, dtype)))


@pytest.mark.parametrize("is_causal", [False, True])
def test_threads_do_not_change_a_bit(is_causal):
    # Several ranges of keys, so that parts of d_q are summed.
    x = problem(200, 1100, 16, 8, heads=(2, 1), batch=1, is_causal=is_causal)
    arguments = x.arguments()
    one = ops.attention_jvp_backward(*arguments, impl="native", is_causal=is_causal)
    torch.set_num_threads(4)
    many = ops.attention_jvp_backward(*arguments, impl="native", is_causal=is_causal)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


@pytest.mark.parametrize("setting", [False, True])
def test_sums_have_one_order_unless_the_caller_allows_others(monkeypatch, setting):
    module = ops.module("attention_jvp_backward")
    allowed = []

    def record(*args):
        allowed.append(not args[-2])
        return [torch.zeros(0)] * 6

    monkeypatch.setattr(module, "_op", record)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: setting)
    arguments = problem(3, 4, 8, 8).arguments()
    ops.attention_jvp_backward(*arguments)
    ops.attention_jvp_backward(*arguments, deterministic=False)
    assert allowed == [False, not setting]


def raw_arguments(x, needs=63):
    masking = (*(x.kwargs.get(f"{t}attn_mask") for t in ("", "t_")), None, None)
    return (
        *x.arguments(),
        None,
        *masking,
        x.kwargs.get("is_causal", False),
        0.3,
        needs,
        True,
        "native",
    )


def test_opcheck():
    op = torch.ops.fewstep.attention_jvp_backward.default
    mask = meets(1, 2, 9, 12)
    x = problem(9, 12, 8, 16, heads=(2, 1), batch=1, absent="t_k", attn_mask=mask)
    torch.library.opcheck(op, raw_arguments(x), test_utils=("test_schema", "test_faketensor"))
    # Heads inside tokens: the fake must foresee that the gradients follow. One is not wanted.
    x.inputs = [
        None if t is None else t.transpose(1, 2).contiguous().transpose(1, 2) for t in x.inputs
    ]
    torch.library.opcheck(op, raw_arguments(x, needs=0b110101))


def test_compiles_without_graph_break():
    x = problem(9, 12, 8, 16, attn_mask=torch.randn(12))
    arguments = x.arguments()
    compiled = torch.compile(ops.attention_jvp_backward, fullgraph=True, backend="aot_eager")
    want = ops.attention_jvp_backward(*arguments, **x.kwargs)
    assert all(
        torch.equal(a, b) for a, b in zip(compiled(*arguments, **x.kwargs), want, strict=True)
    )


def test_bad_input_names_the_argument():
    x = problem(5, 6)
    names = ["d_o", "dt_o", "delta0", "delta1", "q", "k", "v", "t_q", "t_k", "t_v", "lse", "mu"]
    good = dict(zip(names, x.arguments(), strict=True))

    def call(needs=NAMES, impl="auto", attn_mask=None, **bad):
        ops.attention_jvp_backward(
            *{**good, **bad}.values(), needs=needs, impl=impl, attn_mask=attn_mask
        )

    for name in ("d_o", "dt_o", "delta0", "delta1", "lse", "mu"):
        with pytest.raises(ValueError, match=rf"{name}: expected the device of q, cpu, got meta"):
            call(**{name: good[name].to("meta")})
        with pytest.raises(TypeError, match=f"{name}: expected a tensor"):
            call(**{name: 1.0})
        with pytest.raises(ValueError, match=rf"{name}: expected torch\.float32 \[2, 4, 5"):
            call(**{name: good[name][:, :, :4]})
        with pytest.raises(ValueError, match=rf"{name}: expected .* got torch\.float16"):
            call(**{name: good[name].half()})
    with pytest.raises(ValueError, match="delta0: expected a tensor where dt_o is given, got None"):
        call(delta0=None)
    with pytest.raises(ValueError, match=r"q: expected \[B, H, Nq, D\], got shape"):
        call(**{name: good[name][:, 0] for name in ("q", "k", "v")})
    with pytest.raises(ValueError, match="k: expected heads that divide those of q, 4, got 3"):
        call(k=torch.randn(2, 3, 6, 24))
    with pytest.raises(ValueError, match=r"t_k: expected the shape of k"):
        call(t_k=good["t_k"][..., :5, :])
    with pytest.raises(ValueError, match="t_q, t_k, t_v: expected one direction"):
        call(**{name: good[name][None] for name in ("t_q", "t_k", "t_v")})
    with pytest.raises(ValueError, match="attn_mask: expected a shape that broadcasts"):
        call(attn_mask=torch.zeros(5, 7))
    with pytest.raises(ValueError, match=r"needs: expected names from q, k, v, .* got t_x"):
        call(needs=("q", "t_x"))
    with pytest.raises(ValueError, match=r"needs: expected names from .* got t_"):
        call(needs="t_")
    call(needs="t_q")
    with pytest.raises(ValueError, match="impl: expected one of"):
        call(impl="cuda")
