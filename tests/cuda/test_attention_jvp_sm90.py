"""attention_jvp's Hopper kernels, run on the host: tests/cuda/emulation stands in for the chip.

The kernels' own sources are compiled by the C++ compiler against emulated instructions, so control
flow, barriers, descriptors, fragments and masks are those that a GPU will run.
"""

import pytest
import torch

from cuda_emulation import Device, build, call, targets
from fewstep import ops
from fewstep.ops._attention import memory_for_scores, refuse_hopper
from helpers import padded, padding_intact, relative_error

INF = float("inf")


@pytest.fixture(scope="module", params=targets())
def library(request, tmp_path_factory):
    if request.param == "device":
        return Device("attention_jvp")
    return build("attention_jvp", tmp_path_factory.mktemp("emulated"))


def run(
    library,
    inputs,
    *,
    attn_mask=None,
    t_attn_mask=None,
    is_causal=False,
    scale=None,
    score_dtype=None,
    **cu,
):
    """Return (o, t_o, lse, mu, lse_rest) as the kernels compute them."""
    q, k, v, *tangents = inputs
    pairs = (*q.shape[:3], k.shape[2])
    o = padded(torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype), 64)
    t_o = padded(torch.empty_like(o)[None], 64)
    lse = padded(torch.empty(q.shape[:3]), 64)
    mu = padded(torch.empty(1, *q.shape[:3]), 64)
    additive = attn_mask is not None and attn_mask.dtype != torch.bool
    rest = padded(torch.empty_like(lse), 64) if additive else None
    tensors = [q, k, v, *(None if x is None else x[None] for x in tangents)]
    tensors += [None] * (6 - len(tensors))
    tensors += [None if attn_mask is None else attn_mask.expand(pairs)]
    tensors += [None if t_attn_mask is None else t_attn_mask.expand(1, *pairs)]
    tensors += [cu.get("cu_seqlens_q"), cu.get("cu_seqlens_k"), o, t_o, lse, mu, rest]
    memory = memory_for_scores(q, k, v, tensors[4], score_dtype)
    tensors += [None if x is None else padded(x, 64) for x in memory]
    call(library, tensors, is_causal, q.shape[-1] ** -0.5 if scale is None else scale)
    assert all(padding_intact(x, 64) for x in (o, t_o, lse, mu, rest) if x is not None)
    return o, t_o[0], lse, mu[0], rest


def check(library, inputs, **options):
    """Compare with the float64 reference."""
    *got, rest = run(library, inputs, **options)
    wide = [None if x is None else x.double() for x in inputs]
    wide_options = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in options.items()
    }
    want = ops.attention_jvp(*wide, **wide_options, return_stats=True, impl="reference")
    # P, H and the result are rounded once each, as in the gate; statistics are float32 sums.
    bound = 0.75 * torch.finfo(inputs[0].dtype).eps
    for name, a, b in zip(("o", "t_o", "lse", "mu"), got, want, strict=True):
        finite = b.isfinite()
        assert torch.equal(a.isfinite(), finite), name
        assert relative_error(a[finite], b[finite]) < bound, name
    assert rest is None or rest.abs().max() < torch.finfo(torch.float32).max
    return got


def draw(nq, nk, d, dv=None, *, b=1, h=1, g=None, dtype=torch.bfloat16):
    """Return (q, k, v, t_q, t_k, t_v), each in the middle of NaN."""
    torch.manual_seed(0)
    dv, g = dv or d, g or h
    shapes = [(b, h, nq, d), (b, g, nk, d), (b, g, nk, dv)] * 2
    return [padded(torch.randn(shape).to(dtype), 64) for shape in shapes]


@pytest.mark.parametrize("d", [8, 40, 48, 64, 72, 80, 96, 104, 112, 128, 136, 160, 192, 256])
def test_head_dims(library, d):
    check(library, draw(33, 131, d))


@pytest.mark.parametrize("d", [64, 72, 112, 128, 160, 256])
def test_static_keys_and_values(library, d):
    check(library, [*draw(33, 260, d)[:4], None, None])


@pytest.mark.parametrize(
    ("d", "dv"), [(72, 40), (40, 104), (128, 8), (160, 40), (64, 136), (192, 128)]
)
def test_head_dims_that_differ(library, d, dv):
    check(library, draw(40, 150, d, dv))


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (128, 256), (129, 128), (300, 97), (5, 0)])
@pytest.mark.parametrize("d", [64, 128, 160, 256])
def test_lengths(library, nq, nk, d):
    check(library, draw(nq, nk, d))


