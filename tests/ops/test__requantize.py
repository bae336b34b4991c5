"""8-bit outputs of products by limits (`ops/_requantize.py`). The Hopper kernel that writes them is
tests/cuda/test_gemm_grouped_sm90.py's.
"""

import dataclasses
import math

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops._register import DerivativeError
from fewstep.reference._requantize import requantize

OPS = {"gemm_w8a8": torch.int8, "gemm_fp8": torch.float8_e4m3fn}


def layer(op, rows=(2, 5), N=44, K=64):
    """Return (a, a_scale, w, w_scale) of floating a."""
    quantize = ops.quantize_int8 if op == "gemm_w8a8" else ops.quantize_fp8
    return torch.randn(*rows, K), None, *quantize(torch.randn(N, K) * K**-0.5)


def bits(q):
    return q.view(torch.uint8)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_a_limit_that_is_the_rows_own(op, impl, monkeypatch):
    """To the bit what quantize_int8 and quantize_fp8 make of the float32 outputs; none exceeds."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if impl == "native" and _native._C is None:
        pytest.skip("not built")
    args, options = layer(op), {"activation": "swiglu", "residual": torch.randn(2, 5, 22)}
    product = getattr(ops, op)
    v = product(*args, **options, out_dtype=torch.float32, impl=impl)
    limit = v.abs().amax(-1)
    found = product(*args, **options, out_dtype=OPS[op], limit=limit, impl=impl)
    q, scale, amax, exceeded = found
    quantize = ops.quantize_int8 if op == "gemm_w8a8" else ops.quantize_fp8
    want = quantize(v, impl="reference")
    assert torch.equal(bits(q), bits(want[0]))
    assert torch.equal(scale, want[1])
    assert torch.equal(amax, limit)
    assert (exceeded.item(), exceeded.dtype, exceeded.shape) == (0, torch.int32, ())


@pytest.mark.parametrize("dtype", OPS.values(), ids=str)
def test_what_exceeds_a_limit_is_cut_off_and_counted(dtype):
    v, top = torch.randn(6, 300), 127 if dtype == torch.int8 else 448
    limit = v.abs().amax(1) * torch.tensor([0.5, 1.0, 1.3, 0.9, 2.0, 0.99])
    q, scale, amax, exceeded = requantize(v, limit, dtype)
    assert torch.equal(scale, limit / top)
    assert torch.equal(amax, v.abs().amax(1))
    assert exceeded.item() == (v.abs() > limit[:, None]).sum().item() > 3
    cut = v.clamp(-limit[:, None], limit[:, None])
    # Half a step of int8; half a unit of three bits, or of a subnormal, of e4m3.
    step = scale[:, None]
    bound = step / 2 if dtype == torch.int8 else torch.maximum(cut.abs() / 16, step * 2.0**-10)
    assert ((q.float() * step - cut).abs() <= bound * 1.0001).all()


@pytest.mark.parametrize("dtype", OPS.values(), ids=str)
def test_rows_and_limits_that_are_none(dtype):
    v = torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.0, math.nan], [math.inf, 1.0], [1.0, 1.0]])
    limit = torch.tensor([0.0, 0.0, 1.0, 1.0, math.nan])
    q, scale, amax, exceeded = requantize(v, limit, dtype)
    assert scale[:2].tolist() == [1.0, 1.0]
    assert scale.isnan().tolist() == [False, False, True, True, True]
    assert not q[:2].float().any()
    assert amax[:2].tolist() == [0.0, 1.0]
    assert exceeded.item() == 0 + 2 + 1 + 1 + 2


def drift(steps=12, M=64, N=512, change=0.08):
    """Return rows of a few extremes whose directions turn, and sizes grow and shrink, by a little
    from step to step, as those of a sampler's neighbouring steps do.
    """
    x = torch.randn(M, N) * (1 + 8 * (torch.rand(N) < 0.02))
    for _ in range(steps):
        x = (1 - change**2) ** 0.5 * x + change * torch.randn(M, N) * x.std(0)
        x = x * (1 + change * torch.randn(M, 1)).clamp(0.7, 1.3)
        yield x


def decibels(x, q, scale):
    error = q.float() * scale[:, None] - x
    return 10 * math.log10(x.double().square().sum() / error.double().square().sum())


def test_limits_of_the_step_before_on_data_that_drifts():
    """The error line of docs/ops/gemm_grouped.md at a margin of 1.25."""
    lost = {torch.int8: [], torch.float8_e4m3fn: []}
    outside = total = 0
    limit = None
    for x in drift():
        for dtype in lost:
            if limit is None:
                continue
            q, scale, _, exceeded = requantize(x, limit, dtype)
            own = requantize(x, x.abs().amax(1), dtype)
            lost[dtype].append(decibels(x, *own[:2]) - decibels(x, q, scale))
            outside, total = outside + exceeded.item(), total + x.numel()
        limit = 1.25 * x.abs().amax(1)
    # int8: 20 log10(1.25) = 1.94 dB, and what rows that grew or shrank save or add. e4m3: the
    # largest value of a row has 3 bits as all others, where its own scale has it exactly; of rows
    # of few extremes it is most of the norm.
    assert abs(sum(lost[torch.int8]) / len(lost[torch.int8]) - 1.94) < 0.5
    assert 0 < sum(lost[torch.float8_e4m3fn]) / len(lost[torch.float8_e4m3fn]) < 2
    assert 0 < outside < 1e-3 * total


@pytest.mark.parametrize("op", OPS)
def test_what_is_refused(op):
    args, product = layer(op), getattr(ops, op)
    limit = torch.ones(2, 5)
    with pytest.raises(ValueError, match=f"out_dtype: expected {OPS[op]} with limit, got None"):
        product(*args, limit=limit)
    with pytest.raises(ValueError, match=r"limit: expected shape \[2, 5\], got \[5\]"):
        product(*args, limit=limit[0], out_dtype=OPS[op])
    with pytest.raises(ValueError, match=r"limit: expected torch\.float32, got"):
        product(*args, limit=limit.double(), out_dtype=OPS[op])
    with pytest.raises(TypeError, match="limit: expected a tensor, got int"):
        product(*args, limit=1, out_dtype=OPS[op])
    x = args[0].clone().requires_grad_()
    with pytest.raises(DerivativeError, match=f"{op}_requantized has no backward"):
        product(x, *args[1:], limit=limit, out_dtype=OPS[op])
    with pytest.raises(DerivativeError, match=f"{op}_requantized has no forward-mode rule"):
        torch.func.jvp(
            lambda x: product(x, *args[1:], limit=limit, out_dtype=OPS[op])[1], (x,), (x,)
        )


def test_e4m3_outputs_need_limits():
    with pytest.raises(ValueError, match=r"out_dtype: expected float32, .* got torch\.float8"):
        ops.gemm_fp8(*layer("gemm_fp8"), out_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("op", OPS)
def test_the_choice_is_that_of_the_product(op, monkeypatch):
    """What an op's table says now decides, with a limit and without."""
    args, product, module = layer(op), getattr(ops, op), ops.module(op)
    held = [
        dataclasses.replace(way, refuse=lambda *_, **__: "not today")
        for way in module.IMPLEMENTATIONS
    ]
    monkeypatch.setattr(module, "IMPLEMENTATIONS", held)
    monkeypatch.setattr(module, "run_short", lambda *_: None, raising=False)
    for given in ({}, {"limit": torch.ones(2, 5), "out_dtype": OPS[op]}):
        with pytest.raises(ops.UnsupportedError, match="not today"):
            product(*args, **given)


@pytest.mark.parametrize("rows", [(0,), (2, 0, 3)])
def test_no_rows(rows):
    args = layer("gemm_w8a8", rows)
    found = ops.gemm_w8a8(*args, out_dtype=torch.int8, limit=torch.ones(rows))
    assert [list(x.shape) for x in found] == [[*rows, 44], list(rows), list(rows), []]
    assert found[3].item() == 0


def test_opcheck():
    a, _, w, w_scale = layer("gemm_w8a8")
    none = [None] * 2
    args = (a, None, w, w_scale, None, None, 0, None, *none, None, *none, torch.ones(2, 5))
    torch.library.opcheck(
        torch.ops.fewstep.gemm_w8a8_requantized.default,
        (*args, "reference"),
        test_utils=("test_schema", "test_faketensor"),
    )
