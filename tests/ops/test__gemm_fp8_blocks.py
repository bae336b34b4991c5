"""gemm_fp8 with scales of blocks: 128 neighbours in k of a, squares of 128 x 128 of w."""

import pytest
import torch

from fewstep import ops
from fewstep.reference.gemm_fp8 import spread_scales
from fp8_operands import ISAS, numbers, operands
from product_rules import add_branch, branch_of, check_derivatives, within


@pytest.fixture(params=["reference", "native", "triton"])
def impl(request):
    return request.param


def blocked(rows, N, K, squares):
    """Return operands with scales of blocks, and both operands multiplied by them, in float64."""
    a, _, w, w_scale, bias = operands(rows, N, K)
    B, C = -(-K // 128), -(-N // 128)
    a_scale = (torch.rand(*rows, B) + 0.1) * 2.0**-14
    w_scale = torch.rand(C, B) + 0.1 if squares else w_scale
    wide = a.double() * a_scale.double().repeat_interleave(128, -1)[..., :K]
    columns = spread_scales(w_scale.double(), N, K)
    return (a, a_scale, w, w_scale), bias, wide, w.double() * columns


BLOCK_SHAPES = [((1,), 3, 1), ((2, 7), 130, 128), ((9,), 200, 300), ((3,), 70, 1700)]


@pytest.mark.parametrize("squares", [False, True])
@pytest.mark.parametrize("shape", BLOCK_SHAPES, ids=str)
def test_blocks_match_oracle(shape, squares, impl):
    args, bias, a, w = blocked(*shape, squares)
    K = shape[2]
    exact, terms = a @ w.mT + bias.double(), a.abs() @ w.abs().mT
    before = (min(K, 128) + -(-K // 128) + 3) * 2.0**-24 * terms + 2.0**-24 * exact.abs()
    if impl == "triton":
        before = before + 2.0**-9 * terms
    out = ops.gemm_fp8(*args, bias=bias, impl=impl)
    assert within(out, exact, before)
    branch = branch_of(shape[0], shape[1], 5)
    out = ops.gemm_fp8(*args, bias=bias, out_dtype=torch.bfloat16, **branch, impl=impl)
    assert within(out, *add_branch(exact, before, **branch))


@pytest.mark.parametrize("squares", [False, True])
def test_blocks_have_the_same_bits_everywhere(squares, monkeypatch):
    """Whatever the instruction set, the slices of K and what follows the sums."""
    for shape in BLOCK_SHAPES[1:]:
        args, bias, *_ = blocked(*shape, squares)
        end = {"bias": bias, "activation": "geglu"} if shape[1] % 2 == 0 else {"bias": bias}
        want = ops.gemm_fp8(*args, **end, impl="native")
        for isa in ISAS:
            monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
            assert torch.equal(ops.gemm_fp8(*args, **end, impl="native"), want)
        monkeypatch.delenv("FEWSTEP_CPU_ISA")
    (a, a_scale, *weight), *_ = blocked((20,), 70, 3300, squares)
    want = ops.gemm_fp8(a, a_scale, *weight, impl="native")
    assert torch.equal(ops.gemm_fp8(a[:3], a_scale[:3], *weight, impl="native"), want[:3])


def test_blocks_of_floating_input_are_quantised_in_the_call(impl):
    (_, _, *weight), bias, _, _ = blocked((), 140, 300, squares=True)
    x = torch.randn(2, 9, 300)
    q, scale = ops.quantize_fp8(x, block=128, impl=impl)
    want = ops.gemm_fp8(q, scale, *weight, bias=bias, impl=impl)
    assert torch.equal(ops.gemm_fp8(x, None, *weight, bias=bias, impl=impl), want)


def test_blocks_of_nothing(impl):
    for rows, N, K in (((0,), 5, 140), ((3,), 0, 140), ((3,), 5, 0)):
        args, bias, *_ = blocked(rows, N, K, squares=True)
        out = ops.gemm_fp8(*args, bias=bias, impl=impl)
        assert torch.equal(out, bias.expand(*rows, N))


def test_derivatives_with_scales_of_squares():
    w, w_scale = numbers(23, 40), torch.rand(1, 1) * 2.0**-6
    weight = w.double() * w_scale.double()
    check_derivatives(lambda x, **kwargs: ops.gemm_fp8(x, None, w, w_scale, **kwargs), weight)


def test_blocks_that_do_not_fit_are_refused():
    (a, a_scale, w, w_scale), *_ = blocked((6,), 140, 300, squares=True)
    with pytest.raises(ValueError, match=r"a_scale: expected shape \[6, 3\], got \[6\]"):
        ops.gemm_fp8(a, a_scale[:, 0], w, w_scale)
    with pytest.raises(ValueError, match=r"a_scale: expected shape \[6, 3\], got \[6, 2\]"):
        ops.gemm_fp8(a, a_scale[:, :2], w, w_scale)
    with pytest.raises(ValueError, match=r"w_scale: expected shape \[2, 3\], got \[3, 2\]"):
        ops.gemm_fp8(a, a_scale, w, w_scale.t())
