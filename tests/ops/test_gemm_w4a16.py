"""gemm_w4a16: float32 sums over exact products q s in every implementation, within their bound."""

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops.gemm_w4a16 import dequantize_int4
from helpers import DEVICES, padded, padding_intact, row_sliced, strided
from product_rules import (
    BRANCH_DTYPES,
    add_branch,
    bad_branches,
    branch_of,
    check_constants_are_refused,
    check_derivatives,
    check_vmap,
    within,
)

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = ["portable", "avx2", "avx512"]
# (..., M), N, K, G: every group, every remainder of 4 rows x 4 columns, panel edges, leading axes.
SHAPES = [
    ((1,), 1, 32, 32),
    ((), 5, 64, 64),
    ((2,), 130, 96, 32),
    ((3,), 18, 256, 128),
    ((2, 3), 67, 160, 32),
    ((70,), 9, 192, 64),
]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def operands(rows, N, K, group, dtype=torch.float32, scale_dtype=torch.bfloat16, device=None):
    x = torch.randn(*rows, K).to(dtype)
    w = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    w_scale, bias = (torch.rand(N, K // group) + 0.01).to(scale_dtype), torch.randn(N)
    return [t.to(device) for t in (x, w, w_scale, bias)]


def check(args, impl, bias=None, branch=None):
    x, w, w_scale = args
    out = ops.gemm_w4a16(*args, bias=bias, impl=impl, **(branch or {}))
    assert out.dtype == x.dtype
    assert out.shape == (*x.shape[:-1], w.shape[0])
    weight = dequantize_int4(w, w_scale)
    exact = x.double() @ weight.mT
    if bias is not None:
        exact = exact + bias.double()
    # The bound of the op's docstring.
    terms = x.double().abs() @ weight.abs().mT
    before = (x.shape[-1] + 2) * 2.0**-24 * terms + 2.0**-24 * exact.abs()
    if branch is not None:
        exact, before = add_branch(exact, before, **branch)
    assert within(out, exact, before)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, impl, device):
    for scale_dtype in (torch.bfloat16, torch.float16):
        *args, bias = operands(*shape, dtype, scale_dtype, device)
        check(args, impl)
        check(args, impl, bias=bias.to(dtype) if scale_dtype == torch.float16 else bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 5, 40])
def test_low_rank_branch_matches_oracle(R, dtype, impl, device):
    for shape in SHAPES[2:5]:
        *args, bias = operands(*shape, dtype, device=device)
        branch = branch_of(shape[0], shape[1], R, BRANCH_DTYPES[R % 3])
        branch = {name: x.to(device) for name, x in branch.items()}
        check(args, impl, bias=bias, branch=branch)


def test_every_value_of_a_byte_is_multiplied_exactly(impl):
    # Ones in one place: each output is a single product q s, which float32 holds.
    w = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    w_scale = (torch.rand(256, 1) + 0.01).bfloat16()
    for k in (0, 1, 30, 31):
        x = torch.zeros(1, 32)
        x[0, k] = 1
        out = ops.gemm_w4a16(x, w, w_scale, impl=impl)
        assert torch.equal(out[0].double(), dequantize_int4(w, w_scale)[:, k])


def test_every_instruction_set_has_the_same_bits(monkeypatch):
    shapes = SHAPES + [((M,), N, 64, 32) for M in range(1, 6) for N in (1, 2, 3, 4, 66)]
    for i, shape in enumerate(shapes):
        *args, bias = operands(*shape, DTYPES[i % 3], (torch.bfloat16, torch.float16)[i % 2])
        for branch in ({}, branch_of(shape[0], shape[1], 17)):
            outs = []
            for isa in ISAS:
                monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
                outs.append(ops.gemm_w4a16(*args, bias=bias, **branch, impl="native"))
            assert torch.equal(outs[0], outs[1])
            assert torch.equal(outs[0], outs[2])


