"""The low-bit products in Triton: every way a launcher can choose, and the low-rank branch in each.

test_gemm_w8a8.py, test_gemm_w4a8.py and test_gemm_w4a16.py hold the contracts; the shapes here are
those at which the launchers change their tiles.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep import ops
from fewstep.reference.gemm_w4a8 import fold_int4
from fewstep.reference.gemm_w4a16 import dequantize_int4
from product_rules import add_branch, within

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytestmark = pytest.mark.triton


def weight(N, K, group, dtype=torch.bfloat16):
    w = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    return w, (torch.rand(N, K // group) + 0.01).to(dtype)


# One row of tiles of each width, the widest with a second row, and past MANY.
@pytest.mark.parametrize(("M", "N"), [(1, 3), (16, 65), (17, 40), (65, 70), (130, 9), (513, 17)])
@pytest.mark.parametrize(
    ("group", "dtype"), [(32, torch.bfloat16), (64, torch.float16), (128, torch.bfloat16)]
)
def test_gemm_w4a8_has_the_integers_of_the_folded_weight(M, N, group, dtype):
    K = 3 * group
    a = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    w, w_scale = weight(N, K, group, dtype)
    w_scale[0, 0] = 0
    a_scale, bias = torch.rand(M), torch.randn(N)
    w8, top = fold_int4(w, w_scale)
    out = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl="triton")
    want = ops.gemm_w8a8(a, a_scale, w8, top, bias=bias, impl="triton")
    # The scaling may be fused differently: one rounding of each, on integers that agree.
    size = (a.double() @ w8.double().mT).abs() * a_scale.double()[:, None] * top.double()
    assert ((out - want).abs() <= 2.0**-22 * (size + bias.abs())).all()
    ones = torch.ones(M)
    out = ops.gemm_w4a8(a, ones, w, w_scale, impl="triton")
    assert torch.equal(out, (a.double() @ w8.double().mT * top.double()).float())


@pytest.mark.parametrize("M", [3, 600])
def test_gemm_w4a8_scales_without_a_ratio(M):
    """Rows whose scales are all zero, hold a NaN or an infinity, or are subnormal."""
    a = torch.randint(-128, 128, (M, 64), dtype=torch.int8)
    w, w_scale = weight(6, 64, 32, torch.float16)
    w_scale[1], w_scale[2, 1], w_scale[3, 0] = 0, float("nan"), float("inf")
    w_scale[4] = torch.tensor([6e-8, 1.2e-7])
    args = (a, torch.ones(M), w, w_scale)
    out, want = (ops.gemm_w4a8(*args, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)
    assert out[:, 2].isnan().all()
    assert out[:, [0, 1, 4, 5]].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# Without dots: up to 2 rows, 8 in float32, and more columns of the weight than one step takes.
@pytest.mark.parametrize(
    ("M", "N", "K", "group"),
    [(1, 17, 1152, 128), (2, 9, 1088, 32), (3, 65, 64, 64), (8, 5, 96, 32), (9, 70, 256, 128),
     (20, 33, 192, 64), (65, 130, 64, 64)],
)  # fmt: skip
def test_gemm_w4a16_multiplies_exact_values(M, N, K, group, dtype):
    """The bound of float32 sums holds for 16-bit x as well: no weight is rounded."""
    x = torch.randn(M, K).to(dtype)
    w, w_scale = weight(N, K, group)
    w_scale[0] *= 2.0**-20  # below what float16 could hold of q s
    full, bias = dequantize_int4(w, w_scale), torch.randn(N)
    out = ops.gemm_w4a16(x, w, w_scale, bias=bias, impl="triton")
    exact = x.double() @ full.mT + bias.double()
    before = (K + 2) * 2.0**-24 * (x.double().abs() @ full.abs().mT) + 2.0**-24 * exact.abs()
    assert within(out, exact, before)


@pytest.mark.parametrize("R", [16, 128])
@pytest.mark.parametrize("low_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [2, 20])
@pytest.mark.parametrize("op", ["gemm_w8a8", "gemm_w4a8", "gemm_w4a16"])
def test_branch_keeps_its_bound(op, M, low_dtype, R):
    N, K, group = 37, 128, 64
    for up_dtype in {low_dtype, torch.bfloat16}:
        w, w_scale = weight(N, K, group)
        low, up = torch.randn(M, R).to(low_dtype), torch.randn(N, R).to(up_dtype)
        if op == "gemm_w4a16":
            x, full = torch.randn(M, K), dequantize_int4(w, w_scale)
            args, product = (x, w, w_scale), x.double() @ full.mT
            before = (K + 2) * 2.0**-24 * (x.double().abs() @ full.abs().mT)
        else:
            a = torch.randint(-128, 128, (M, K), dtype=torch.int8)
            a_scale, (w8, top) = torch.rand(M) / 100, fold_int4(w, w_scale)
            args = (a, a_scale, *((w8, top) if op == "gemm_w8a8" else (w, w_scale)))
            product = a.double() @ w8.double().mT * a_scale.double()[:, None] * top.double()
            before = 3 * 2.0**-24 * product.abs()
        exact, before = add_branch(product, before + 2.0**-24 * product.abs(), low=low, up=up)
        out = getattr(ops, op)(*args, low=low, up=up, impl="triton")
        assert within(out, exact, before)


def test_layers_end_to_end_are_one_launch():
    """Modulation layers of different widths in one product: the bits of each by itself."""
    x, layers = torch.randn(2, 64), [weight(N, 64, 32) for N in (48, 16, 24)]
    w, w_scale = (torch.cat(parts) for parts in zip(*layers, strict=True))
    together = ops.gemm_w4a16(x, w, w_scale, impl="triton").split([48, 16, 24], -1)
    for out, layer in zip(together, layers, strict=True):
        assert torch.equal(out, ops.gemm_w4a16(x, *layer, impl="triton"))


@pytest.mark.slow
def test_compiles_for_hopper():
    """No spills, shared memory that there is, tensor cores; see `_hopper.py`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("_hopper.py")), "gemm", "quantize"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
