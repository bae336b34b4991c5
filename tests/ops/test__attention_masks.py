"""attention_jvp with masks, shared heads, packed sequences and several directions."""

import pytest
import torch

from attention_masks import MASKS, NEVER, masked, meets
from fewstep import _native, ops, reference
from helpers import padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LENGTHS = [1, 15, 31, 33, 515, 999]
MODULE = ops.module("attention_jvp")


def inputs(nq, nk, d=24, dv=40, heads=(4, 2), batch=2, directions=None, dtype=torch.float32):
    """q, k, v, t_q, t_k, t_v; `heads` are those of q and of k."""
    shapes = [(batch, heads[0], nq, d), (batch, heads[1], nk, d), (batch, heads[1], nk, dv)]
    lead = () if directions is None else (directions,)
    tangents = [(*lead, *shape) for shape in shapes]
    return [torch.randn(shape).to(dtype) for shape in (*shapes, *tangents)]


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(args, impl="native", **kwargs):
    """Compare with the fp64 oracle; the budget is what the oracle loses in the dtype of q."""
    got = ops.attention_jvp(*args, return_stats=True, impl=impl, **kwargs)
    exact = reference.attention_jvp(
        *map(double, args), **{name: double(value) for name, value in kwargs.items()}
    )
    plain = reference.attention_jvp(*args, **kwargs)
    # Twice: the two sum in another order. Some units: a short sum may come out exact in one of
    # them; in fp64 the oracle itself is off by as much as they are.
    slack = (8 if args[0].dtype == torch.float64 else 2) * torch.finfo(args[0].dtype).eps
    for name, ours, theirs, want in zip(("o", "t_o"), got, plain, exact, strict=False):
        assert ours.shape == want.shape, name
        theirs = theirs.to(ours.dtype)
        assert relative_error(ours, want) < 2 * relative_error(theirs, want) + slack, name
    # As in test_attention_jvp: a score is a dot product in fp32 (fp64) of inputs taken as exact.
    bound = 1e-5 if args[0].dtype != torch.float64 else 1e-13
    for name, ours, want in zip(("lse", "mu"), got[2:], exact[2:], strict=True):
        ours, want = torch.broadcast_tensors(ours, want)  # mu of t_v alone has no directions there
        empty = want == NEVER
        assert torch.equal(ours == NEVER, empty), name
        error = (ours - want)[~empty].abs()
        assert not error.numel() or error.max() <= bound * (1 + want[~empty].abs().max()), name
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, dtype):
    for nq, nk in ((33, 130), (70, 65), (40, 40)):
        kwargs = masked(name, nq, nk, dtype)
        check(inputs(nq, nk, dtype=dtype), **kwargs)
        check([*inputs(nq, nk, dtype=dtype)[:3], None, None, None], **kwargs)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", ["causal", "bool, keys", "minus infinity"])
def test_lengths(name, n):
    args = inputs(n, n, 16, 8, heads=(4, 1), batch=1)
    kwargs = masked(name, n, n)
    if name == "bool, keys":
        kwargs = {"attn_mask": kwargs["attn_mask"][:1]}
    check(args, **kwargs)