def test_other_rows_do_not_change_a_bit():
    *args, bias = operands((9,), 70, 96, 32)
    branch = branch_of((9,), 70, 5)
    together = ops.gemm_w4a16(*args, bias=bias, **branch, impl="native")
    for m in range(9):
        one = {"low": branch["low"][m : m + 1], "up": branch["up"]}
        alone = ops.gemm_w4a16(args[0][m : m + 1], *args[1:], bias=bias, **one, impl="native")
        assert torch.equal(alone[0], together[m])


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    *args, bias = operands((3, 7), 70, 96, 32)
    x, w, w_scale = [layout(t) for t in args]
    branch = {name: layout(t) for name, t in branch_of((3, 7), 70, 6).items()}
    check([x, w, w_scale], impl, bias=layout(bias), branch=branch)
    check([x.transpose(0, 1), w, w_scale], impl)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_writes_only_its_outputs(dtype, isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for rows, N, K, group in ((1, 1, 32, 32), (6, 67, 160, 32), (5, 130, 128, 128)):
        x, w, w_scale, bias = operands((rows,), N, K, group, dtype)
        call = [padded(t) for t in (x, w, w_scale, bias)]
        for branch in ({}, branch_of((rows,), N, 3)):
            out = padded(torch.zeros(rows, N, dtype=dtype))
            parts = [padded(t) for t in branch.values()] or [None, None]
            _native.call("gemm_w4a16", *call, *parts, "", None, None, out)
            assert padding_intact(out)
            want = ops.gemm_w4a16(x, w, w_scale, bias=bias, **branch, impl="native")
            assert torch.equal(out, want)


def test_down_is_the_product_that_low_would_be(impl):
    *args, bias = operands((2, 3), 40, 64, 32)
    down, up = torch.randn(4, 64), torch.randn(40, 4)
    low = torch.nn.functional.linear(args[0], down)
    out = ops.gemm_w4a16(*args, bias=bias, down=down, up=up, impl=impl)
    want = ops.gemm_w4a16(*args, bias=bias, low=low, up=up, impl=impl)
    if impl != "reference":
        assert torch.equal(out, want)
    # The reference projects in float64, so low differs by the float32 sums of 64 terms.
    slack = 64 * 2.0**-24 * (args[0].abs() @ down.abs().mT) @ up.abs().mT + 2.0**-22 * want.abs()
    assert ((out - want).abs() <= slack).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_rows_stay_alone(value, impl):
    *args, bias = operands((5,), 20, 64, 32)
    args[1] |= 0x11  # no q is zero, so an infinity stays visible
    clean = ops.gemm_w4a16(*args, bias=bias, impl=impl)
    args[0][2, 33] = value
    out = ops.gemm_w4a16(*args, bias=bias, impl=impl)
    assert not out[2].isfinite().any()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_nan_scale_makes_its_column_nan_and_no_other(impl):
    *args, bias = operands((5,), 20, 64, 32)
    clean = ops.gemm_w4a16(*args, bias=bias, impl=impl)
    args[2][17, 1] = float("nan")
    out = ops.gemm_w4a16(*args, bias=bias, impl=impl)
    assert out[:, 17].isnan().all()
    keep = torch.arange(20) != 17
    assert torch.equal(out[:, keep], clean[:, keep])


def test_float16_overflow_is_infinite(impl):
    x = torch.full((1, 32), 1000.0).half()
    w = torch.stack([torch.full((16,), byte, dtype=torch.uint8) for byte in (0x77, 0x99)])
    out = ops.gemm_w4a16(x, w, torch.ones(2, 1).bfloat16(), impl=impl)
    assert out.tolist() == [[float("inf"), -float("inf")]]


def test_empty_axes(impl):
    for rows, N, K in (((0,), 5, 64), ((2, 0), 5, 64), ((3,), 0, 64)):
        *args, bias = operands(rows, N, K, 32)
        assert ops.gemm_w4a16(*args, bias=bias, impl=impl).shape == (*rows, N)
    w, w_scale = torch.zeros(5, 0, dtype=torch.uint8), torch.zeros(5, 0, dtype=torch.bfloat16)
    bias = torch.randn(5)
    out = ops.gemm_w4a16(torch.zeros(3, 0), w, w_scale, bias=bias, impl=impl)
    assert torch.equal(out, bias.expand(3, 5))


@pytest.mark.parametrize("rows", [1, 150])
def test_threads_do_not_change_a_bit(rows):
    *args, bias = operands((rows,), 700, 256, 64)
    kwargs = {"bias": bias, "impl": "native"} | branch_of((rows,), 700, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.gemm_w4a16(*args, **kwargs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.gemm_w4a16(*args, **kwargs))


def test_opcheck():
    x, w, w_scale, bias = operands((2, 6), 20, 64, 32)
    op = torch.ops.fewstep.gemm_w4a16.default
    low, up = branch_of((2, 6), 20, 3).values()
    end = (None, None, None)  # test__epilogue.py has these
    torch.library.opcheck(op, (x, w, w_scale, None, None, None, None, *end, "native"))
    torch.library.opcheck(op, (x, w, w_scale, bias, None, up, low, *end, "native"))
    x, down = x.requires_grad_(), torch.randn(3, 64, requires_grad=True)
    torch.library.opcheck(op, (x, w, w_scale, bias, down, up, None, *end, "native"))


def test_compiles_without_graph_break():
    *args, bias = operands((2, 6), 20, 64, 32, torch.bfloat16)
    compiled = torch.compile(ops.gemm_w4a16, fullgraph=True, backend="aot_eager")
    for branch in ({}, branch_of((2, 6), 20, 3)):
        kwargs = {"bias": bias} | branch
        assert torch.equal(compiled(*args, **kwargs), ops.gemm_w4a16(*args, **kwargs))


def layer_of(impl):
    """Return the op bound to a weight, and that weight dequantised."""
    _, w, w_scale, _ = operands((), 23, 64, 32)
    weight = dequantize_int4(w, w_scale)
    return lambda x, **kwargs: ops.gemm_w4a16(x, w, w_scale, impl=impl, **kwargs), weight


def test_derivatives_are_those_of_the_dequantised_layer(impl):
    check_derivatives(*layer_of(impl))


def test_vmap_over_rows_and_over_the_rest():
    check_vmap(layer_of("native")[0], 64, 23)


def test_scale_has_no_derivative():
    x, w, w_scale, _ = operands((6,), 20, 64, 32)
    check_constants_are_refused(lambda w_scale: ops.gemm_w4a16(x, w, w_scale), {"w_scale": w_scale})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 64, dtype=torch.int8)}, r"x: expected floating \[\.\.\., M, K\]"),
        ({"x": torch.zeros(6, 64).double()}, "x: expected floating .*got torch.float64"),
        ({"x": torch.zeros(6, 63)}, "x: expected an even K, got 63"),
        ({"x": torch.zeros(6, 96)}, r"w: expected shape \[20, 48\], got \[20, 32\]"),
        ({"w": torch.zeros(20, 32, dtype=torch.int8)}, r"w: expected torch.uint8 \[N, K / 2\]"),
        ({"w_scale": torch.ones(20, 2)}, r"w_scale: expected bfloat16 or float16 \[20, 64 / G\]"),
        ({"bias": torch.ones(19)}, r"bias: expected shape \[20\], got \[19\]"),
        ({"impl": "cuda"}, "impl: expected one of"),
        (
            {"down": torch.ones(2, 64).bfloat16(), "up": torch.ones(20, 2)},
            "down: expected torch.float32, got torch.bfloat16",
        ),
        *bad_branches(64),
    ],
)
def test_bad_input_names_the_argument(change, message):
    x, w, w_scale, _ = operands((6,), 20, 64, 32)
    kwargs = {"x": x, "w": w, "w_scale": w_scale} | change
    with pytest.raises(ValueError, match=message):
        ops.gemm_w4a16(**kwargs)
