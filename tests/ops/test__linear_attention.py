"""What the linear attention kernels share: features, states in memory, sizes of tiles."""

import pytest
import torch
import triton
import triton.language as tl
from fewstep.kernels._common import pad_head_dim
from fewstep.kernels._linear_attention import (
    TOKENS,
    features,
    find_chunk,
    load_rows,
    load_state,
    new_partials,
    store_rows,
    store_state,
    tiles,
)

from helpers import DEVICES, padded, padding_intact

pytestmark = pytest.mark.triton


@triton.jit
def _features(x_ptr, t_ptr, out_ptr, n, D: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr):
    offs, cols = tl.arange(0, BLOCK), tl.arange(0, PAD)
    x = load_rows(x_ptr, D, offs, n, cols, D)
    t = load_rows(t_ptr, D, offs, n, cols, D)
    store_rows(out_ptr, D, offs, n, cols, D, features(x, t))


@triton.jit
def _copy_state(
    a_ptr, b_ptr, D: tl.constexpr, DV: tl.constexpr, DP: tl.constexpr, VP: tl.constexpr
):
    matrix, vector = load_state(a_ptr, D, DV, DP, VP)
    store_state(b_ptr, matrix, vector, D, DV, DP, VP)


@triton.jit
def _find_chunk(out_ptr, batch, heads):
    head, chunk, b, h = find_chunk(batch, heads)
    tl.store(out_ptr + tl.program_id(0), head * 1000 + chunk * 100 + b * 10 + h)


@pytest.mark.parametrize("device", DEVICES)
def test_programs_share_out_heads_and_chunks(device):
    """Chunk 0 of every head comes first: programs that run together share no state."""
    found = torch.zeros(12, dtype=torch.int64, device=device)
    _find_chunk[(12,)](found, 2, 3)
    want = [[h * 1000 + c * 100 + h // 3 * 10 + h % 3 for h in range(6)] for c in range(2)]
    assert found.view(2, 6).tolist() == want


@pytest.mark.parametrize("device", DEVICES)
def test_features_are_relu_and_its_derivative(device):
    x, t = (padded(torch.randn(5, 24, device=device)) for _ in range(2))
    x[0, :3] = torch.tensor([0.0, -0.0, float("nan")])
    for tangent, want in ((x, x.relu()), (t, torch.where(x <= 0, 0.0, t))):
        out = padded(torch.zeros(5, 24, device=device))
        _features[(1,)](x, tangent, out, 5, D=24, BLOCK=8, PAD=32)
        torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
        assert padding_intact(out)


@pytest.mark.parametrize("device", DEVICES)
def test_a_state_comes_back_whole(device):
    for d, dv in ((8, 24), (16, 16)):
        state = padded(torch.randn(d, dv + 1, device=device))
        copy = padded(torch.zeros(d, dv + 1, device=device))
        sizes = pad_head_dim(d), pad_head_dim(dv)
        _copy_state[(1,)](state, copy, D=d, DV=dv, DP=sizes[0], VP=sizes[1])
        assert torch.equal(copy, state)
        assert padding_intact(copy)


def test_sizes():
    assert [pad_head_dim(d) for d in (8, 16, 24, 72)] == [16, 16, 32, 128]
    assert tiles(32, 32)["BLOCK"] > tiles(64, 64)["BLOCK"]
    q, v = torch.empty(2, 3, 1, 8), torch.empty(2, 3, TOKENS + 1, 16)
    assert new_partials(q, v, TOKENS + 1).shape == (2, 2, 2, 3, 8, 17)
