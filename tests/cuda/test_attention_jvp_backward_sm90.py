"""attention_jvp_backward's Hopper kernels, run on the host; see test_attention_jvp_sm90.py."""

import pytest
import torch

from cuda_emulation import Device, build, call, targets
from fewstep import ops
from helpers import padded, padding_intact, relative_error

OP = ops.module("attention_jvp_backward")
NAMES = OP.NAMES


@pytest.fixture(scope="module", params=targets())
def library(request, tmp_path_factory):
    if request.param == "device":
        return Device("attention_jvp_backward")
    return build("attention_jvp_backward", tmp_path_factory.mktemp("emulated"))


def draw(nq, nk, d, dv=None, *, b=1, h=1, g=None, dtype=torch.bfloat16):
    """Return [q, k, v, t_q, t_k, t_v] and [d_o, dt_o], each in the middle of NaN."""
    torch.manual_seed(0)
    dv, g = dv or d, g or h
    shapes = [(b, h, nq, d), (b, g, nk, d), (b, g, nk, dv)] * 2 + [(b, h, nq, dv)] * 2
    tensors = [padded(torch.randn(shape).to(dtype), 64) for shape in shapes]
    return tensors[:6], tensors[6:]


def run(library, inputs, cotangents, stats, needs=NAMES, deterministic=True, **kw):
    """Return the gradients asked for, as the kernels compute them; None for the others."""
    q, k, v, *_ = inputs
    out = [
        padded(torch.empty_like(x), 64) if name in needs else None
        for name, x in zip(NAMES, (q, k, v) * 2, strict=True)
    ]
    delta0, delta1, lse, mu = (x.float().contiguous() for x in stats)
    masks = [kw.get("attn_mask"), kw.get("t_attn_mask")]
    masks = [None if x is None else x.expand(*q.shape[:3], k.shape[2]) for x in masks]
    masking = [*masks, kw.get("cu_seqlens_q"), kw.get("cu_seqlens_k")]
    sums = None if deterministic else OP._query_sums(q, inputs[2], kw.get("cu_seqlens_q"))
    tensors = [
        *cotangents,
        delta0,
        delta1,
        *inputs,
        lse,
        mu,
        kw.get("lse_rest"),
        *masking,
        *out,
        sums,
    ]
    scale = kw.get("scale", q.shape[-1] ** -0.5)
    call(library, tensors, kw.get("is_causal", False), scale)
    assert all(padding_intact(x, 64) for x in out if x is not None)
    return out


def check(library, inputs, cotangents, deterministic=True, **options):
    """Compare with the float64 reference; return the gradients and the statistics."""
    additive = options.get("attn_mask", torch.tensor(True)).dtype != torch.bool
    wide = [x if x is None else x.double() for x in inputs]
    d_o, dt_o = (x.double() for x in cotangents)
    exact = {k: x.double() if additive and "mask" in k else x for k, x in options.items()}
    o, t_o, lse, mu = ops.attention_jvp(*wide, **exact, return_stats=True, impl="reference")
    delta0, delta1 = (dt_o * o).sum(-1), (d_o * o + dt_o * t_o).sum(-1)
    want = ops.attention_jvp_backward(
        d_o, dt_o, delta0, delta1, *wide, lse, mu, **exact, impl="reference"
    )
    if additive:  # what the rounding to float32 takes from lse
        options["lse_rest"] = torch.nan_to_num(lse - lse.float().double()).float()
    stats = (delta0, delta1, lse, mu)
    got = run(library, inputs, cotangents, stats, deterministic=deterministic, **options)
    # The gate's bound: P, tP, dS0, dS1 and the result are rounded once each, and two of them are
    # differences.
    bound = 1.3 * torch.finfo(inputs[0].dtype).eps
    for name, a, b in zip(("d_q", "d_k", "d_v", "dt_q", "dt_k", "dt_v"), got, want, strict=True):
        assert relative_error(a, b) < bound, name
    return got, stats


