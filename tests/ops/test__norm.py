"""The norm of a tile of whole rows, in Triton: against float64, and zero outside of the mask."""

import pytest
import torch
import triton
import triton.language as tl
from fewstep.kernels._norm import normalise

from helpers import DEVICES

pytestmark = pytest.mark.triton


@triton.jit
def _normalise(
    x_ptr, mean_ptr, rstd_ptr, n_ptr, eps, N, C: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (rows < N)[:, None] & (columns < C)[None, :]
    x = tl.load(x_ptr + rows[:, None] * C + columns[None, :], mask=mask, other=0.0)
    mean, rstd, n = normalise(x, mask, eps, C, CENTRED)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    tl.store(n_ptr + rows[:, None] * COLUMNS + columns[None, :], n)  # all of it, the padding too


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("centred", [True, False])
def test_rows_are_normalised_and_padding_stays_zero(centred, device):
    x = torch.randn(3, 5, device=device) * 4 + 2
    mean, rstd = x.new_empty(3), x.new_empty(3)
    n = x.new_full((4, 8), 7.0)
    _normalise[(1,)](x, mean, rstd, n, 1e-5, 3, C=5, ROWS=4, COLUMNS=8, CENTRED=centred)
    exact = x.double()
    want_mean = exact.mean(1) if centred else torch.zeros_like(exact[:, 0])
    moved = exact - want_mean[:, None]
    want_rstd = (moved.square().mean(1) + 1e-5).rsqrt()
    # Sums of 5 terms, a division, a root and a product: some ten float32 roundings.
    bound = 16 * 2.0**-24
    size = exact.abs().amax(1)
    assert ((mean.double() - want_mean).abs() <= bound * size).all()
    assert ((rstd.double() / want_rstd - 1).abs() <= bound * (1 + size * want_rstd)).all()
    error = (n[:3, :5].double() - moved * want_rstd[:, None]).abs()
    assert (error <= bound * (1 + size * want_rstd)[:, None] * 2).all()
    assert (n[3] == 0).all()
    assert (n[:, 5:] == 0).all()