@pytest.mark.parametrize(("nk", "d"), [(1500, 64), (800, 160), (500, 256)])
@pytest.mark.parametrize("is_static", [False, True])
def test_many_tiles_reuse_the_slots(library, nk, d, is_static):
    inputs = draw(20, nk, d)
    check(library, [*inputs[:4], None, None] if is_static else inputs)


@pytest.mark.parametrize("d", [64, 128, 160, 256])
def test_float16(library, d):
    check(library, draw(40, 150, d, dtype=torch.float16))


@pytest.mark.parametrize("d", [64, 160])
def test_shared_heads(library, d):
    check(library, draw(20, 150, d, b=2, h=4, g=2))


@pytest.mark.parametrize("d", [64, 136])
def test_strides(library, d):
    inputs = draw(37, 200, d, b=2, h=3)
    check(library, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs])
    check(library, [x[:, :1].expand(x.shape) for x in inputs])


@pytest.mark.parametrize(("nq", "nk"), [(200, 200), (150, 300), (300, 150)])
@pytest.mark.parametrize("d", [64, 128, 160, 256])
def test_causal(library, nq, nk, d):
    check(library, draw(nq, nk, d), is_causal=True)


@pytest.fixture
def visible():
    """A boolean mask; row 3 meets no key, row 4 none for a while."""
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 70, 260) > 0.5
    mask[0, :, 3], mask[:, :, 4, :250] = False, False
    return mask


@pytest.mark.parametrize("d", [40, 128, 256])
def test_boolean_masks(library, visible, d):
    inputs = draw(70, 260, d, b=2, h=2)
    check(library, inputs, attn_mask=visible)
    check(library, inputs, attn_mask=visible[:, :, 4:5])


@pytest.mark.parametrize(
    ("d", "dtype"),
    [(64, torch.bfloat16), (128, torch.bfloat16), (256, torch.bfloat16), (160, torch.float16)],
)
def test_additive_masks(library, visible, d, dtype):
    inputs = draw(70, 260, d, h=2, dtype=dtype)
    bias = torch.randn(70, 260).to(dtype).masked_fill(~visible[0, 0], -INF)
    tangent = torch.randn(2, 70, 260).to(dtype)
    check(library, inputs, attn_mask=bias, t_attn_mask=tangent)
    # Finite, and a row of nothing else.
    least = torch.finfo(dtype).min
    check(library, inputs, attn_mask=bias.masked_fill(~visible[0, 0], least))
    check(library, [*inputs[:4], None, None], attn_mask=bias)


@pytest.mark.parametrize("d", [64, 160])
def test_a_negative_scale(library, d):
    check(library, draw(70, 260, d), scale=-0.2)


@pytest.mark.parametrize("d", [64, 160, 256])
@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(library, is_causal, d):
    cu = {"cu_seqlens_q": [0, 5, 5, 140, 150], "cu_seqlens_k": [0, 70, 80, 80, 300]}
    cu = {name: torch.tensor(offsets, dtype=torch.int32) for name, offsets in cu.items()}
    inputs = draw(150, 300, d, h=2)
    got = check(library, inputs, **cu, is_causal=is_causal)
    # What belongs to others is not multiplied, not even by 0: sequence 1 has keys and no queries.
    for i in (1, 2, 4, 5):
        inputs[i][:, :, 70:80] = torch.nan
    again = run(library, inputs, **cu, is_causal=is_causal)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=False))