@pytest.mark.parametrize("d", [8, 40, 64, 72, 128])
def test_head_dims(library, d):
    check(library, *draw(70, 131, d))


@pytest.mark.parametrize(("d", "dv"), [(72, 40), (40, 104)])
def test_head_dims_that_differ(library, d, dv):
    check(library, *draw(40, 90, d, dv))


@pytest.mark.parametrize(("nq", "nk"), [(1, 3), (128, 256), (129, 128), (300, 97), (20, 900)])
@pytest.mark.parametrize("d", [64, 128])
def test_lengths(library, nq, nk, d):
    check(library, *draw(nq, nk, d))


@pytest.mark.parametrize(("nq", "nk"), [(5, 0), (0, 5)])
def test_nothing_to_sum(library, nq, nk):
    got, _ = check(library, *draw(nq, nk, 64))
    assert not any(x.any() for x in got)


def test_float16(library):
    check(library, *draw(70, 150, 64, dtype=torch.float16))
    check(library, *draw(70, 150, 128, dtype=torch.float16))


def test_shared_heads(library):
    check(library, *draw(70, 90, 64, b=2, h=4, g=2))


@pytest.mark.parametrize(("nq", "nk"), [(200, 200), (150, 300), (300, 150)])
@pytest.mark.parametrize("d", [64, 128])
def test_causal(library, nq, nk, d):
    check(library, *draw(nq, nk, d), is_causal=True)


@pytest.mark.parametrize("d", [40, 128])
def test_boolean_masks(library, d):
    torch.manual_seed(1)
    mask = torch.rand(2, 1, 70, 260) > 0.5
    mask[0, :, 3], mask[:, :, 4, :250] = False, False
    check(library, *draw(70, 260, d, b=2, h=2), attn_mask=mask)


def test_a_negative_scale(library):
    check(library, *draw(70, 90, 64), scale=-0.2)


@pytest.mark.parametrize("is_causal", [False, True])
def test_packed_sequences(library, is_causal):
    cu = {"cu_seqlens_q": [0, 5, 5, 140, 150], "cu_seqlens_k": [0, 70, 80, 80, 300]}
    cu = {name: torch.tensor(offsets, dtype=torch.int32) for name, offsets in cu.items()}
    inputs, cotangents = draw(150, 300, 64, h=2)
    got, stats = check(library, inputs, cotangents, **cu, is_causal=is_causal)
    # What belongs to others is not multiplied, not even by 0: sequence 1 has keys and no queries,
    # sequence 2 queries and no keys.
    for i in (1, 2, 4, 5):
        inputs[i][:, :, 70:80] = torch.nan
    for x in (inputs[0], inputs[3], *cotangents):
        x[:, :, 5:140] = torch.nan
    again = run(library, inputs, cotangents, stats, **cu, is_causal=is_causal)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_only_what_is_wanted_is_computed(library):
    inputs, cotangents = draw(70, 150, 64)
    got, stats = check(library, inputs, cotangents)
    for i, name in enumerate(NAMES):
        some = run(library, inputs, cotangents, stats, needs=(name,))
        assert torch.equal(some[i], got[i])
        assert [x is None for x in some].count(False) == 1


def test_bits_do_not_depend_on_the_run(library):
    inputs, cotangents = draw(70, 300, 128, h=2)
    got, stats = check(library, inputs, cotangents)
    again = run(library, inputs, cotangents, stats)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float16), (104, torch.bfloat16)])
