"""gemv_w4a16_grouped's CUDA kernel, run on the host (tests/cuda/emulation stands in for the chip).

On a GPU tests/ops/test_gemv_w4a16_grouped.py runs the same kernel, by the op.
"""

import ctypes

import pytest
import torch

from cuda_emulation import View, compile_once
from fewstep.ops.gemm_w4a16 import dequantize_int4
from helpers import padded, padding_intact, row_sliced
from product_rules import within

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    return compile_once("gemv_w4a16_emulated.cpp", tmp_path_factory)


def aligned(x):
    """Return x in memory that begins at a multiple of 16 and is followed by what is not zero."""
    flat = torch.full((x.numel() + 64,), 0x7B, dtype=x.dtype)
    flat = flat[(-flat.data_ptr() // x.element_size()) % 16 :]
    flat[: x.numel()] = x.reshape(-1)
    return flat[: x.numel()].view(x.shape)


def problems(K, group, widths, scale_dtype=torch.bfloat16, bias_dtype=torch.float32):
    """Return lists w, w_scale, bias; the second problem has no bias."""
    w = [aligned(torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)) for N in widths]
    w_scale = [padded((torch.rand(N, K // group) + 0.01).to(scale_dtype)) for N in widths]
    bias = [padded(torch.randn(N).to(bias_dtype)) for N in widths]
    if len(bias) > 1:
        bias[1] = torch.empty(0)
    return w, w_scale, bias


def run(library, x, w, w_scale, bias):
    """Return the outputs; x [X, M, K]."""
    M = x.shape[1]
    out = padded(torch.zeros(M * sum(len(t) for t in w), dtype=x.dtype))
    tensors = [x, out, *w, *w_scale, *bias]
    error = library.run((View * len(tensors))(*map(View.of, tensors)), len(w))
    if error:
        raise ValueError(error.decode())
    assert padding_intact(out)
    return [part.view(M, -1) for part in out.split([M * len(t) for t in w])]


def check(library, x, w, w_scale, bias):
    outs = run(library, x, w, w_scale, bias)
    for g, out in enumerate(outs):
        weight, row = dequantize_int4(w[g], w_scale[g]), x[g if len(x) > 1 else 0].double()
        exact = row @ weight.mT + (bias[g].double() if len(bias[g]) else 0)
        terms = row.abs() @ weight.abs().mT
        assert within(out, exact, (x.shape[2] + 2) * 2.0**-24 * terms + 2.0**-24 * exact.abs())
    return outs


# Every kernel: parts of a chunk by passes of rows. K of less than a chunk, of some that are no
# whole step of four, with a last one in part; tiles of 128 rows in part; one row more than a pass.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("group", "M", "K"),
    [
        *((128, 1, 128), (128, 8, 640)),
        *((64, 1, 64), (64, 4, 832), (64, 5, 192), (64, 8, 320)),
        *((32, 2, 96), (32, 3, 352), (32, 4, 32), (32, 5, 160), (32, 8, 672)),
    ],
)
def test_matches_oracle(library, group, M, K, dtype):
    scale_dtype = DTYPES[M % 2]
    lists = problems(K, group, (130, 7), scale_dtype, [*DTYPES, torch.float32][M % 3])
    check(library, padded(torch.randn(1, M, K).to(dtype)), *lists)


def test_rows_and_neighbours_do_not_change_a_bit(library):
    """A row of x by itself, among others, and in a problem by itself: as layers apart have it."""
    x = torch.randn(1, 8, 192).bfloat16()
    for group in (32, 64):
        lists = problems(192, group, (140, 20, 9))
        outs = run(library, x, *lists)
        for m in (0, 3, 7):
            for g in range(3):
                alone = [[given[g]] for given in lists]
                assert torch.equal(run(library, x[:, m : m + 1], *alone)[0], outs[g][m : m + 1])


def test_each_problem_its_own_input(library):
    """Blocks put another x into shared memory as they get on."""
    widths = (200, 140, 1, 300, 129, 0, 70)
    x = row_sliced(torch.randn(len(widths), 3, 96).half())
    check(library, x, *problems(96, 32, widths))


def test_more_problems_than_a_launch_takes(library):
    count = library.problems_of_a_launch() + 3
    lists = problems(32, 32, [1 + i % 3 for i in range(count)])
    check(library, torch.randn(1, 1, 32).bfloat16(), *lists)
    check(library, torch.randn(count, 1, 32).bfloat16(), *lists)


def test_every_nibble_is_exact(library):
    """A one in one place of x: each output is one product q s."""
    w = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    w_scale = (torch.rand(256, 1) + 0.01).bfloat16()
    weight = dequantize_int4(w, w_scale)
    for dtype in DTYPES:
        for k in range(0, 32, 3):
            x = torch.zeros(1, 1, 32, dtype=dtype)
            x[0, 0, k] = 1
            (out,) = run(library, x, [aligned(w)], [w_scale], [torch.empty(0)])
            assert torch.equal(out[0], weight[:, k].to(dtype))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_rows_stay_alone(library, value):
    for group, K in ((32, 160), (64, 192), (128, 256)):
        w, w_scale, bias = problems(K, group, (20,))
        w = [aligned(w[0] | 0x11)]
        x = torch.randn(1, 5, K).bfloat16()
        clean = run(library, x, w, w_scale, bias)[0]
        x[0, 2, 33] = value
        out = run(library, x, w, w_scale, bias)[0]
        assert not out[2].isfinite().any()
        assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_rows_of_shared_memory_lie_in_both_halves_of_the_banks(library):
    for M, K in ((1, 64), (8, 1152), (8, 3072)):
        step = (library.shared_bytes(M + 2, K) - library.shared_bytes(M, K)) // 2
        assert step % 128 == 64
        assert step >= 2 * K


def test_bad_operands_are_refused(library):
    w, w_scale, bias = problems(64, 32, (5, 6))
    x = torch.zeros(1, 2, 64).bfloat16()
    for change, message in (
        ({"x": x.float()}, "x: expected bfloat16 or float16, got float32"),
        ({"w": [padded(w[0]), w[1]]}, "multiple of 16 bytes"),
        ({"w_scale": [t[:, :1] for t in w_scale]}, "expected a contiguous tensor"),
        ({"x": torch.zeros(1, 9, 64).bfloat16()}, "x: expected at most 8 rows, got 9"),
        ({"x": torch.zeros(3, 2, 64).bfloat16()}, "x: expected 1 or 2 inputs, got 3"),
    ):
        given = {"x": x, "w": w, "w_scale": w_scale, "bias": bias} | change
        with pytest.raises(ValueError, match=message):
            run(library, *given.values())
    # 2^31 bytes, of which none is there: refused before anything is read.
    many, scales = w[1][:1].expand(1 << 26, 32), w_scale[1][:1].expand(1 << 26, 2)
    views = [View.of(t) for t in (x, x.new_empty(0), many, scales, torch.empty(0))]
    views[1].sizes[0] = 2 << 26
    for view, stride in zip(views[2:4], (32, 2), strict=True):
        view.strides[0] = stride
    error = library.run((View * 5)(*views), 1)
    assert b"w: expected fewer than 2^31 bytes each, got 67108864 rows of 32" in error
    wide = torch.zeros(1, 8, 16384).bfloat16()
    with pytest.raises(ValueError, match="bytes of shared memory, got 8 of 16384 columns"):
        run(library, wide, *problems(16384, 128, (1,)))


def test_ctypes_views_are_those_of_the_library():
    assert ctypes.sizeof(View) == 8 + 8 + 80