@pytest.mark.parametrize("d", [64, 160])
def test_offsets_past_the_end_are_cut(library, d):
    """A GPU's offsets are not read by the host: whatever they are, nothing outside is touched."""
    inputs = draw(150, 300, d, h=2)
    cu_q = torch.tensor([-3, 40, 400], dtype=torch.int32)
    cu_k = torch.tensor([0, 90, 1000], dtype=torch.int32)
    got = run(library, inputs, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    cut = torch.tensor([0, 40, 150], dtype=torch.int32), torch.tensor([0, 90, 300]).int()
    want = run(library, inputs, cu_seqlens_q=cut[0], cu_seqlens_k=cut[1])
    assert all(torch.equal(a, b) for a, b in zip(got[:4], want[:4], strict=True))


@pytest.mark.parametrize("d", [128, 160, 256])
def test_what_all_keys_share_cancels(library, d):
    """One vector added to all tangents of keys moves mu and, to rounding, nothing else."""
    q, k, v, t_q, t_k, t_v = draw(70, 300, d, h=2)
    shift = torch.randn(1, 2, 1, d)
    for size in (3, 10, 30):
        check(library, [q, k, v, t_q, (t_k + size * shift).to(t_k.dtype), t_v])


@pytest.mark.parametrize("d", [64, 256])
def test_bits_do_not_depend_on_the_run(library, d):
    inputs = draw(70, 300, d)
    first, second = run(library, inputs), run(library, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


def test_what_does_not_fit_is_refused(library):
    q, k, v, t_q, t_k, t_v = draw(20, 30, 64)
    with pytest.raises(ValueError, match="t_k, t_v: expected both or none"):
        run(library, [q, k, v, t_q, t_k, None])
    with pytest.raises(ValueError, match="head dims up to 256, got 264"):
        run(library, draw(20, 30, 264))
    with pytest.raises(ValueError, match="t_k: expected rows that start at multiples of 16 bytes"):
        run(library, [q, k, v, t_q, t_k[:, :, :1].expand(t_k.shape), t_v])
    with pytest.raises(ValueError, match="v: expected a multiple of 8 columns, got 12"):
        run(library, [q, k, v[..., :12], t_q, t_k, t_v[..., :12]])
    with pytest.raises(ValueError, match="q: expected bfloat16 or float16"):
        run(library, [x.float() for x in (q, k, v, t_q, t_k, t_v)])


def test_auto_knows_what_the_kernel_reads():
    """The reasons of the op agree with the kernel's, so that another implementation is taken."""
    q, k, *_ = draw(20, 30, 64, h=2)
    assert refuse_hopper({"q": q, "k": k, "v": k.mT.contiguous().mT}) is None  # a copy is made
    assert refuse_hopper({"q": torch.zeros(1, 1, 4, 256)}) is None
    # The backward's.
    found = refuse_hopper({"q": torch.zeros(1, 1, 4, 136)}, 128)
    assert found == "q: expected head dims up to 128, got 136"
    rows, expanded = torch.zeros(1, 1, 4, 72).bfloat16(), torch.zeros(1, 1, 1, 64).bfloat16()
    for x, reason in (
        (rows[..., :64], None),
        (rows[..., :68].contiguous()[..., :64], "x: expected rows that start at multiples of 16"),
        (rows[..., 4:68], "x: expected rows that start at multiples of 16"),
        (expanded.expand(1, 1, 4, 64), "x: expected rows of their own"),
        (rows[..., :64].expand(1, 3, 4, 64), None),
    ):
        found = refuse_hopper({"x": x})
        assert found is None if reason is None else found.startswith(reason)


def test_warpgroups_that_take_turns(library, tmp_path):
    """The variant that benchmarks/gpu.sh compares: the same bits, and no deadlock at either end."""
    # Few and small problems: optimising the kernels would take longer than running them does.
    turns = build("attention_jvp", tmp_path, "-O0", "-DFEWSTEP_ATTENTION_JVP_TURNS")
    for nq, nk in ((1, 1), (5, 0), (129, 128), (200, 300), (20, 1500)):
        inputs = draw(nq, nk, 64)
        results = [run(kernels, inputs) for kernels in (library, turns)]
        assert all(torch.equal(a, b) for a, b in zip(*(r[:4] for r in results), strict=True))


SCORE_DTYPES = [torch.int8, torch.float8_e4m3fn]


@pytest.mark.parametrize("score_dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("d", [8, 40, 64, 72, 128])
def test_scores8_head_dims(library, d, score_dtype):
    check(library, draw(33, 260, d), score_dtype=score_dtype)


@pytest.mark.parametrize("score_dtype", SCORE_DTYPES, ids=str)
@pytest.mark.parametrize("d", [64, 128])
def test_scores8_static_keys_and_values(library, d, score_dtype):
    check(library, [*draw(33, 260, d)[:4], None, None], score_dtype=score_dtype)


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (129, 128), (300, 97), (5, 0), (20, 900)])
@pytest.mark.parametrize("d", [64, 128])
def test_scores8_lengths(library, nq, nk, d):
    # Dv to the other side of 64, where it says how wide the operands are.
    check(library, draw(nq, nk, d, 128 if nq == 129 else d), score_dtype=torch.int8)


def test_scores8_float16(library):
    check(library, draw(40, 150, 64, dtype=torch.float16), score_dtype=torch.int8)
    check(library, draw(40, 150, 128, dtype=torch.float16), score_dtype=torch.float8_e4m3fn)


def test_scores8_shared_heads_of_any_size(library):
    """A ratio a for each key head, of all query heads that read it; tokens outside of heads."""
    inputs = [x.transpose(1, 2).contiguous() for x in draw(20, 150, 64, b=2, h=4, g=2)]
    for i, sizes in ((0, [1, 3, 0.1, 1]), (3, [1e-3, 1e-2, 5, 1]), (4, [1e-3, 1])):
        inputs[i] = inputs[i] * torch.tensor(sizes)[:, None]
    inputs = [x.to(torch.bfloat16).transpose(1, 2) for x in inputs]
    check(library, inputs, score_dtype=torch.int8)


@pytest.mark.parametrize("d", [64, 128])
def test_scores8_masks(library, visible, d):
    check(library, draw(150, 300, d), is_causal=True, score_dtype=torch.int8)
    check(library, draw(70, 260, d, b=2, h=2), attn_mask=visible, score_dtype=torch.int8)


def test_scores8_packed_sequences(library):
    cu = {"cu_seqlens_q": [0, 5, 5, 140, 150], "cu_seqlens_k": [0, 70, 80, 80, 300]}
    cu = {name: torch.tensor(offsets, dtype=torch.int32) for name, offsets in cu.items()}
    inputs = draw(150, 300, 64, h=2)
    check(library, inputs, **cu, score_dtype=torch.int8)
    # The centre and the sizes leave them out, and nobody else sees them.
    for i in (1, 2, 4, 5):
        inputs[i][:, :, 70:80] = torch.nan
    got = run(library, inputs, **cu, score_dtype=torch.int8)
    assert all(x.isfinite().all() for x in (got[0], got[1]))


def test_scores8_rows_of_zeros_and_rows_that_are_not_finite(library):
    inputs = draw(40, 150, 64)
    inputs[0][:, :, 3], inputs[3][:, :, 4], inputs[1][:, :, 7], inputs[4] = 0, 0, 0, inputs[4] * 0
    check(library, inputs, score_dtype=torch.int8)
    inputs[0][:, :, 5, 2], inputs[3][:, :, 6, 2] = torch.nan, torch.inf
    got = run(library, inputs, score_dtype=torch.int8)
    rows = torch.arange(40)
    for x in got[:2]:
        assert torch.equal(rows[x[0, 0].isnan().any(-1)], torch.tensor([5, 6]))


def test_scores8_bits_do_not_depend_on_the_run(library):
    inputs = draw(70, 300, 64)
    first, second = (run(library, inputs, score_dtype=torch.int8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("size", [0, 3, 10, 30])
def test_scores8_error_line(library, d, size):
    """Against the exact result: 1.5 % with int8, whatever all keys and their tangents share."""
    inputs = draw(64, 300, d)
    for i in (1, 4):
        inputs[i] = (inputs[i] + size * torch.randn(1, 1, 1, d)).to(torch.bfloat16)
    exact = ops.attention_jvp(*(x.double() for x in inputs), impl="reference")
    for score_dtype, bound in ((torch.int8, 1.5e-2), (torch.float8_e4m3fn, 6e-2)):
        got = run(library, inputs, score_dtype=score_dtype)
        errors = [relative_error(a, b) for a, b in zip(got, exact, strict=False)]
        assert max(errors) < bound, errors


def test_scores8_that_do_not_fit_are_refused(library):
    inputs = draw(20, 30, 64)
    with pytest.raises(ValueError, match="q8: expected head dims up to 128, got 136"):
        run(library, draw(20, 30, 136), score_dtype=torch.int8)
    with pytest.raises(ValueError, match="q8: expected no additive mask and a scale above 0"):
        run(library, inputs, scale=-0.2, score_dtype=torch.int8)
    mask = torch.zeros(20, 30, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="q8: expected no additive mask"):
        run(library, inputs, attn_mask=mask, score_dtype=torch.int8)
