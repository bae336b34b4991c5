"""gemm_grouped: what the single products return, to the bit; what problems have to have in common.

Its Hopper kernel: tests/cuda/test_gemm_grouped_sm90.py.
"""

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops._register import DerivativeError

GROUPED = ops.module("gemm_grouped")
OPS = ["gemm_w8a8", "gemm_fp8"]
LISTS = ["bias", "smooth", "down", "up", "low", "gate", "residual"]


def quantize(op):
    return ops.quantize_int8 if op == "gemm_w8a8" else ops.quantize_fp8


def problems(op, floating, N=40, K=64, rows=((2, 5), (7,), (1, 3))):
    """Return (a, a_scale, w, w_scale) as lists."""
    x = [torch.randn(*shape, K).bfloat16() for shape in rows]
    w, w_scale = zip(*(quantize(op)(torch.randn(N, K) * K**-0.5) for _ in rows), strict=True)
    if floating:
        return x, None, list(w), list(w_scale)
    a, a_scale = zip(*map(quantize(op), x), strict=True)
    return list(a), list(a_scale), list(w), list(w_scale)


def options_of(op, floating, N=40, K=64, R=5):
    """Return options of every kind, each with problems that lack it."""
    low = {"down": [torch.randn(R, K).bfloat16(), None, None]}
    if not floating:
        low = {"low": [torch.randn(2, 5, R), None, None]}
    return {
        "bias": [torch.randn(N), None, torch.randn(N).bfloat16()],
        "up": [torch.randn(N, R).bfloat16() if floating else torch.randn(N, R), None, None],
        **low,
        "gate": [None, torch.randn(N // 2), torch.randn(1, 1, N // 2)],
        "residual": [torch.randn(2, 5, N // 2), None, None],
        "smooth": [None, torch.rand(K) + 0.5, None] if floating else None,
        "rotate": 32 if floating else 0,
        "activation": "geglu",
    }


def singles(op, args, options, **more):
    """Return what the single op makes of each problem."""
    a, a_scale, *weights = args
    outs = []
    for i in range(len(a)):
        own = {k: v[i] if k in LISTS and v is not None else v for k, v in options.items()}
        scale = None if a_scale is None else a_scale[i]
        outs.append(getattr(ops, op)(a[i], scale, *(x[i] for x in weights), **own, **more))
    return outs


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("floating", [True, False])
@pytest.mark.parametrize("impl", ["reference", "native", "triton"])
def test_bits_of_the_single_products(op, floating, impl, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if impl == "native" and _native._C is None:
        pytest.skip("not built")
    if impl == "triton":  # the interpreter has no bfloat16 products
        args = [None if x is None else list(x) for x in problems(op, False, rows=((3,), (2,)))]
        options = {"bias": [torch.randn(40), None], "activation": "gelu"}
    else:
        args, options = problems(op, floating), options_of(op, floating)
    got = ops.gemm_grouped(*args, **options, impl=impl)
    for out, want in zip(got, singles(op, args, options, impl=impl), strict=True):
        assert out.dtype == want.dtype
        assert torch.equal(out, want)


def test_what_is_empty(monkeypatch):
    args = problems("gemm_w8a8", True, rows=((0, 5), (7,)))
    for impl in ("auto", "reference"):
        got = ops.gemm_grouped(*args, impl=impl)
        assert [list(out.shape) for out in got] == [[0, 5, 40], [7, 40]]


def test_the_kernel_gets_lists_in_its_order(monkeypatch):
    """What is empty is left out; what is shared comes once."""
    a, a_scale, w, w_scale = problems("gemm_w8a8", False, rows=((2, 5), (0,), (1, 3)))
    bias, calls = [None, None, torch.randn(40)], []
    monkeypatch.setattr(_native, "call", lambda op, *given: calls.append((op, given)))
    options = {"bias": bias, "activation": "silu"}
    outs = ops.gemm_grouped(a, a_scale, w, w_scale, **options, impl="native")
    ((op, (rows, scales, *weights, biases, low, up, smooth, rotate, name)),) = [
        (op, given[:10]) for op, given in calls
    ]
    end = calls[0][1][10:]
    assert (op, rotate, name) == ("gemm_grouped", [0, 0], "silu")
    assert [list(x.shape) for x in rows] == [[10, 64], [3, 64]]
    assert [list(x.shape) for x in scales] == [[10], [3]]
    for given, kept in zip(weights, (w, w_scale), strict=True):
        assert [x.data_ptr() for x in given] == [kept[i].data_ptr() for i in (0, 2)]
    assert biases[0] is None
    assert torch.equal(biases[1], bias[2])
    assert low == up == smooth == end[0] == end[1] == [None, None]
    assert [x.data_ptr() for x in end[2]] == [outs[i].data_ptr() for i in (0, 2)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": []}, ValueError, "a: expected at least one problem, got 0"),
        ({"a": torch.ones(3, 64)}, TypeError, "a: expected a list of tensors, got Tensor"),
        ({"w": [None, None]}, TypeError, "problem 0: w: expected a tensor, got None"),
        ({"a": [torch.ones(3, 64), None]}, TypeError, "problem 1: a: expected a tensor, got None"),
        ({"a": [None, torch.ones(3, 64)]}, TypeError, "problem 0: a: expected a tensor, got None"),
        ({"out_dtype": torch.int8}, ValueError, "or float16, got torch.int8"),
        ({"out_dtype": torch.float64}, ValueError, "or float16, got torch.float64"),
        ({"bias": [torch.ones(40)]}, ValueError, "bias: expected 2 tensors, one for each a, got 1"),
        ({"bias": [None, torch.ones(9)]}, ValueError, r"problem 1: bias: expected shape \[40\]"),
        ({"gate": torch.ones(40)}, TypeError, "gate: expected a list of tensors, got Tensor"),
        ({"activation": "relu"}, ValueError, "problem 0: activation: expected None or one of"),
    ],
)
def test_what_is_refused(change, error, message):
    names = ("a", "a_scale", "w", "w_scale")
    given = dict(zip(names, problems("gemm_w8a8", True, rows=((3,), (2,))), strict=True)) | change
    first = [given.pop(name) for name in names]
    with pytest.raises(error, match=message):
        ops.gemm_grouped(*first, **given)


def test_problems_have_one_width_and_one_format():
    a, _, w, w_scale = problems("gemm_w8a8", True, rows=((3,), (2,)))
    _, _, wide, wide_scale = problems("gemm_w8a8", True, N=44, rows=((3,),))
    with pytest.raises(
        ValueError, match=r"problem 1: w: expected shape \[40, 64\] as in problem 0"
    ):
        ops.gemm_grouped(a, None, [w[0], *wide], [w_scale[0], *wide_scale])
    _, _, other, other_scale = problems("gemm_fp8", True, rows=((3,),))
    with pytest.raises(
        ValueError, match=r"problem 1: w: expected torch\.int8 on cpu as in problem"
    ):
        ops.gemm_grouped(a, None, [w[0], *other], [w_scale[0], *other_scale])
    with pytest.raises(ValueError, match=r"problem 1: a: expected torch\.bfloat16 on cpu as in"):
        ops.gemm_grouped([a[0], a[1].float()], None, w, w_scale)


def schema_args(a, w, w_scale, impl="reference"):
    none = [None] * len(a)
    return (
        a,
        none,
        w,
        w_scale,
        none,
        none,
        0,
        none,
        none,
        none,
        None,
        none,
        none,
        a[0].dtype,
        impl,
    )


def test_a_derivative_of_any_problem_is_refused():
    a, _, w, w_scale = problems("gemm_w8a8", True, rows=((3,), (2,)))
    with pytest.raises(DerivativeError, match="has no backward here"):
        ops.gemm_grouped([a[0], a[1].clone().requires_grad_()], None, w, w_scale)
    with pytest.raises(DerivativeError, match="has no forward-mode rule"):
        torch.func.jvp(lambda x: ops.gemm_grouped([a[0], x], None, w, w_scale)[0], (a[1],), (a[1],))


def test_a_batch_is_refused_in_words():
    _, _, w, w_scale = problems("gemm_w8a8", True, rows=((3,), (2,)))
    q, q_scale = ops.quantize_int4(torch.randn(8, 64), group=32)
    calls = {
        "gemm_grouped": lambda x: ops.gemm_grouped([x, x], None, w, w_scale)[0],
        "gemv_w4a16_grouped": lambda x: ops.gemv_w4a16_grouped(x, [q], [q_scale])[0],
    }
    for op, call in calls.items():
        with pytest.raises(
            ops.UnsupportedError, match=rf"ops\.{op}: torch\.vmap can't batch lists"
        ):
            torch.vmap(call)(torch.randn(2, 3, 64))


def test_opcheck():
    a, _, w, w_scale = problems("gemm_w8a8", True, rows=((3,), (2,)))
    torch.library.opcheck(
        torch.ops.fewstep.gemm_grouped.default,
        schema_args(a, w, w_scale),
        test_utils=("test_schema", "test_faketensor"),
    )
