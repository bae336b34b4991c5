"""attention_jvp: every implementation against the fp64 oracle, and the identities it must obey."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep import _native, ops, reference
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 24, 40, 64, 72, 96, 128, 160, 256]
LENGTHS = [(1, 1), (15, 31), (33, 65), (65, 33), (129, 64), (1, 200)]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def inputs(nq, nk, d, dv=None, dtype=torch.float32, device=None, lead=(2, 3)):
    """q, k, v, t_q, t_k, t_v."""
    shapes = [(*lead, nq, d), (*lead, nk, d), (*lead, nk, dv or d)] * 2
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def double(args):
    return [None if x is None else x.double() for x in args]


def torch_jvp(args, scale=None):
    """What users have today: forward mode through unfused SDPA, in the dtype of `args`."""
    primals = tuple(args[:3])
    tangents = tuple(
        torch.zeros_like(p) if t is None else t for p, t in zip(primals, args[3:], strict=True)
    )
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale), primals, tangents
        )


def check(args, impl, scale=None):
    """Compare with the oracle; the budget is the error of plain torch in the same precision."""
    got = ops.attention_jvp(*args, scale=scale, return_stats=True, impl=impl)
    want = reference.attention_jvp(*double(args), scale=scale)
    plain = torch_jvp(args, scale)
    q, v = args[0], args[2]
    # Twice: in fp32 the two sum in another order, and in 16 bits P and H are rounded here where S
    # is there. Some units: a short sum may come out exact in one and be rounded in the other; in
    # fp64 the oracle itself is off by as much as they are.
    slack = (8 if q.dtype == torch.float64 else 2) * torch.finfo(q.dtype).eps
    for name, ours, theirs, exact in zip(("o", "t_o"), got, plain, want, strict=False):
        assert ours.shape == (*q.shape[:-1], v.shape[-1]), name
        assert ours.dtype == q.dtype, name
        assert relative_error(ours, exact) < 2 * relative_error(theirs, exact) + slack, name
    # A score is a dot product in fp32 of inputs taken as exact: D <= 256 terms of random sign leave
    # about sqrt(256) 2^-24 = 1e-6 of its size. fp64 inputs: the same in units of 2^-53.
    bound = 1e-5 if q.dtype != torch.float64 else 1e-13
    for name, ours, exact in zip(("lse", "mu"), got[2:], want[2:], strict=True):
        assert ours.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32), name
        assert (ours - exact).abs().max() <= bound * (1 + exact.abs().max()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, device):
    for nq, nk in LENGTHS:
        check(inputs(nq, nk, 40, 24, dtype=dtype, device=device, lead=(1, 2)), "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_native_matches_oracle(d, dtype):
    for nq, nk in LENGTHS:
        check(inputs(nq, nk, d, dtype=dtype, lead=(1, 2)), "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("nq", "nk", "d", "dv"),
    [(1, 1, 8, 8), (15, 31, 24, 24), (33, 129, 40, 64), (65, 130, 64, 72), (130, 33, 128, 96)],
)
@pytest.mark.triton
def test_triton_matches_oracle(nq, nk, d, dv, dtype, device):
    check(inputs(nq, nk, d, dv, dtype=dtype, device=device, lead=(1, 2)), "triton")


@pytest.mark.parametrize("d", [160, 256])
@pytest.mark.triton
def test_triton_wide_heads(d):
    check(inputs(17, 40, d, dtype=torch.float16, lead=(1, 1)), "triton")


def test_oracle_is_the_derivative():
    """The hand-written tangent is what torch's forward mode gives in fp64."""
    args = double(inputs(19, 40, 24, 16))
    for got, want in zip(reference.attention_jvp(*args)[:2], torch_jvp(args), strict=True):
        assert relative_error(got, want) < 1e-14


def test_oracle_is_the_limit_of_finite_differences():
    args = double(inputs(7, 20, 16))
    primals, tangents = args[:3], args[3:]

    def o(eps):
        moved = [x + eps * t for x, t in zip(primals, tangents, strict=True)]
        return reference.attention_jvp(*moved)[0]

    # Richardson on central differences: error of order eps^4 and rounding of 2^-52 / eps.
    slopes = [(o(eps) - o(-eps)) / (2 * eps) for eps in (2e-3, 1e-3)]
    limit = (4 * slopes[1] - slopes[0]) / 3
    assert relative_error(reference.attention_jvp(*args)[1], limit) < 1e-9