def test_keys_and_values_without_tangents(library, d, dtype):
    def static(*shape, **kw):
        inputs, cotangents = draw(*shape, dtype=dtype, **kw)
        return [*inputs[:4], None, None], cotangents

    inputs, cotangents = static(70, 130, d, h=2, g=1)
    got, stats = check(library, inputs, cotangents)
    # The form with sums in any order is for tangents of keys.
    again = run(library, inputs, cotangents, stats, deterministic=False)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    check(library, *static(100, 70, d), is_causal=True)
    cu = {"cu_seqlens_q": [0, 5, 5, 140, 150], "cu_seqlens_k": [0, 70, 80, 80, 100]}
    cu = {name: torch.tensor(offsets, dtype=torch.int32) for name, offsets in cu.items()}
    check(library, *static(150, 100, d), **cu)


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (104, torch.float16)])
def test_additive_masks(library, d, dtype):
    """With static keys and values, where prompts are attended to."""
    inputs, cotangents = draw(70, 80, d, b=2, dtype=dtype)
    inputs[4:] = None, None
    mask = torch.randn(2, 1, 1, 80).to(dtype)
    mask[0, ..., 60:] = -torch.inf
    check(library, inputs, cotangents, attn_mask=mask)
    mask = torch.randn(70, 80).to(dtype)
    mask[3], mask[4, 2:] = -torch.inf, -torch.inf
    t_mask = torch.randn(2, 1, 70, 80).to(dtype)
    check(library, inputs, cotangents, attn_mask=mask, t_attn_mask=t_mask)
    allowed = torch.rand(2, 1, 70, 80) > 0.5
    check(library, inputs, cotangents, attn_mask=allowed)


def test_rows_with_nothing_but_large_masks(library):
    """lse of -1e6 is a multiple of 1/16: without lse_rest P would be 3 % off."""
    inputs, cotangents = draw(9, 68, 64)
    inputs[4:] = None, None
    inputs[0].zero_()  # scores that no rounding changes
    check(library, inputs, cotangents, attn_mask=torch.full((9, 68), -1e6).bfloat16())


# Both widths: four sums of 64 columns with those of queries, and two of 128.
@pytest.mark.parametrize(("d", "dtype"), [(40, torch.bfloat16), (128, torch.float16)])
def test_sums_in_any_order(library, d, dtype):
    """Queries' gradients added up by the passes over keys; the keys' own do not change by it."""
    inputs, cotangents = draw(100, 130, d, h=2, g=1, dtype=dtype)
    fused, stats = check(library, inputs, cotangents, deterministic=False)
    got = run(library, inputs, cotangents, stats)
    assert all(torch.equal(fused[i], got[i]) for i in (1, 2, 4, 5))
    some = run(library, inputs, cotangents, stats, needs=("t_q", "k"), deterministic=False)
    assert [x is None for x in some] == [True, False, True, False, True, True]
    assert relative_error(some[3], got[3]) < torch.finfo(dtype).eps
    assert torch.equal(some[1], got[1])
    # Of queries alone nothing is to be shared.
    alone = run(library, inputs, cotangents, stats, needs=("q",), deterministic=False)
    assert torch.equal(alone[0], got[0])


@pytest.mark.parametrize("d", [64, 128])
def test_sums_in_any_order_under_masks(library, d):
    check(library, *draw(100, 140, d), deterministic=False, is_causal=True)
    torch.manual_seed(1)
    mask = torch.rand(70, 140) > 0.5
    mask[3], mask[4, :130] = False, False
    check(library, *draw(70, 140, d), deterministic=False, attn_mask=mask)


@pytest.mark.parametrize("d", [64, 128])
def test_sums_in_any_order_of_packed_sequences(library, d):
    cu = {"cu_seqlens_q": [0, 5, 5, 140, 150], "cu_seqlens_k": [0, 70, 80, 80, 300]}
    cu = {name: torch.tensor(offsets, dtype=torch.int32) for name, offsets in cu.items()}
    check(library, *draw(150, 300, d), deterministic=False, **cu, is_causal=True)


def packed(cu_q, cu_k):
    offsets = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    return {name: torch.tensor(x, dtype=torch.int32) for name, x in offsets.items()}


@pytest.mark.parametrize("d", [64, 128])
def test_sums_in_any_order_leave_out_the_next_sequence(library, d):
    """Where a tile of queries is whole and keys end within a block: the rest of it is hidden."""
    check(library, *draw(150, 140, d), deterministic=False, **packed([0, 100, 150], [0, 70, 140]))
    cu = packed([0, 200, 250], [0, 70, 140])
    check(library, *draw(250, 140, d), deterministic=False, **cu, is_causal=True)


