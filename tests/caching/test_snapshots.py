"""Snapshots in low precision: every format's error bound, constants, what they take in memory."""

import pytest
import torch

from fewstep.caching.ring import Ring
from fewstep.caching.snapshots import FORMATS, GROUP, Slots

# Tokens whose groups end in mid-row, tokens with short rows, images, a vector per sample.
SHAPES = [(2, 3, 300), (2, 5, 24), (2, 3, 6, 6), (2, 130)]
TOPS = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}


def groups(x):
    """Return x by groups, padded with 0, and how to take it back."""
    columns = x.shape[-1] if x.dim() == 3 and x.shape[-1] >= GROUP else x[0].numel()
    rows = torch.nn.functional.pad(x.reshape(-1, columns), (0, -columns % GROUP))
    return rows.reshape(len(rows), -1, GROUP), lambda y: y.flatten(1)[:, :columns].reshape(x.shape)


def bound(x, snapshots):
    """Return how far a value may be off after it was kept: see the table of the module."""
    if snapshots is None or snapshots == "float32":
        return torch.zeros_like(x)
    if snapshots == "bfloat16":
        return 2**-8 * x.abs()
    parts, back = groups(x)
    scale = back(parts.abs().amax(-1, keepdim=True).expand_as(parts) / TOPS[snapshots])
    return 2**-4 * x.abs() + 2**-10 * scale if snapshots == "fp8" else 0.5 * scale


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("snapshots", [None, *FORMATS])
def test_a_snapshot_stays_in_its_bound(snapshots, shape):
    generator = torch.Generator().manual_seed(len(shape))
    # Groups of very different sizes: one factor for all would lose the small ones.
    sizes = torch.logspace(-4, 3, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    x = sizes * torch.randn(shape, generator=generator)
    slots = Slots(x, 2, snapshots)
    slots.put(x, 1)
    found = slots.sum(torch.tensor([0.0, 1.0]))
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    # The factors and the product with a code are float32: two roundings.
    assert ((found - x).abs() <= bound(x, snapshots) + 2**-22 * x.abs()).all()
    base = torch.randn(shape, generator=generator)
    slots.put(x + base, 0, base)
    residual = (x + base) - base
    found = slots.sum(torch.tensor([1.0, 0.0]), base) - base
    slack = 2**-22 * (residual.abs() + base.abs())
    assert ((found - residual).abs() <= bound(residual, snapshots) + slack).all()


@pytest.mark.parametrize("snapshots", [None, *FORMATS])
def test_a_constant_stays_one(snapshots):
    x = torch.randn(2, 4, 256, generator=torch.Generator().manual_seed(0))
    ring = Ring(3, snapshots)
    for rank in range(3):
        ring.push((x, None), rank, "form")
    (found, none) = ring.forecast(torch.tensor([3.0, -3.0, 1.0]))
    assert none is None
    # All slots hold the same value v, at most |x| and its bound: weights that sum to 1 give it back
    # up to three roundings of sums of up to 3 |v|.
    limit = bound(x, snapshots)
    assert ((found - x).abs() <= limit + 9 * 2**-24 * (x.abs() + limit)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("snapshots", [None, *FORMATS])
def test_a_forecast_has_the_dtype_of_what_was_computed(snapshots, dtype):
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    ring = Ring(2, snapshots)
    ring.push((x,), 0, None, (x / 2,))
    (found,) = ring.forecast(torch.tensor([1.0, 0.0]), (x / 2,))
    assert found.dtype == dtype
    off = (found - x).double().abs()
    rounding = 2**-7 * x.double().abs() if dtype != torch.float64 else 2**-22 * x.abs()
    assert (off <= bound(x.double() / 2, snapshots) + rounding).all()


@pytest.mark.parametrize("snapshots", [None, *FORMATS])
def test_what_it_is_added_to_may_have_another_dtype(snapshots):
    """Under autocast blocks return float32 for an input in bfloat16."""
    x = torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(0))
    base = x.to(torch.bfloat16) / 2
    ring = Ring(2, snapshots)
    ring.push((x,), 0, None, (base,))
    (found,) = ring.forecast(torch.tensor([1.0, 0.0]), (base,))
    assert found.dtype == x.dtype
    residual = x - base
    slack = 2**-22 * (residual.abs() + base.float().abs())
    assert ((found - x).abs() <= bound(residual, snapshots) + slack).all()


def test_what_they_take():
    x = torch.zeros(1, 8, 1024, dtype=torch.bfloat16)
    values = 3 * 8 * 1024
    want = {None: 2, "float32": 4, "bfloat16": 2, "fp8": 1, "int8": 1, "int4": 0.5}
    for snapshots, each in want.items():
        ring = Ring(3, snapshots)
        ring.push((x, x), 0, None)
        scales = 4 / GROUP if snapshots in TOPS else 0
        assert ring.bytes == 2 * values * (each + scales)
        ring.clear()
        assert ring.bytes == 2 * values * (each + scales)  # what a run took is known after it


def test_int4_needs_pairs():
    with pytest.raises(ValueError, match=r'snapshots: expected an even number .* "int4", got 15'):
        Slots(torch.zeros(1, 3, 5), 2, "int4")
    slots = Slots(torch.zeros(2, 2, 5), 2, "int4")  # 10 a sample
    slots.put(torch.ones(2, 2, 5), 0)
    assert torch.equal(slots.sum(torch.tensor([1.0, 0.0])), torch.ones(2, 2, 5))


@pytest.mark.parametrize("snapshots", ["fp8", "int8", "int4"])
def test_no_group_holds_two_samples(snapshots):
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[1] *= 1e4
    found = []
    for batch in (x, other):
        slots = Slots(batch, 1, snapshots)
        slots.put(batch, 0)
        found.append(slots.sum(torch.ones(1))[0])
    assert torch.equal(*found)
