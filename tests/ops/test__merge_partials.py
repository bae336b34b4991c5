"""merge_partials: what parts of the keys give is joined to what all of them give, gradients too."""

import pytest
import torch

from attention_masks import NEVER, meets
from fewstep import ops, reference
from helpers import relative_error

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(nq, nk, d, dv=None, dtype=torch.float32, batch=2, heads=(3, 3)):
    """q, k, v, t_q, t_k, t_v; `heads` are those of q and of k."""
    h, g = heads
    shapes = [(batch, h, nq, d), (batch, g, nk, d), (batch, g, nk, dv or d)] * 2
    return [torch.randn(shape).to(dtype) for shape in shapes]


def with_directions(args):
    return [*args[:3], *(torch.stack([t, torch.randn_like(t)]) for t in args[3:])]


def of_keys(args, keys):
    return [x if i in (0, 3) else x[..., keys, :] for i, x in enumerate(args)]


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_parts_merge_into_the_whole(dtype, bound):
    """o, t_o, lse and mu of two ranges of keys are enough to give those of their union."""
    args = inputs(20, 131, 24, dtype=dtype)
    parts = (
        ops.attention_jvp(*of_keys(args, keys), return_stats=True, impl="native")
        for keys in (slice(0, 37), slice(37, None))
    )
    whole = ops.attention_jvp(*args, return_stats=True, impl="native")
    for merged, want in zip(ops.merge_partials(parts), whole, strict=True):
        assert relative_error(merged, want) < bound


@pytest.mark.parametrize("directions", [None, 2])
def test_gradients_of_a_merge(directions):
    """Also where a query meets no key: in one of the parts, or in none."""
    args = inputs(6, 9, 8, dtype=torch.float64, batch=1, heads=(2, 2))
    if directions:
        args = with_directions(args)
    leaves = [x.requires_grad_() for x in args]
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[1], mask[2, :4], mask[3, 4:] = False, False, False

    def outputs(*slices):
        for keys in slices:
            yield ops.attention_jvp(
                *of_keys(leaves, keys), attn_mask=mask[:, keys], return_stats=True
            )

    def gradients(o, t_o, lse, mu):
        lse = lse.masked_fill(lse == -torch.inf, 0)
        return torch.autograd.grad(sum(x.sin().sum() for x in (o, t_o, lse, mu)), leaves)

    whole = next(outputs(slice(None)))
    merged = ops.merge_partials(outputs(slice(0, 4), slice(4, 9)))
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(gradients(*merged), gradients(*whole))
    assert not merged[0][:, :, 1].any()
    assert (merged[2][:, :, 1] == -torch.inf).all()


def test_a_common_mode_of_the_keys_is_not_lost_in_a_merge():
    """o of the parts is rounded to 16 bits: what multiplies it has to be small."""
    args = inputs(64, 600, 64, batch=1, heads=(1, 1))
    shift = torch.randn(64)
    errors = []
    for sigmas in (0, 30):
        low = [x.bfloat16() for x in args]
        low[4] = (args[4] + sigmas * shift).bfloat16()
        parts = [
            ops.attention_jvp(*of_keys(low, keys), return_stats=True)
            for keys in (slice(0, 200), slice(200, 600))
        ]
        want = reference.attention_jvp(*(x.double() for x in low))[1]
        errors.append(relative_error(ops.merge_partials(parts)[1], want))
    # The means of the parts still differ by more: not flat, but not the 30 that one would get.
    assert errors[1] < 8 * errors[0]


def test_parts_that_do_not_fit_are_named():
    args = inputs(5, 6, 16)
    whole = ops.attention_jvp(*args, return_stats=True)
    many = ops.attention_jvp(*args[:3], *(t[None] for t in args[3:]), return_stats=True)
    half = ops.attention_jvp(*(x.half() for x in args), return_stats=True)
    for parts, error, message in (
        ([], ValueError, "parts: expected at least one"),
        (
            [whole, whole[:2]],
            TypeError,
            r"parts\[1\]: expected \(o, t_o, lse, mu\).* got tuple of 2",
        ),
        ([whole[0]], TypeError, r"parts\[0\]: expected .* got Tensor"),
        ([(*whole[:3], 1.0)], TypeError, r"parts\[0\]\.mu: expected a tensor, got float"),
        ([whole, many], ValueError, r"parts\[1\]\.t_o: expected torch\.float32 \[2, 3, 5, 16\]"),
        ([whole, half], ValueError, r"parts\[1\]\.o: expected torch\.float32 .* as parts\[0\]"),
        ([[x[:1] for x in whole], whole], ValueError, r"parts\[1\]\.o: .* got torch\.float32 \[2"),
        ([(*whole[:2], whole[2][..., :4], whole[3])], ValueError, r"parts\[0\]\.lse: expected"),
    ):
        with pytest.raises(error, match=message):
            ops.merge_partials(parts)


def test_parts_of_masked_keys_merge_into_the_whole():
    mask = torch.randn(4, 37, 131).masked_fill(~meets(4, 37, 131), NEVER)
    mask[:, 5:9, :60] = NEVER  # rows that meet nothing in the first part
    mask[:, 11] = NEVER
    args, t_mask = (
        with_directions(inputs(37, 131, 24, 40, heads=(4, 2))),
        torch.randn(2, 4, 37, 131),
    )
    parts = [
        ops.attention_jvp(
            *of_keys(args, keys),
            attn_mask=mask[..., keys],
            t_attn_mask=t_mask[..., keys],
            return_stats=True,
        )
        for keys in (slice(0, 60), slice(60, None))
    ]
    whole = ops.attention_jvp(*args, attn_mask=mask, t_attn_mask=t_mask, return_stats=True)
    for i, (merged, want) in enumerate(zip(ops.merge_partials(parts), whole, strict=True)):
        if i == 2:
            assert torch.equal(merged == NEVER, want == NEVER)
            merged, want = (x.masked_fill(x == NEVER, 0) for x in (merged, want))
        assert relative_error(merged, want) < 2e-6