@pytest.mark.parametrize("absent", range(8))
def test_absent_tangents_are_zero(absent, impl):
    args = inputs(33, 70, 40, 24, lead=(1, 2))
    zeros = list(args)
    for i in range(3):
        if absent >> i & 1:
            args[3 + i] = None
            zeros[3 + i] = torch.zeros_like(zeros[i])
    check(args, impl)
    got = ops.attention_jvp(*args, return_stats=True, impl=impl)
    want = ops.attention_jvp(*zeros, return_stats=True, impl=impl)
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    if absent == 7:
        assert not got[1].any()


def test_zero_tangents_give_exactly_zero(impl):
    q, k, v, *_ = inputs(33, 70, 40)
    tangents = [torch.zeros_like(x) for x in (q, k, v)]
    _, t_o, _, mu = ops.attention_jvp(q, k, v, *tangents, return_stats=True, impl=impl)
    assert not t_o.any()
    assert not mu.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_do_not_change_a_bit_of_the_primal(dtype, impl):
    args = inputs(33, 130, 40, dtype=dtype, lead=(1, 1))
    alone = ops.attention_jvp(*args[:3], return_stats=True, impl=impl)
    for keep in ((3, 4, 5), (3,), (4,), (5,)):
        some = [x if i < 3 or i in keep else None for i, x in enumerate(args)]
        o, _, lse, _ = ops.attention_jvp(*some, return_stats=True, impl=impl)
        assert torch.equal(o, alone[0])
        assert torch.equal(lse, alone[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_linear_in_the_tangents(dtype):
    primals = inputs(33, 70, 40, 24, dtype=dtype)[:3]
    u, w = (inputs(33, 70, 40, 24, dtype=dtype)[3:] for _ in range(2))
    mixed = [2 * a - 3 * b for a, b in zip(u, w, strict=True)]
    t_u, t_w, t_mixed = (ops.attention_jvp(*primals, *t, impl="native")[1] for t in (u, w, mixed))
    # The parts are about three times the sum: three fp errors of some units each.
    assert relative_error(2 * t_u - 3 * t_w, t_mixed) < 40 * torch.finfo(dtype).eps


# Of one stream, and of two that share the attention (text, then a longer image), each of which adds
# a vector of its own to its keys' tangents; the second stream is looked at more.
STREAMS = {"one": ([300], [0.0]), "joint": ([64, 236], [-2.0, 0.0])}


@pytest.mark.parametrize("directions", [None, 2])
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("native", torch.float32)]
    + [(impl, dtype) for impl in KERNELS for dtype in (torch.bfloat16, torch.float16)],
    ids=str,
)
def test_common_mode_of_the_keys_costs_no_accuracy(impl, dtype, streams, directions):
    """A vector added to every key's tangent moves all scores of a row alike and must cancel."""
    args = inputs(64, 300, 64, lead=(1, 1))
    if directions is not None:
        args[3:] = [torch.randn(directions, *x.shape) for x in args[3:]]
    lengths, logits = STREAMS[streams]
    shift = torch.cat([torch.randn(64).expand(n, 64) for n in lengths])
    kwargs = {"scale": 0.125}
    if streams == "joint":
        mask = torch.cat([torch.full((n,), x) for n, x in zip(lengths, logits, strict=True)])
        kwargs["attn_mask"] = mask[None].to(dtype)
    errors = []
    for sigmas in (0, 3, 10, 30):
        low = [x.to(dtype) for x in args]
        low[4] = (args[4] + sigmas * shift).to(dtype)
        _, t_o = ops.attention_jvp(*low, impl=impl, **kwargs)
        exact = reference.attention_jvp(
            *double(low), **{k: v.double() if k == "attn_mask" else v for k, v in kwargs.items()}
        )
        errors.append(relative_error(t_o, exact[1]))
    # Inputs are compared after rounding. In 16 bits t_o is rounded once, H and P once each: sqrt(3)
    # halves of a unit at most. One vector for all keys can't centre two streams: in float32 the
    # scores of the smaller one stay large and are rounded so. Without centring the last error is
    # ten times the first.
    assert max(errors) < (1.3 if streams == "one" else 2) * errors[0], errors
    assert max(errors) < (2e-6 if dtype == torch.float32 else torch.finfo(dtype).eps), errors