@pytest.mark.parametrize("d", [64, 128])
def test_sums_in_any_order_do_not_read_foreign_keys(library, d):
    """Sequence 1 has keys and no queries; its keys lie in the block of sequence 0's."""
    cu = packed([0, 100, 100, 150], [0, 70, 80, 140])
    inputs, cotangents = draw(150, 140, d)
    got, stats = check(library, inputs, cotangents, deterministic=False, **cu)
    for i in (1, 2, 4, 5):
        inputs[i][:, :, 70:80] = torch.nan
    again = run(library, inputs, cotangents, stats, deterministic=False, **cu)
    # The order of the sums is all that may differ.
    for a, b in zip(again, got, strict=True):
        assert relative_error(a, b) < torch.finfo(a.dtype).eps


@pytest.mark.parametrize("d", [64, 128])
def test_sums_in_any_order_where_lse_is_low(library, d):
    """Rows behind the last key have scores of 0: with lse of -11 or less P overflows float16."""
    inputs, cotangents = draw(100, 130, d, dtype=torch.float16)
    inputs[0][..., 0], inputs[1][..., 0] = 16, -16 * (d / 64) ** 0.5
    wide = [x.double() for x in inputs]
    d_o, dt_o = (x.double() for x in cotangents)
    o, t_o, lse, mu = ops.attention_jvp(*wide, return_stats=True, impl="reference")
    assert lse.max() < -12
    stats = ((dt_o * o).sum(-1), (d_o * o + dt_o * t_o).sum(-1), lse, mu)
    fused = run(library, inputs, cotangents, stats, deterministic=False)
    got = run(library, inputs, cotangents, stats)
    # Rounded from the same P, dS0 and dS1, up to the order in which scores are summed.
    for a, b in zip(fused, got, strict=True):
        assert relative_error(a, b) < torch.finfo(a.dtype).eps


def test_sums_in_any_order_take_memory_where_they_are_used():
    """Values up to 64 columns share a pass with keys; without tangents of keys none is fused."""
    needs = {name: 1 << i for i, name in enumerate(NAMES)}
    for d in (64, 72):
        inputs, _ = draw(2, 3, d)
        assert OP._can_fuse(inputs, needs["q"] | needs["k"])
        assert OP._can_fuse(inputs, needs["t_q"] | needs["t_k"])
        assert OP._can_fuse(inputs, needs["q"] | needs["v"] | needs["t_v"]) == (d == 64)
        assert not OP._can_fuse(inputs, needs["q"] | needs["t_q"])
        assert not OP._can_fuse(inputs, needs["k"] | needs["v"])
        assert not OP._can_fuse([*inputs[:4], None, None], needs["q"] | needs["k"])


@pytest.mark.parametrize(("nq", "nk"), [(5, 0), (0, 5), (1, 3)])
def test_few_sums_in_any_order(library, nq, nk):
    check(library, *draw(nq, nk, 64, b=2, h=2), deterministic=False)


def test_what_does_not_fit_is_refused(library):
    inputs, cotangents = draw(20, 30, 64)
    stats = [torch.zeros(1, 1, 20) for _ in range(4)]
    with pytest.raises(ValueError, match="expected t_q, and both or none of t_k and t_v"):
        run(library, [*inputs[:5], None], cotangents, stats)
    with pytest.raises(ValueError, match="expected t_q, and both or none of t_k and t_v"):
        run(library, [*inputs[:3], None, *inputs[4:]], cotangents, stats)
    with pytest.raises(ValueError, match="expected a boolean one where t_k and t_v are given"):
        run(library, inputs, cotangents, stats, attn_mask=torch.zeros(20, 30).bfloat16())
    with pytest.raises(ValueError, match="d_o, dt_o, delta0, mu: expected all of them"):
        run(library, inputs, [None, cotangents[1]], stats)
    with pytest.raises(ValueError, match="head dims up to 128, got 136"):
        run(library, *draw(20, 30, 136), stats)
