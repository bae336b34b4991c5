"""gemm_fp8's Hopper kernel: what of the products of 8-bit rows is different for e4m3.

Tiles, ends and the branch are test_gemm_w8a8_sm90.py's.
"""

import pytest
import torch

from cuda_gemm8 import AT_SIZE, TILINGS, check, needs_hopper, operands, run

OP = "gemm_fp8"
# By tiling: more than one each way; in turns several tiles each, of more slabs than slots.
SHAPES = [(130, 200, 400), (130, 136, 144), (270, 130, 1040)]


@pytest.mark.parametrize("tiling", TILINGS)
def test_matches_oracle(gemm8, tiling):
    given = operands(OP, *SHAPES[tiling])
    given["bias"] = torch.randn(SHAPES[tiling][1])
    check(gemm8, OP, given, out_dtype=torch.bfloat16, tiling=tiling)


@pytest.mark.parametrize("tiling", TILINGS)
def test_float32_takes_over_after_a_slab(gemm8, tiling):
    """The first 128 k sum to 2^20, which the tensor cores' sums must not meet the others beside."""
    given = operands(OP, 20, 20, 384)
    a, w = (torch.ones(20, 384) for _ in range(2))
    a[:, :64], w[:, :64] = 128, 128
    a[:, 64:128] = 0
    given["a"], given["w"] = a.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    given["a_scale"], given["w_scale"] = torch.ones(20), torch.ones(20)
    out = run(gemm8, OP, given, tiling=tiling)
    assert torch.equal(out, torch.full((20, 20), 2.0**20 + 256))


@pytest.mark.parametrize("tiling", TILINGS)
def test_branch_and_gated_activation(gemm8, tiling):
    M, N, R = 66, 204, 24
    given = operands(OP, M, N, 32)
    given["low"], given["up"] = torch.randn(M, R).bfloat16(), torch.randn(N, R).bfloat16()
    given["residual"], given["gate"] = torch.randn(M, N // 2), torch.randn(1, N // 2)
    check(gemm8, OP, given, activation="geglu", tiling=tiling)


def test_nan_reaches_its_row_and_column(gemm8):
    given = operands(OP, 5, 7, 32)
    given["a"].view(torch.uint8)[2, 3], given["w"].view(torch.uint8)[6, 1] = 0x7F, 0xFF
    nan = run(gemm8, OP, given, tiling=2).isnan()
    want = torch.zeros(5, 7, dtype=torch.bool)
    want[2], want[:, 6] = True, True
    assert torch.equal(nan, want)


@needs_hopper
@pytest.mark.parametrize("tiling", TILINGS)
@pytest.mark.parametrize("shape", AT_SIZE)
def test_sums_are_exact_at_size(shape, tiling):
    """Integers up to 3: a slab's sums are below 2^11, which the tensor cores keep whole."""
    M, N, K = shape
    given = operands(OP, *shape)
    given["a_scale"], given["w_scale"] = torch.ones(M), torch.ones(N)
    for name, rows in (("a", M), ("w", N)):
        given[name] = torch.randint(-3, 4, (rows, K)).to(torch.float8_e4m3fn)
    a, w = (given[name].cuda().double() for name in "aw")
    want = (a @ w.mT).float()  # below 2^24
    assert torch.equal(run(None, OP, given, tiling=tiling), want.cpu())