def test_a_vector_added_to_every_keys_tangent_changes_nothing():
    args = inputs(20, 70, 16, dtype=torch.float64)
    shifted = list(args)
    shifted[4] = args[4] + 5 * torch.randn(16, dtype=torch.float64)
    got, want = (ops.attention_jvp(*a, impl="native")[1] for a in (shifted, args))
    assert relative_error(got, want) < 1e-13


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits(dtype, kernel):
    # Scores of about +-200, whose maximum comes late: rows are nearly one-hot, and what the first
    # tiles gave is scaled away by exp(-100) or less.
    args = inputs(33, 200, 40, dtype=dtype, lead=(1, 2))
    args[1][..., -1, :] *= 2
    check(args, kernel, scale=8.0)


def test_large_and_small_tangents(kernel):
    for size in (1e-20, 1e10):
        args = inputs(33, 70, 40)
        check([*args[:3], *(size * t for t in args[3:])], kernel)


def test_order_of_the_keys_does_not_matter():
    args = inputs(20, 131, 24, dtype=torch.float64)
    order = torch.randperm(131)
    moved = [x if i in (0, 3) else x[..., order, :] for i, x in enumerate(args)]
    got = ops.attention_jvp(*moved, return_stats=True, impl="native")
    want = ops.attention_jvp(*args, return_stats=True, impl="native")
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-13