@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (3, 3)])
def test_shared_heads(heads):
    args = inputs(37, 70, heads=heads, directions=2)
    repeated = [x if i in (0, 3) else x.repeat_interleave(heads[0] // heads[1], -3)
                for i, x in enumerate(args)]  # fmt: skip
    got = check(args)
    want = ops.attention_jvp(*repeated, return_stats=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    check(args, is_causal=True)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sequences(dtype, is_causal):
    # One sequence without queries, one without keys, ends inside tiles.
    offsets_q, offsets_k = torch.tensor([0, 5, 5, 75, 90]), torch.tensor([0, 65, 70, 70, 201])
    args = inputs(90, 201, batch=1, directions=2, dtype=dtype)
    kwargs = {"cu_seqlens_q": offsets_q.int(), "cu_seqlens_k": offsets_k.int()}
    got = check(args, is_causal=is_causal, **kwargs)
    for s in range(4):
        rows, keys = (slice(*x[s : s + 2].tolist()) for x in (offsets_q, offsets_k))
        alone = [x[..., rows if i in (0, 3) else keys, :] for i, x in enumerate(args)]
        want = ops.attention_jvp(*alone, return_stats=True, is_causal=is_causal, impl="native")
        for i, (packed, single) in enumerate(zip(got, want, strict=True)):
            assert torch.equal(packed[..., rows, :] if i < 2 else packed[..., rows], single)


@pytest.mark.parametrize("kept", [(3, 4, 5), (3,), (4,), (5,), (4, 5), ()])
@pytest.mark.parametrize("directions", [1, 2, 3])
def test_directions_share_the_primal_and_not_more(directions, kept):
    """Each direction has the bits it has alone, and o and lse those they have without any."""
    args = inputs(37, 130, directions=directions)
    args = [x if i < 3 or i in kept else None for i, x in enumerate(args)]
    t_mask = torch.randn(directions, 4, 37, 130)
    for kwargs in ({}, {"attn_mask": torch.randn(37, 130), "t_attn_mask": t_mask}):
        if not kept and not kwargs:
            continue
        one_mask = dict(kwargs)
        if not kept:  # no other tangent: the mask's has no axis of directions
            one_mask["t_attn_mask"] = t_mask[0]
            got = ops.attention_jvp(*args, return_stats=True, impl="native", **one_mask)
            got = [got[0], got[1][None], got[2], got[3][None]]
        else:
            got = ops.attention_jvp(*args, return_stats=True, impl="native", **kwargs)
        for r in range(len(got[1])):
            alone = [x if x is None or i < 3 else x[r] for i, x in enumerate(args)]
            if kwargs:
                one_mask["t_attn_mask"] = t_mask[r]
            want = check(alone, **one_mask)
            assert torch.equal(got[1][r], want[1])
            assert torch.equal(got[3][r], want[3])
        bare = {} if not kwargs else {"attn_mask": kwargs["attn_mask"]}
        o, _, lse, _ = ops.attention_jvp(*args[:3], return_stats=True, impl="native", **bare)
        assert torch.equal(got[0], o)
        assert torch.equal(got[2], lse)


def test_no_directions():
    args = inputs(5, 9, directions=0)
    o, t_o, lse, mu = ops.attention_jvp(*args, return_stats=True, impl="native")
    assert t_o.shape[0] == mu.shape[0] == 0
    assert relative_error(o, reference.attention_jvp(*args[:3])[0]) < 1e-6
    assert lse.isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("additive", [False, True])
def test_rows_without_a_key_are_exactly_zero(additive, impl):
    allowed = meets(70, 130)
    allowed[:, 0] = True
    allowed[3] = allowed[31:45] = allowed[69] = False
    mask = torch.randn(70, 130).masked_fill(~allowed, NEVER) if additive else allowed
    t_mask = torch.randn(70, 130) if additive else None
    got = check(inputs(70, 130), impl, attn_mask=mask, t_attn_mask=t_mask)
    empty = ~allowed.any(1)
    for out in (got[0], got[1], got[3]):
        assert not out[:, :, empty].any()
    assert (got[2][:, :, empty] == NEVER).all()
    assert got[2][:, :, ~empty].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_whole_tiles_may_be_masked(dtype):
    """The first tiles of keys, some in the middle and the last: no row starts or ends there."""
    allowed = torch.ones(40, 400, dtype=torch.bool)
    allowed[::2, :130] = False
    allowed[1::2, 190:330] = False
    allowed[5, :-1] = False
    allowed[:, -64:] &= torch.arange(40)[:, None] % 3 != 0
    check(inputs(40, 400, dtype=dtype), attn_mask=allowed)
    additive = torch.zeros(40, 400).masked_fill(~allowed, NEVER).to(dtype)
    check(inputs(40, 400, dtype=dtype), attn_mask=additive)


def test_masks_that_hide_by_a_large_number():
    """-1e4 is what some models add instead of -inf; the first tiles may hold nothing else."""
    mask = torch.zeros(40, 300)
    mask[::2, :200] = -1e4
    check(inputs(40, 300), attn_mask=mask)


def at_rounded_scores(q, k, v, t_q, t_k, t_v, mask):
    """(o, t_o) in fp64, of scores that are rounded to fp32 where the mask is added."""
    scale = q.shape[-1] ** -0.5
    s = scale * q @ k.mT + mask
    s = s + (s.detach().float() - s.detach())  # the rounding has no derivative
    t_s = scale * (t_q @ k.mT + q @ t_k.mT)
    p = s.softmax(-1)
    t_p = p * (t_s - (p * t_s).sum(-1, keepdim=True))
    return p @ v, t_p @ v + p @ t_v


def finite(dtype):
    """What models hide keys with in `dtype`."""
    values = (-3e4,) if dtype == torch.float16 else (-1e4, -1e6, -1e9)
    return (*values, torch.finfo(dtype).min)


def large_finite_masks(value, dtype):
    """Inputs and a mask with rows of `value` alone, of some of it, and of none."""
    mask = torch.zeros(40, 70)
    mask[2], mask[31:33], mask[5, :64], mask[6, 3:] = value, value, value, value
    shapes = [(1, 2, n, 24) for n in (40, 70, 70)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes], mask.to(dtype)


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_rows_of_large_finite_masks_and_their_gradients(dtype, impl):
    """A row of -1e9 alone attends to all its keys alike, as in torch: softmax ignores a shift."""
    for value in finite(dtype):
        args, mask = large_finite_masks(value, dtype)
        leaves = [x.clone().requires_grad_() for x in args]
        exact = [x.double().requires_grad_() for x in args]
        cotangents = [torch.randn(1, 2, 40, 24).to(dtype) for _ in range(2)]
        got = ops.attention_jvp(*leaves, attn_mask=mask, impl=impl)
        want = at_rounded_scores(*exact, mask.double())
        found = torch.autograd.grad(got, leaves, cotangents)
        true = torch.autograd.grad(want, exact, [x.double() for x in cotangents])
        # fp32: sums of tens of terms, each off by a unit or so; 1e-6 where a difference is left of
        # them. In 16 bits o, t_o and the gradients are rounded, and o and t_o enter D0 and D1.
        bound = 3e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        for ours, theirs in zip((*got, *found), (*want, *true), strict=True):
            assert relative_error(ours, theirs) < bound, value
        rows = [2, 31, 32]  # which no average over the others hides
        for ours, theirs in zip((*got, found[0], found[3]), (*want, true[0], true[3]), strict=True):
            assert relative_error(ours[:, :, rows], theirs[:, :, rows]) < 2 * bound, value


@pytest.mark.parametrize("additive", [False, True])
def test_keys_that_a_whole_tile_hides_are_not_read(additive):
    """Padding behind the text, in front of it and between: no time, no bit, no NaN."""
    args = inputs(70, 330)
    visible = torch.cat([torch.arange(64, 128), torch.arange(256, 300)])
    allowed = torch.zeros(330, dtype=torch.bool)
    allowed[visible] = True
    mask = torch.zeros(330).masked_fill(~allowed, NEVER) if additive else allowed
    kept = [x if i in (0, 3) else x[..., visible, :] for i, x in enumerate(args)]
    hidden = torch.cat([torch.arange(64), torch.arange(128, 256), torch.arange(320, 330)])
    for i in (1, 2, 4, 5):
        args[i][..., hidden, :] = float("nan")
    found = []
    for some, kwargs in ((args, {"attn_mask": mask[None]}), (kept, {})):
        leaves = [x.clone().requires_grad_() for x in some]
        outputs = ops.attention_jvp(*leaves, return_stats=True, impl="native", **kwargs)
        gradients = torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)
        found.append((*outputs, *gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        if i - 4 in (1, 2, 4, 5):
            assert not ours[..., ~allowed, :].any()
            ours = ours[..., visible, :]
        assert relative_error(ours, theirs) < 3e-6


def test_a_mask_of_true_changes_no_bit():
    args = inputs(37, 130)
    plain = ops.attention_jvp(*args, return_stats=True, impl="native")
    for mask in (torch.ones(37, 130, dtype=torch.bool), torch.zeros(1, 1)):
        same = ops.attention_jvp(*args, attn_mask=mask, return_stats=True, impl="native")
        assert all(torch.equal(a, b) for a, b in zip(plain, same, strict=True))


def test_causal_is_a_mask():
    for nq, nk in ((70, 130), (130, 70), (1, 5), (5, 1), (64, 64)):
        args = inputs(nq, nk, directions=2)
        triangle = torch.ones(nq, nk, dtype=torch.bool).tril()
        got = ops.attention_jvp(*args, is_causal=True, return_stats=True, impl="native")
        want = ops.attention_jvp(*args, attn_mask=triangle, return_stats=True, impl="native")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_causal_keys_ahead_are_not_read():
    args = inputs(40, 200)
    for x in (args[1], args[2], args[4], args[5]):
        x[..., 64:, :] = float("nan")  # of a tile that no query sees
    got = ops.attention_jvp(*args, is_causal=True, impl="native")
    assert all(x.isfinite().all() for x in got)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_masks_are_read_where_they_lie(layout, monkeypatch):
    args = inputs(33, 70)
    seen = []
    call = _native.call
    monkeypatch.setattr(_native, "call", lambda op, *a: (seen.append(a), call(op, *a)))
    for shape in ((33, 70), (1, 70), (33, 1), (2, 1, 1, 70), (4, 33, 70), (1,)):
        for mask in (layout(torch.randn(shape)), layout(meets(*shape).byte()).view(torch.bool)):
            t_mask = layout(torch.randn(shape)) if mask.is_floating_point() else None
            check(args, attn_mask=mask, t_attn_mask=t_mask)
            used = seen.pop()
            assert used[6].data_ptr() == mask.data_ptr()
            assert t_mask is None or used[7].data_ptr() == t_mask.data_ptr()
    transposed = layout(torch.randn(70, 33)).mT
    check(args, attn_mask=transposed)
    assert seen.pop()[6].data_ptr() == transposed.data_ptr()


def test_writes_stay_inside():
    args = inputs(35, 70, directions=2)
    lead = (2, 4, 35)
    o, t_o, lse, mu, rest = (
        padded(torch.zeros(shape))
        for shape in ((*lead, 40), (2, *lead, 40), lead, (2, *lead), lead)
    )
    masks = (torch.randn(2, 4, 35, 70), torch.randn(2, 2, 4, 35, 70))
    _native.call("attention_jvp", *args, *masks, None, None, True, o, t_o, lse, mu, rest, 0.2)
    assert all(padding_intact(x) for x in (o, t_o, lse, mu, rest))
    want = reference.attention_jvp(
        *map(double, args), attn_mask=masks[0].double(), t_attn_mask=masks[1].double(),
        is_causal=True, scale=0.2,
    )  # fmt: skip
    for ours, exact in zip((o, t_o, lse, mu), want, strict=True):
        assert relative_error(ours, exact) < 2e-6
    # lse + lse_rest has twice the digits of lse; in them the scores are off, but not as much as lse
    # is: by some units of 2^-24 of their own size, which is about 1.
    assert (lse.double() + rest - want[2]).abs().max() < 2e-6
    assert rest.any()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in DTYPES:
        for name in MASKS:
            check(inputs(35, 70, dtype=dtype), **masked(name, 35, 70, dtype))
        check(inputs(35, 70, directions=3, dtype=dtype), is_causal=True)


def test_threads_do_not_change_a_bit():
    args = inputs(200, 150, batch=1, directions=2)
    offsets = [torch.tensor([0, 3, 120, n]).int() for n in (200, 150)]
    for kwargs in (
        {"attn_mask": meets(200, 150)},
        {"cu_seqlens_q": offsets[0], "cu_seqlens_k": offsets[1], "is_causal": True},
    ):
        torch.set_num_threads(1)
        one = ops.attention_jvp(*args, return_stats=True, impl="native", **kwargs)
        torch.set_num_threads(4)
        many = ops.attention_jvp(*args, return_stats=True, impl="native", **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_no_axis_for_heads():
    args = inputs(20, 33, heads=(1, 1), batch=3, directions=2)
    mask, t_mask = torch.randn(3, 20, 33), torch.randn(2, 1, 20, 33)
    got = ops.attention_jvp(
        *(x.squeeze(-3) for x in args), attn_mask=mask, t_attn_mask=t_mask, impl="native"
    )
    kwargs = {"attn_mask": mask[:, None], "t_attn_mask": t_mask[:, :, None]}
    want = ops.attention_jvp(*args, impl="native", **kwargs)
    assert all(torch.equal(a, b.squeeze(-3)) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", ["causal", "bool", "minus infinity", "sequences"])
def test_opcheck(name):
    args = inputs(9, 12, 8, 16, batch=1, directions=2)
    mask = t_mask = offsets = None
    if name == "bool":
        mask = meets(9, 12).expand(1, 4, 9, 12)
    elif name == "minus infinity":
        mask = torch.randn(1, 12).expand(1, 4, 9, 12)
        t_mask = torch.randn(1, 12).expand(2, 1, 4, 9, 12)
    elif name == "sequences":
        offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
        args[1:3] = [x[..., :9, :] for x in args[1:3]]
        args[4:] = [x[..., :9, :] for x in args[4:]]
    raw = (*args, mask, t_mask, offsets, offsets, name == "causal", 0.3, None, "native")
    torch.library.opcheck(torch.ops.fewstep.attention_jvp.default, raw)


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    args = inputs(9, 9, 8, 16, batch=1, directions=2)
    offsets = torch.tensor([0, 4, 9])
    compiled = torch.compile(ops.attention_jvp, fullgraph=True, backend="aot_eager")
    for kwargs in (
        {"attn_mask": meets(1, 9)},
        {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets, "is_causal": True},
    ):
        want = ops.attention_jvp(*args, **kwargs)
        got = compiled(*args, **kwargs)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for n in (11, 13):  # from the second on sizes are symbolic
        args, mask = inputs(n, n + 2, directions=2), meets(n, n + 2)
        got = compiled(*args, attn_mask=mask)
        assert torch.equal(got[1], ops.attention_jvp(*args, attn_mask=mask)[1])


def offsets_of(*values):
    return torch.tensor(values, dtype=torch.int32)


ROWS = {"cu_seqlens_q": offsets_of(0, 5), "cu_seqlens_k": offsets_of(0, 6)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attn_mask": torch.zeros(5, 7)}, r"attn_mask: expected a shape that broadcasts to"),
        ({"attn_mask": torch.zeros(1, 1, 1, 1, 6)}, r"attn_mask: expected a shape that broadcasts"),
        ({"attn_mask": torch.zeros(5, 6).half()}, r"attn_mask: expected torch\.bool or the dtype"),
        ({"attn_mask": torch.zeros(5, 6).int()}, r"attn_mask: expected torch\.bool or the dtype"),
        ({"attn_mask": torch.zeros(5, 6, device="meta")}, "attn_mask: expected the device of q"),
        ({"attn_mask": torch.zeros(5, 6), "is_causal": True}, "is_causal: expected False where"),
        ({"t_attn_mask": torch.zeros(5, 6)}, "t_attn_mask: expected an additive attn_mask"),
        (
            {"attn_mask": torch.ones(5, 6).bool(), "t_attn_mask": torch.zeros(5, 6)},
            "t_attn_mask: expected an additive attn_mask",
        ),
        (
            {"attn_mask": torch.zeros(5, 6), "t_attn_mask": torch.zeros(5, 6).double()},
            "t_attn_mask: expected the dtype of q",
        ),
        (
            {"attn_mask": torch.zeros(5, 6), "t_attn_mask": torch.zeros(4, 6)},
            "t_attn_mask: expected a shape that broadcasts",
        ),
        (
            {"attn_mask": torch.ones(5, 6).bool(), "t_attn_mask": torch.zeros(5, 6)},
            "t_attn_mask: expected an additive attn_mask beside it, got a boolean one",
        ),
        ({"cu_seqlens_q": offsets_of(0, 5)}, "cu_seqlens_k: expected a tensor"),
        ({**ROWS, "cu_seqlens_q": offsets_of(0, 4)}, "cu_seqlens_q: expected offsets that rise"),
        ({**ROWS, "cu_seqlens_k": offsets_of(1, 6)}, "cu_seqlens_k: expected offsets that rise"),
        ({**ROWS, "cu_seqlens_k": offsets_of(0, 3, 6)}, "cu_seqlens_k: expected as many sequences"),
        ({**ROWS, "cu_seqlens_q": torch.zeros(2)}, "cu_seqlens_q: expected int32"),
        ({**ROWS, "attn_mask": torch.zeros(5, 6)}, "attn_mask: expected None where cu_seqlens_q"),
    ],
)
def test_bad_masks_name_the_argument(kwargs, message):
    args = inputs(5, 6, batch=1)
    with pytest.raises(ValueError, match=message):
        ops.attention_jvp(*args, **kwargs)


def test_bad_directions_name_the_argument():
    args = inputs(5, 6, directions=2)
    with pytest.raises(ValueError, match="t_k: expected the directions of the other tangents, 2"):
        ops.attention_jvp(*args[:4], args[4][:1], args[5])
    with pytest.raises(ValueError, match="t_v: expected the directions of the other tangents, 2"):
        ops.attention_jvp(*args[:5], args[5][0])
    mask = torch.zeros(5, 6)
    with pytest.raises(ValueError, match="t_attn_mask: expected 2 directions in front"):
        ops.attention_jvp(*args, attn_mask=mask, t_attn_mask=torch.zeros(3, 5, 6))
    with pytest.raises(ValueError, match="q: expected batch 1 where cu_seqlens_q is given, got 2"):
        ops.attention_jvp(*args, **ROWS)
    with pytest.raises(ValueError, match="k: expected heads that divide those of q, 4, got 0"):
        ops.attention_jvp(args[0], args[1][:, :0], args[2][:, :0])
