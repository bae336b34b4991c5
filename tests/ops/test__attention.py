"""The Triton kernels of attention_jvp and its backward, on tiles so small that loops turn."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fewstep import ops, reference
from fewstep.ops.attention_jvp_backward import NAMES
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced

pytest.importorskip("triton")
from fewstep.kernels import _attention, attention_jvp, attention_jvp_backward
from fewstep.kernels._common import dot

pytestmark = [pytest.mark.triton, pytest.mark.usefixtures("one_thread")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NEVER = -float("inf")
SCALE = 0.3


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    tiles = _attention.TileConfig(256, 32, 16, 4, 1, chunk=2)
    monkeypatch.setattr(attention_jvp, "choose_config", lambda *args: tiles)
    tiles = _attention.TileConfig(256, 16, 32, 4, 1)
    monkeypatch.setattr(attention_jvp_backward, "choose_config", lambda *args: tiles)


def inputs(
    nq, nk, d=24, dv=40, heads=(2, 1), batch=1, directions=None, dtype=torch.float32, device=None
):
    """q, k, v, t_q, t_k, t_v; `heads` are those of q and of k."""
    shapes = [(batch, heads[0], nq, d), (batch, heads[1], nk, d), (batch, heads[1], nk, dv)]
    lead = () if directions is None else (directions,)
    shapes += [(*lead, *shape) for shape in shapes]
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def offsets(*values):
    return torch.tensor(values, dtype=torch.int32)


def meets(*shape):
    return torch.rand(shape) < 0.6


def additive(nq, nk, dtype, t_shape=None):
    """A mask with a row and a first tile that meet no key, and its tangent."""
    mask = torch.randn(2, nq, nk).masked_fill(~meets(nq, nk), NEVER)
    mask[:, 3] = NEVER
    mask[:, 4, :20] = NEVER
    return {"attn_mask": mask.to(dtype), "t_attn_mask": torch.randn(t_shape or (nq, nk)).to(dtype)}


def boolean(nq, nk):
    mask = meets(nq, nk)
    mask[3], mask[4, :20] = False, False
    return {"attn_mask": mask}


# (Nq, Nk, masking): every kind of masking, ragged and one-element sizes.
CASES = {
    "plain": lambda dtype: (33, 31, {}),
    "one key": lambda dtype: (15, 1, {}),
    "one query": lambda dtype: (1, 33, {}),
    "no key": lambda dtype: (5, 0, {}),
    "causal": lambda dtype: (33, 31, {"is_causal": True}),
    "causal, fewer queries": lambda dtype: (15, 33, {"is_causal": True}),
    "bool": lambda dtype: (33, 31, boolean(33, 31)),
    "bool, keys": lambda dtype: (33, 31, {"attn_mask": meets(1, 1, 1, 31)}),
    "bool, rows": lambda dtype: (33, 31, {"attn_mask": meets(2, 33, 1)}),
    "additive": lambda dtype: (33, 31, additive(33, 31, dtype)),
    "additive, keys": lambda dtype: (33, 31, additive(33, 31, dtype, (1, 31))),
    "sequences": lambda dtype: (
        49,
        60,
        {
            "cu_seqlens_q": offsets(0, 1, 1, 34, 47, 49),
            "cu_seqlens_k": offsets(0, 5, 20, 50, 50, 60),
        },
    ),
    "sequences, causal": lambda dtype: (
        49,
        60,
        {
            "cu_seqlens_q": offsets(0, 33, 34, 34, 47, 49),
            "cu_seqlens_k": offsets(0, 40, 40, 45, 50, 60),
            "is_causal": True,
        },
    ),
}


def double(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def move(kwargs, device):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in kwargs.items()}


def exactly(function, args, kwargs):
    return function(*map(double, args), scale=SCALE, **{k: double(x) for k, x in kwargs.items()})


def check_forward(args, **kwargs):
    got = ops.attention_jvp(*args, return_stats=True, scale=SCALE, impl="triton", **kwargs)
    want = exactly(reference.attention_jvp, args, kwargs)
    # P and H are rounded once to the storage type, and the result once more: three roundings of at
    # most half a unit each. In fp32, sums of some tens of terms.
    bound = 2 * torch.finfo(args[0].dtype).eps
    for name, ours, exact in zip(("o", "t_o", "lse", "mu"), got, want, strict=True):
        ours, exact = torch.broadcast_tensors(ours, exact)  # mu without tangents has no directions
        empty = exact == NEVER
        assert torch.equal(ours == NEVER, empty), name
        limit = bound if name in ("o", "t_o") else 2e-6
        assert relative_error(ours[~empty], exact[~empty]) < limit, name
    return got


def check_backward(args, needs=NAMES, with_d_o=True, with_dt_o=True, d_mu=None, **kwargs):
    """Compare with the oracle; statistics come from the exact forward."""
    o, t_o, lse, mu = exactly(reference.attention_jvp, args, kwargs)
    d_o, dt_o = (torch.randn(o.shape).to(args[0]) for _ in range(2))
    d_o, dt_o = d_o if with_d_o else None, dt_o if with_dt_o else None
    delta0 = None
    delta1 = torch.randn(lse.shape, dtype=torch.float64, device=o.device)
    if with_d_o:
        delta1 = delta1 + (d_o.double() * o).sum(-1)
    if with_dt_o:
        delta1 = delta1 + (dt_o.double() * t_o).sum(-1)
        delta0 = (dt_o.double() * o).sum(-1)
    if d_mu is not None:
        delta0 = (torch.zeros_like(lse) if delta0 is None else delta0) - d_mu
    stats = [None if x is None else x.float() for x in (delta0, delta1, lse, mu)]
    call = (d_o, dt_o, *stats[:2], *args, *stats[2:])
    got = ops.attention_jvp_backward(*call, needs=needs, scale=SCALE, impl="triton", **kwargs)
    want = exactly(reference.attention_jvp_backward, call, kwargs)
    # P, tP, dS0 and dS1 are rounded once, the result once; dS1 and tP are differences of terms
    # larger than they are, and so are their errors in fp32.
    bound = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.3e-3}[args[0].dtype]
    for name, ours, exact in zip(NAMES, got, want, strict=True):
        if name not in needs:
            assert ours.numel() == 0, name
            continue
        assert ours.shape == exact.shape
        assert ours.dtype == args[0].dtype
        # With a single key the gradients of the scores cancel to nothing: the error is then that of
        # the terms, whose elements are of order one.
        size = max(exact.norm(), exact.numel() ** 0.5)
        assert (ours - exact).norm() <= bound * size, name
    return got


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_forward(name, device):
    for dtype in (torch.float32, torch.float16) if device == "cpu" else DTYPES[1:]:
        nq, nk, kwargs = CASES[name](dtype)
        check_forward(inputs(nq, nk, dtype=dtype, device=device), **move(kwargs, device))


@pytest.mark.parametrize("additive", [False, True])
def test_padding_at_both_ends_is_not_read(additive):
    """Of a mask with one row for all queries; one of the heads sees no key at all."""
    args = inputs(20, 200, heads=(3, 1))
    allowed = torch.zeros(1, 3, 1, 200, dtype=torch.bool)
    allowed[:, 0, :, 37:70] = allowed[:, 1, :, 40:135] = True
    allowed[:, :, :, 50:60] = False
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, NEVER) if additive else allowed
    check_forward(args, attn_mask=mask)
    check_backward(args, attn_mask=mask)
    for i in (1, 2, 4, 5):
        args[i][..., :32, :] = args[i][..., 160:, :] = float("nan")
    leaves = [x.clone().requires_grad_() for x in args]
    outputs = ops.attention_jvp(*leaves, attn_mask=mask, impl="triton")
    gradients = torch.autograd.grad(sum(x.sum() for x in outputs), leaves)
    assert all(x.isfinite().all() for x in (*outputs, *gradients))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_backward(name, device):
    for dtype in (torch.float32, torch.float16) if device == "cpu" else DTYPES[1:]:
        nq, nk, kwargs = CASES[name](dtype)
        check_backward(inputs(nq, nk, dtype=dtype, device=device), **move(kwargs, device))


@pytest.mark.parametrize(("d", "dv"), [(8, 8), (72, 40), (40, 128)])
def test_bfloat16_and_head_dims(d, dv):
    args = inputs(17, 33, d, dv, heads=(1, 1), dtype=torch.bfloat16)
    mask = additive(17, 33, torch.bfloat16)["attn_mask"][:1]
    check_forward(args, attn_mask=mask)
    check_backward(args, attn_mask=mask)


def test_backward_in_two_launches_for_wide_heads():
    check_backward(inputs(5, 17, 256, 16, heads=(1, 1)), is_causal=True)


@pytest.mark.parametrize("kept", [(3, 4, 5), (3,), (5,)])
@pytest.mark.parametrize("directions", [1, 2, 3, 5])
def test_directions(directions, kept):
    """Two to a program, one where one is left; each has the bits it has alone."""
    args = inputs(17, 33, directions=directions)
    args = [x if i < 3 or i in kept else None for i, x in enumerate(args)]
    kwargs = additive(17, 33, torch.float32, (directions, 1, 2, 17, 33))
    t_mask = kwargs["t_attn_mask"]
    if kept == (5,):
        t_mask = kwargs.pop("t_attn_mask")[:0]
    got = check_forward(args, **kwargs)

    def run(tangents, **masks):
        kwargs.pop("t_attn_mask", None)
        keywords = {**kwargs, **masks, "return_stats": True, "scale": SCALE, "impl": "triton"}
        return ops.attention_jvp(*args[:3], *tangents, **keywords)

    without = run([None] * 3)
    assert torch.equal(got[0], without[0])
    assert torch.equal(got[2], without[2])
    for r in {0, directions - 1}:
        alone = run(
            [None if x is None else x[r] for x in args[3:]],
            **({"t_attn_mask": t_mask[r]} if len(t_mask) else {}),
        )
        assert torch.equal(got[1][r], alone[1])
        assert torch.equal(got[3][r], alone[3])


class Spy:
    """Stands for a kernel: keeps grids and keywords, and runs it."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((grid, kwargs))
            self.kernel[grid](*args, **kwargs)

        return launch


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("directions", [None, 1, 2, 3, 5])
def test_programs_and_products_of_directions(directions, chunk, monkeypatch):
    """ceil(R / chunk) programs for one tile of queries and keys, 2 products and 4 a direction."""
    spy = Spy(attention_jvp._attention_jvp_fwd_kernel)
    monkeypatch.setattr(attention_jvp, "_attention_jvp_fwd_kernel", spy)
    tiles, products = _attention.TileConfig(256, 32, 16, 4, 1, chunk=chunk), []
    monkeypatch.setattr(attention_jvp, "choose_config", lambda *args: tiles)
    monkeypatch.setattr(attention_jvp, "dot", lambda *args: products.append(1) or dot(*args))
    args = inputs(9, 11, heads=(1, 1), directions=directions)
    check_forward(args if directions else [*args[:3], None, None, None])
    programs = -(-(directions or 1) // chunk)
    assert sum(grid[2] for grid, _ in spy.launches) == programs
    assert sum(grid[2] * kwargs["CHUNK"] for grid, kwargs in spy.launches) == (directions or 1)
    assert len(products) == 2 * programs + 4 * (directions or 0)


def test_narrow_heads_share_the_primal():
    """The tables on a GPU; no tile changes for it, which would change bits."""
    for table in (attention_jvp.CONFIGS_SM90, attention_jvp.COMPARING_SM90):
        assert {x.head_dim: x.chunk for x in table} == {32: 3, 64: 2, 128: 1, 256: 1}


@pytest.mark.parametrize("name", ["causal", "bool", "sequences"])
def test_directions_of_masked_keys(name):
    for dtype in DTYPES[:2]:
        nq, nk, kwargs = CASES[name](dtype)
        check_forward(inputs(nq, nk, directions=3, dtype=dtype), **kwargs)


def test_rows_without_a_key_are_exactly_zero():
    args = inputs(33, 31)
    nothing = torch.zeros(31, dtype=torch.bool).expand(33, 31).clone()
    nothing[5:] = True
    o, t_o, lse, mu = check_forward(args, attn_mask=nothing)
    for out in (o, t_o, mu):
        assert not out[:, :, :5].any()
    assert (lse[:, :, :5] == NEVER).all()
    assert all(torch.isfinite(x).all() for x in check_backward(args, attn_mask=nothing))


@pytest.mark.parametrize("directions", [None, 2])
@pytest.mark.parametrize("value", [-1e6, -1e9, torch.finfo(torch.float32).min])
def test_rows_of_large_finite_masks_and_their_gradients(value, directions):
    """As the other implementations: a row that holds nothing else is no row without keys.

    Scores near -1e6 are multiples of 1/16. With a scale that is a power of two the division of the
    mask is exact, and the interpreter rounds them where the other implementations do.
    """
    args = inputs(20, 33, directions=directions)
    mask = torch.zeros(20, 33)
    mask[2], mask[17], mask[5, :20] = value, value, value
    found = []
    for impl in ("triton", "native"):
        leaves = [x.clone().requires_grad_() for x in args]
        outputs = ops.attention_jvp(*leaves, attn_mask=mask, scale=0.25, impl=impl)
        gradients = torch.autograd.grad(sum(x.sin().sum() for x in outputs), leaves)
        found.append((*outputs, *gradients))
    for ours, theirs in zip(*found, strict=True):
        assert relative_error(ours, theirs) < 3e-6


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_masks_bear_any_scale(scale):
    """Masks enter before the scale, divided by it."""
    args = inputs(17, 33)
    for mask in (meets(17, 33), torch.randn(17, 33).masked_fill(~meets(17, 33), NEVER)):
        got = ops.attention_jvp(*args, attn_mask=mask, scale=scale, impl="triton")
        want = reference.attention_jvp(*map(double, args), attn_mask=double(mask), scale=scale)
        for ours, exact in zip(got, want, strict=False):
            assert relative_error(ours, exact) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("directions", [None, 2])
def test_common_mode_costs_no_accuracy_behind_a_mask(dtype, directions):
    """Where the first tiles are masked, the mean that is taken off comes from a later one."""
    mask = torch.ones(17, 65, dtype=torch.bool)
    mask[:, :40] = False
    errors = []
    for sigmas in (0, 30):
        torch.manual_seed(0)
        args = inputs(17, 65, directions=directions)
        args[4] += sigmas * torch.randn(24)
        args = [x.to(dtype) for x in args]
        t_o = ops.attention_jvp(*args, attn_mask=mask, impl="triton")[1]
        errors.append(
            relative_error(t_o, reference.attention_jvp(*map(double, args), attn_mask=mask)[1])
        )
    # Without centring the second is ten times the first.
    assert errors[1] < 1.5 * errors[0]


@pytest.mark.parametrize(
    ("absent", "options"),
    [
        ((), {"with_d_o": False}),
        ((), {"with_dt_o": False}),
        ((), {"with_dt_o": False, "d_mu": 0.7}),
        ((), {"with_d_o": False, "with_dt_o": False}),
        ((3, 4, 5), {}),
        ((3, 4, 5), {"with_dt_o": False}),
        ((3,), {}),
        ((4,), {}),
        ((5,), {}),
        ((4, 5), {"needs": ("q", "t_q")}),
    ],
)
def test_backward_of_what_is_there(absent, options):
    args = [None if i in absent else x for i, x in enumerate(inputs(17, 33))]
    check_backward(args, **options)


@pytest.mark.parametrize("needs", [*((name,) for name in NAMES), ("q", "k", "v"), ("k", "t_v")])
def test_backward_of_what_is_needed(needs):
    args = inputs(17, 33)
    check_backward(args, needs=needs)
    check_backward(args, needs=needs, with_dt_o=False)


def test_backward_of_columns():
    """Inputs without unit stride in the last axis; the gradients have it."""
    args = [x.mT.contiguous().mT for x in inputs(17, 33)]
    assert all(x.stride(-1) == 1 for x in check_backward(args))


def test_bits_repeat():
    args = inputs(33, 40, heads=(4, 2), dtype=torch.bfloat16)
    torch.manual_seed(1)
    first = check_backward(args, is_causal=True)
    torch.manual_seed(1)
    again = check_backward(args, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


MASKS = [{}, {"is_causal": True}, "additive", "sequences"]


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_forward_stays_inside(masks):
    """NaN around every input is never read, and nothing around an output is written."""
    args = [padded(x) for x in inputs(33, 31, directions=3)]
    kwargs = masks if isinstance(masks, dict) else _expanded(CASES[masks](torch.float32), 3)
    if masks == "sequences":
        args = [padded(x) for x in inputs(49, 60, directions=3)]
    q, v = args[0], args[2]
    o, t_o = torch.zeros(*q.shape[:3], v.shape[-1]), torch.zeros(3, *q.shape[:3], v.shape[-1])
    stats = (torch.zeros(q.shape[:3]), torch.zeros(3, *q.shape[:3]), torch.zeros(q.shape[:3]))
    masking = _attention.Masks(**kwargs)
    outputs = [padded(x) for x in (o, t_o, *stats)]
    if not masking.additive:
        outputs[4] = None
    attention_jvp.launch_attention_jvp(args[:3], args[3:], masking, outputs, SCALE)
    assert all(x is None or padding_intact(x) for x in outputs)
    want = exactly(reference.attention_jvp, args, kwargs)
    for ours, exact in zip(outputs[:4], want, strict=True):
        empty = exact == NEVER
        assert relative_error(ours[~empty], exact[~empty]) < 2e-6


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_backward_stays_inside(masks):
    args = [padded(x) for x in inputs(33, 31)]
    kwargs = masks if isinstance(masks, dict) else _expanded(CASES[masks](torch.float32), None)
    if masks == "sequences":
        args = [padded(x) for x in inputs(49, 60)]
    q, k, v = args[:3]
    o, _, lse, mu = exactly(reference.attention_jvp, args, kwargs)
    cotangents = [row_sliced(torch.randn(o.shape)) for _ in range(2)]
    rest = torch.rand(lse.shape)
    stats = [padded(x.float()) for x in (lse, mu, rest, *(torch.randn(lse.shape) for _ in "01"))]
    gradients = [padded(torch.zeros_like(x)) for x in (q, k, v, q, k, v)]
    attention_jvp_backward.launch_attention_jvp_backward(
        cotangents, args[:3], args[3:], stats, _attention.Masks(**kwargs), gradients, SCALE
    )
    assert all(padding_intact(x) for x in gradients)
    call = (*cotangents, *stats[3:], *args, *stats[:2])
    want = exactly(reference.attention_jvp_backward, call, {**kwargs, "lse_rest": stats[2]})
    for ours, exact in zip(gradients, want, strict=True):
        assert relative_error(ours, exact) < 2e-6


def _expanded(case, directions):
    """The masking of a case as the launchers take it, NaN around the masks."""
    nq, nk, kwargs = case
    kwargs = dict(kwargs)
    lead = () if directions is None else (directions,)
    if "attn_mask" in kwargs:
        kwargs["attn_mask"] = padded(kwargs["attn_mask"]).expand(1, 2, nq, nk)
        kwargs["t_attn_mask"] = padded(kwargs["t_attn_mask"]).expand(*lead, 1, 2, nq, nk)
    return kwargs


def test_offsets_out_of_range_stay_inside():
    """A GPU kernel can't be asked to check them first; what it writes may be anything."""
    args = [padded(x) for x in inputs(33, 31, heads=(1, 1))]
    bad = (offsets(-7, 12, 90, 3, 33), offsets(5, 1000, -1, 31, 32))
    outputs = [torch.zeros(1, 1, 33, 40), torch.zeros(1, 1, 1, 33, 40)]
    outputs = [padded(x) for x in (*outputs, torch.zeros(1, 1, 33), torch.zeros(1, 1, 1, 33))]
    outputs.append(None)
    directed = [x[None] for x in args[3:]]
    masks = _attention.Masks(None, None, *bad)
    attention_jvp.launch_attention_jvp(args[:3], directed, masks, outputs, SCALE)
    assert all(padding_intact(x) for x in outputs[:4])
    assert not any(x.isnan().any() for x in outputs[:4])


@pytest.mark.slow
def test_compiles_for_hopper():
    """No spills, shared memory that there is, tensor cores; see `_hopper.py`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_hopper.py")), "forward", "backward"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]


def test_a_gpu_says_once_that_the_reference_stores_scores(monkeypatch):
    """Where it is much; the tensors here are faked to be on a GPU."""
    from types import SimpleNamespace

    from fewstep.ops import _attention as shared

    monkeypatch.setattr(shared, "_warned", set())

    def on_gpu(n):
        return SimpleNamespace(
            shape=(1, 24, n, 64), dtype=torch.float32, device=torch.device("cuda")
        )

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for n in (256, 4608, 4608):
            shared.warn_of_scores("attention_jvp", 4, on_gpu(n), on_gpu(n))
        shared.warn_of_scores("attention_jvp", 4, torch.zeros(1, 1, 1, 8), on_gpu(2**30))
    assert len(said) == 1
    assert "float32 tensors on a GPU run on the reference" in str(said[0].message)
    assert "7.6 GiB" in str(said[0].message)