_PEAK = """
import resource, sys, torch
from fewstep import ops
torch.set_num_threads(1)
backward = sys.argv[1] == "backward"
args = [torch.randn(1, 1, {rows}, 8).requires_grad_(backward) for _ in range(6)]
def run(args):
    o, t_o = ops.attention_jvp(*args, impl="native")
    if backward:
        torch.autograd.grad((o, t_o), args, (torch.ones_like(o), torch.ones_like(o)))
run([x[:, :, :64].detach().requires_grad_(backward) for x in args])  # what is loaded once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(args)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_no_matrix_of_scores_is_stored(way):
    """The peak of a process of its own: outputs and 8 bytes per row and head, not Nq x Nk."""
    rows = 4000
    script = _PEAK.replace("{rows}", str(rows))
    child = subprocess.run(
        [sys.executable, "-c", script, way], capture_output=True, text=True, check=True
    )
    grown = int(child.stdout) * 1024
    outputs = rows * (2 * 8 * 4 + 8)
    if way == "backward":
        # Six gradients, two cotangents, two row sums, and d_q once more per range of 1024 keys,
        # which are summed in order.
        outputs += rows * ((6 + 2 + 2 * 6) * 8 * 4 + 8)
    # Beside them the scratch of one thread and the allocator's pages; the scores alone are 64 MB.
    assert grown < outputs + 6 * 2**20
    assert outputs + 6 * 2**20 < rows * rows * 4 / 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_inside_tokens_are_read_in_place(dtype, impl, monkeypatch):
    def refuse(self):
        raise AssertionError("copied")

    shapes = [(2, 33, 2, 40), (2, 65, 2, 40), (2, 65, 2, 24)] * 2
    args = [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
    if impl != "reference":
        monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    o, t_o = ops.attention_jvp(*args, impl=impl)
    monkeypatch.undo()
    for out in (o, t_o):
        assert out.transpose(1, 2).is_contiguous()
    check(args, impl)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    check([layout(x) for x in inputs(19, 70, 24, 40)], impl)


def test_each_tensor_has_its_own_strides(impl):
    layouts = (padded, row_sliced, padded, strided, padded, row_sliced)
    args = [layout(x) for layout, x in zip(layouts, inputs(19, 70, 24, 40), strict=True)]
    check(args, impl)


def test_writes_stay_inside(kernel):
    args = inputs(35, 70, 24, 40)
    outputs = [padded(torch.zeros(2, 3, 35, 40)) for _ in range(2)]
    outputs += [padded(torch.zeros(2, 3, 35)) for _ in range(2)]
    if kernel == "native":
        o, t_o, lse, mu = outputs
        directed = [x[None] for x in args[3:]]
        masking = (None, None, None, None, False)
        _native.call(
            "attention_jvp", *args[:3], *directed, *masking, o, t_o[None], lse, mu[None], None, 0.2
        )
    else:
        from fewstep.kernels._attention import Masks
        from fewstep.kernels.attention_jvp import launch_attention_jvp

        o, t_o, lse, mu = outputs
        directed = [x[None] for x in args[3:]]
        outs = (o, t_o[None], lse, mu[None], None)
        launch_attention_jvp(args[:3], directed, Masks(), outs, 0.2)
    assert all(padding_intact(x) for x in outputs)
    want = reference.attention_jvp(*double(args), scale=0.2)
    for ours, exact in zip(outputs, want, strict=True):
        assert relative_error(ours, exact) < 2e-6


def test_no_axis_for_heads(impl):
    check(inputs(20, 33, 16, 24, lead=(3,)), impl)


def test_empty(impl):
    for lead, nq, nk in (((0, 2), 5, 6), ((2, 0), 5, 6), ((2, 2), 0, 6)):
        args = inputs(nq, nk, 16, 24, lead=lead)
        o, t_o, lse, mu = ops.attention_jvp(*args, return_stats=True, impl=impl)
        assert o.shape == t_o.shape == (*lead, nq, 24)
        assert lse.shape == mu.shape == (*lead, nq)
    args = inputs(5, 0, 16, 24)
    o, t_o, lse, mu = ops.attention_jvp(*args, return_stats=True, impl=impl)
    for out in (o, t_o, mu):
        assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(lse, torch.full_like(lse, -float("inf")))


def test_a_row_does_not_see_the_others(kernel):
    args = inputs(70, 65, 24)
    whole = ops.attention_jvp(*args, return_stats=True, impl=kernel)
    some = [x[1:2, 2:3, 40:41] if i in (0, 3) else x[1:2, 2:3] for i, x in enumerate(args)]
    alone = ops.attention_jvp(*some, return_stats=True, impl=kernel)
    for one, all_rows in zip(alone, whole, strict=True):
        # The interpreter multiplies with a BLAS that may choose by shape; the kernels don't.
        same = all_rows[1:2, 2:3, 40:41]
        assert torch.equal(one, same) if kernel == "native" else relative_error(one, same) < 1e-6


def test_nan_and_infinity_come_through(kernel):
    args = inputs(20, 70, 16)
    args[0][0, 0, 3, 5] = float("nan")
    args[1][1, 2, 50, 4] = float("inf")
    got = ops.attention_jvp(*args, impl=kernel)
    want = reference.attention_jvp(*args)
    for ours, theirs in zip(got, want, strict=False):
        assert torch.equal(ours.isnan(), theirs.isnan())


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        for nq, nk, d, dv in ((1, 1, 8, 8), (33, 70, 40, 24), (20, 129, 72, 256)):
            args = inputs(nq, nk, d, dv, dtype=dtype, lead=(1, 2))
            check(args, "native")
            check([*args[:4], None, None], "native")
            check([*args[:3], None, args[4], None], "native")


def test_threads_do_not_change_a_bit():
    args = inputs(200, 150, 40)
    one = ops.attention_jvp(*args, return_stats=True, impl="native")
    torch.set_num_threads(4)
    many = ops.attention_jvp(*args, return_stats=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def raw_arguments(args):
    """The arguments of the registered op: tangents have an axis of directions, masks follow."""
    directed = [None if x is None else x[None] for x in args[3:]]
    return (*args[:3], *directed, None, None, None, None, False, 0.3, None, "native")


@pytest.mark.parametrize("tangents", [(3, 4, 5), (3,), ()])
def test_opcheck(tangents):
    args = [x if i < 3 or i in tangents else None for i, x in enumerate(inputs(9, 12, 8, 16))]
    op = torch.ops.fewstep.attention_jvp.default
    torch.library.opcheck(op, raw_arguments(args))
    # Heads inside tokens: the fake must foresee that the outputs follow.
    inside = [None if x is None else x.transpose(1, 2).contiguous().transpose(1, 2) for x in args]
    torch.library.opcheck(op, raw_arguments(inside))


@pytest.mark.parametrize("tangents", [(3, 4, 5), (3,)])
def test_compiles_without_graph_break(tangents):
    args = [x if i < 3 or i in tangents else None for i, x in enumerate(inputs(9, 12, 8, 16))]
    compiled = torch.compile(ops.attention_jvp, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), ops.attention_jvp(*args), strict=True):
        assert torch.equal(got, want)


WRONG_KIND = {
    "q": ([1.0], "q: expected a tensor, got list"),
    "k": (None, "k: expected a tensor, got None"),
    "t_q": (1.0, "t_q: expected a tensor or None, got float"),
    "attn_mask": ([1], "attn_mask: expected a tensor or None, got list"),
    "t_attn_mask": (0.5, "t_attn_mask: expected a tensor or None, got float"),
    "cu_seqlens_q": ([0, 5], "cu_seqlens_q: expected a tensor or None, got list"),
    "scale": ("a", "scale: expected a number, got str"),
    "is_causal": (torch.tensor(True), "is_causal: expected True or False, got Tensor"),
}


@pytest.mark.parametrize("name", WRONG_KIND)
def test_arguments_of_the_wrong_kind_are_named(name):
    value, message = WRONG_KIND[name]
    good = dict(zip(("q", "k", "v", "t_q", "t_k", "t_v"), inputs(5, 6, 16), strict=True))
    with pytest.raises(TypeError, match=message):
        ops.attention_jvp(**{**good, name: value})


def test_no_direction_at_all():
    q, k, v, t_q, *_ = inputs(5, 6, 16)
    mask = torch.zeros(5, 6)
    _, t_o = ops.attention_jvp(q, k, v, t_q[None][:0], attn_mask=mask, t_attn_mask=mask[None][:0])
    assert t_o.shape == (0, *q.shape)


def test_explain_looks_for_a_tensor():
    q, k, v, *_ = inputs(5, 6, 16)
    said = ops.explain("attention_jvp_backward", None, None, None, q[..., 0], q, k, v)
    assert said.choice == "native"
    with pytest.raises(TypeError, match="expected at least one tensor"):
        ops.explain("attention_jvp_backward", None)


def test_bad_input_names_the_argument():
    q, k, v, t_q, t_k, t_v = inputs(5, 6, 16, 24)
    call = ops.attention_jvp
    with pytest.raises(ValueError, match=r"q: expected a head dim that is a multiple of 8.*got 12"):
        call(q[..., :12], k[..., :12], v)
    with pytest.raises(ValueError, match=r"v: expected a head dim.*from 8 to 256, got 264"):
        call(q, k, torch.randn(2, 3, 6, 264))
    with pytest.raises(ValueError, match="k: expected the head dim of q, 16, got 8"):
        call(q, k[..., :8], v)
    with pytest.raises(ValueError, match="v: expected as many rows as k, 6, got 5"):
        call(q, k, v[..., :5, :])
    with pytest.raises(ValueError, match="k: expected the batch of q, 2, got 1"):
        call(q, k[:1], v)
    with pytest.raises(ValueError, match="k: expected heads that divide those of q, 3, got 2"):
        call(q, k[:, :2], v)
    with pytest.raises(ValueError, match="v: expected the heads of k, 3, got 1"):
        call(q, k, v[:, :1])
    with pytest.raises(ValueError, match=r"t_k: expected the shape of k, \(2, 3, 6, 16\), or one"):
        call(q, k, v, t_q, t_k[..., :5, :], t_v)
    with pytest.raises(ValueError, match=r"t_v: expected the dtype of q, torch\.float32, got"):
        call(q, k, v, t_q, t_k, t_v.half())
    with pytest.raises(ValueError, match=r"q: expected \[B, H, N, D\] or \[B, N, D\], got shape"):
        call(q[0, 0], k[0, 0], v[0, 0])
    with pytest.raises(ValueError, match="v: expected 4 axes as q has, got 3"):
        call(q, k, v[0])
    with pytest.raises(ValueError, match="q: expected a floating dtype"):
        call(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match="impl: expected one of"):
        call(q, k, v, impl="cuda")
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        call(q.double(), k.double(), v.double(), impl="triton")
