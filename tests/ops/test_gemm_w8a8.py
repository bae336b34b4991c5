"""gemm_w8a8: exact sums in every implementation, and the derived budget for the scaling."""

import pytest
import torch

from fewstep import _native, ops
from helpers import DEVICES, padded, padding_intact, row_sliced, strided
from product_rules import (
    BRANCH_DTYPES,
    add_branch,
    bad_branches,
    branch_of,
    check_constants_are_refused,
    check_derivatives,
    check_low_derivatives,
    check_vmap,
    within,
)

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (..., M), N, K: single elements, every remainder of the tiles, leading axes, panel edges.
SHAPES = [
    ((1,), 1, 1),
    ((), 5, 7),
    ((7,), 65, 3),
    ((13,), 130, 77),
    ((2, 3), 48, 66),
    ((2, 1, 5), 17, 4),
    ((50,), 200, 129),
    ((197,), 64, 64),
]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def operands(rows, N, K, device=None):
    a = torch.randint(-128, 128, (*rows, K), dtype=torch.int8)
    w = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    a_scale, w_scale, bias = torch.rand(rows) + 0.1, torch.rand(N) + 0.1, torch.randn(N) * 100
    return [t.to(device) for t in (a, a_scale, w, w_scale, bias)]


def check(args, impl, bias=None, out_dtype=torch.float32, branch=None):
    a, a_scale, w, w_scale = args
    out = ops.gemm_w8a8(*args, bias=bias, out_dtype=out_dtype, impl=impl, **(branch or {}))
    assert out.dtype == out_dtype
    assert out.shape == (*a.shape[:-1], w.shape[0])
    product = a.double() @ w.double().mT * a_scale.double()[..., None] * w_scale.double()
    exact = product if bias is None else product + bias.double()
    # float(acc), two products and the sum: see the docstring of the op.
    before = 3 * 2.0**-24 * product.abs() + 2.0**-24 * exact.abs()
    if branch is not None:
        exact, before = add_branch(exact, before, **branch)
    assert within(out, exact, before)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape, impl, device):
    a, a_scale, w, w_scale, _ = operands(*shape, device)
    out = ops.gemm_w8a8(a, a_scale * 0 + 1, w, w_scale * 0 + 1, impl=impl)
    assert torch.equal(out.double(), a.double() @ w.double().mT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, impl, device):
    *args, bias = operands(*shape, device)
    args[1] /= 1000  # keeps float16 in range
    check(args, impl, out_dtype=dtype)
    check(args, impl, bias=bias, out_dtype=dtype)
    check(args, impl, bias=bias.to(dtype), out_dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 5, 40])
def test_low_rank_branch_matches_oracle(R, dtype, impl, device):
    for rows, N, K in SHAPES[1:]:
        *args, bias = operands(rows, N, K, device)
        args[1] /= 1000
        for dtypes in BRANCH_DTYPES if (N, R) == (130, 5) else BRANCH_DTYPES[:1]:
            branch = {k: v.to(device) for k, v in branch_of(rows, N, R, dtypes).items()}
            check(args, impl, out_dtype=dtype, branch=branch)
            check(args, impl, bias=bias, out_dtype=dtype, branch=branch)


def test_agrees_with_torch_int_mm(impl):
    a, _, w, _, _ = operands((40,), 64, 96)
    out = ops.gemm_w8a8(a, torch.ones(40), w, torch.ones(64), impl=impl)
    assert torch.equal(out, torch._int_mm(a, w.t()).float())


@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_extremes_do_not_saturate(value, isa, monkeypatch):
    # 16-bit intermediates would saturate here; the sums come close to 2^31.
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    K = 131_071
    a = torch.full((2, K), -128, dtype=torch.int8)
    w = torch.full((3, K), value, dtype=torch.int8)
    out = ops.gemm_w8a8(a, torch.ones(2), w, torch.ones(3), impl="native")
    assert torch.equal(out, torch.full((2, 3), float(-128 * value * K)))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    for shape in SHAPES + [((M,), N, 5) for M in range(1, 8) for N in (15, 33, 79, 113)]:
        *args, bias = operands(*shape)
        best = [ops.gemm_w8a8(*args, bias=bias, out_dtype=d, impl="native") for d in DTYPES]
        monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
        for dtype, want in zip(DTYPES, best, strict=True):
            got = ops.gemm_w8a8(*args, bias=bias, out_dtype=dtype, impl="native")
            assert torch.equal(got, want)
        check(args, "native", bias=bias)
        branch = branch_of(shape[0], shape[1], 7)
        got = check(args, "native", bias=bias, branch=branch)
        monkeypatch.delenv("FEWSTEP_CPU_ISA")
        assert torch.equal(got, ops.gemm_w8a8(*args, bias=bias, **branch, impl="native"))


@pytest.mark.parametrize("isa", ["", "avx512", "avx2", "portable"])
@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_outputs_are_rounded_to_nearest_even(isa, bias, monkeypatch):
    """Subnormals, zeros, infinities and NaN too: some machines have an instruction for the rest."""
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    M, N, K = 90, 128 + 16, 8
    a = torch.randint(-128, 128, (M, K), dtype=torch.int8)
    w = torch.randint(-128, 128, (N, K), dtype=torch.int8)
    # Tiles of ordinary numbers, of one kind each and of all of them.
    a_scale = torch.full((M,), 2.0**-8)
    for first, scale in ((12, 1e-42), (24, 1e36), (36, float("nan")), (48, float("inf"))):
        a_scale[first : first + 6] = scale
    a_scale[60:66] = torch.tensor([1e-42, 1, float("inf"), 1e36, 2.0**-130, 1])
    a[70] = 0
    w_scale = torch.ones(N)
    w_scale[64:128] = 1e-38
    given = {"bias": torch.randint(-9, 9, (N,)) * 2.0**-9 if bias else None, "impl": "native"}
    exact = ops.gemm_w8a8(a, a_scale, w, w_scale, **given)
    out = ops.gemm_w8a8(a, a_scale, w, w_scale, out_dtype=torch.bfloat16, **given)
    want = exact.bfloat16()
    assert (want[12:18].abs() < 2.0**-126).any() or bias
    assert torch.equal(out.isnan(), want.isnan())
    number = ~want.isnan()
    assert torch.equal(out.view(torch.int16)[number], want.view(torch.int16)[number])


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    a, a_scale, w, w_scale, bias = operands((3, 19), 70, 71)
    args = [layout(t) for t in (a, a_scale, w, w_scale)]
    check(args, impl, bias=layout(bias))
    check([a.transpose(0, 1), a_scale.t(), w, w_scale], impl)
    branch = branch_of((3, 19), 70, 6)
    check(args, impl, branch={name: layout(x) for name, x in branch.items()})


@pytest.mark.parametrize("shape", SHAPES[3:], ids=str)
def test_native_writes_only_its_outputs(shape):
    rows, N, K = (torch.Size(shape[0]).numel(), *shape[1:])
    a, a_scale, w, w_scale, bias = operands((rows,), N, K)
    plain = (None, 0, "", None, None, None)  # smooth to scale
    for dtype in DTYPES:
        out = padded(torch.zeros(rows, N, dtype=dtype))
        call = [padded(a), padded(a_scale), padded(w), padded(w_scale), padded(bias)]
        for branch in ({}, branch_of((rows,), N, 3)):
            parts = [padded(x) for x in branch.values()] or [None, None]
            _native.call("gemm_w8a8", *call, *parts, *plain, out)
            assert padding_intact(out)
            want = ops.gemm_w8a8(
                a, a_scale, w, w_scale, bias=bias, **branch, out_dtype=dtype, impl="native"
            )
            assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_input_is_quantised_in_the_call(dtype, impl):
    _, _, w, w_scale, bias = operands((2, 9), 40, 33)
    x = torch.randn(2, 9, 33).to(dtype)
    q, scale = ops.quantize_int8(x, impl=impl)
    want = ops.gemm_w8a8(q, scale, w, w_scale, bias=bias, out_dtype=dtype, impl=impl)
    assert torch.equal(ops.gemm_w8a8(x, None, w, w_scale, bias=bias, impl=impl), want)
    wide = ops.gemm_w8a8(x, None, w, w_scale, bias=bias, out_dtype=torch.float32, impl=impl)
    assert wide.dtype == torch.float32
    x[1, 3, 5] = float("inf")
    out = ops.gemm_w8a8(x, None, w, w_scale, impl=impl)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 40


def test_down_is_the_product_that_low_would_be(impl):
    _, _, w, w_scale, bias = operands((), 40, 33)
    x, down, up = torch.randn(2, 9, 33), torch.randn(4, 33), torch.randn(40, 4)
    low = ops.quantize_int8(x, down=down, impl=impl)[2]
    out = ops.gemm_w8a8(x, None, w, w_scale, bias=bias, down=down, up=up, impl=impl)
    want = ops.gemm_w8a8(x, None, w, w_scale, bias=bias, low=low, up=up, impl=impl)
    assert torch.equal(out, want)


def test_a_branch_of_rank_zero_is_none(impl):
    *args, bias = operands((5,), 20, 30)
    want = ops.gemm_w8a8(*args, bias=bias, impl=impl)
    assert torch.equal(ops.gemm_w8a8(*args, bias=bias, **branch_of((5,), 20, 0), impl=impl), want)


def test_nan_in_low_stays_in_its_row(impl):
    args, branch = operands((5,), 20, 30)[:4], branch_of((5,), 20, 3)
    clean = ops.gemm_w8a8(*args, **branch, impl=impl)
    branch["low"][2, 1] = float("nan")
    out = ops.gemm_w8a8(*args, **branch, impl=impl)
    assert out[2].isnan().all()
    assert torch.equal(out[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_nan_scale_makes_its_row_nan_and_no_other(impl):
    a, a_scale, w, w_scale, _ = operands((5,), 20, 30)
    clean = ops.gemm_w8a8(a, a_scale, w, w_scale, out_dtype=torch.bfloat16, impl=impl)
    a_scale[2] = float("nan")
    out = ops.gemm_w8a8(a, a_scale, w, w_scale, out_dtype=torch.bfloat16, impl=impl)
    keep = torch.tensor([0, 1, 3, 4])
    assert out[2].isnan().all()
    assert torch.equal(out[keep], clean[keep])


def test_float16_overflow_is_infinite(impl):
    a, w = torch.full((1, 64), 127, dtype=torch.int8), torch.full((2, 64), 127, dtype=torch.int8)
    w[1] = -127
    out = ops.gemm_w8a8(a, torch.ones(1), w, torch.ones(2), out_dtype=torch.float16, impl=impl)
    assert out.tolist() == [[float("inf"), -float("inf")]]


def test_empty_axes(impl):
    for rows, N, K in (((0,), 5, 4), ((2, 0), 5, 4), ((3,), 0, 4)):
        a, a_scale, w, w_scale, bias = operands(rows, N, K)
        out = ops.gemm_w8a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
        assert out.shape == (*rows, N)
    a, a_scale, w, w_scale, bias = operands((3,), 5, 0)
    out = ops.gemm_w8a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    assert torch.equal(out, bias.expand(3, 5))


@pytest.mark.parametrize("R", [0, 8])
@pytest.mark.parametrize("N", [300, 2300])  # the second's float32 output is beyond large_pages.h's
def test_threads_do_not_change_a_bit(N, R):
    *args, bias = operands((500,), N, 200)
    kwargs = {"bias": bias, "impl": "native"} | (branch_of((500,), N, R) if R else {})
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(ops.gemm_w8a8(*args, **kwargs))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_opcheck():
    *args, bias = operands((2, 6), 20, 32)
    op = torch.ops.fewstep.gemm_w8a8.default
    low, up = branch_of((2, 6), 20, 3).values()
    end = (None, None, None)  # test__epilogue.py has these
    for branch in ((None, None, None), (None, up, low)):
        torch.library.opcheck(op, (*args, bias, None, 0, *branch, *end, torch.bfloat16, "native"))
    x, down = torch.randn(2, 6, 32, requires_grad=True), torch.randn(3, 32, requires_grad=True)
    full = (x, None, *args[2:], bias, None, 0, down, up, None, *end, torch.float32, "native")
    torch.library.opcheck(op, full)


def test_compiles_without_graph_break():
    *args, bias = operands((2, 6), 20, 32)
    compiled = torch.compile(ops.gemm_w8a8, fullgraph=True, backend="aot_eager")
    for branch in ({}, branch_of((2, 6), 20, 3)):
        kwargs = {"bias": bias, "out_dtype": torch.bfloat16} | branch
        assert torch.equal(compiled(*args, **kwargs), ops.gemm_w8a8(*args, **kwargs))


def layer_of(impl, K=40, N=23):
    """Return the op bound to a weight, and that weight dequantised."""
    _, _, w, w_scale, _ = operands((), N, K)
    weight = w.double() * w_scale.double()[:, None]
    return lambda x, **kwargs: ops.gemm_w8a8(x, None, w, w_scale, impl=impl, **kwargs), weight


def test_derivatives_are_those_of_the_dequantised_layer(impl):
    check_derivatives(*layer_of(impl))


def test_derivatives_of_low_beside_integers(impl):
    a, a_scale, w, w_scale, _ = operands((7,), 23, 40)

    def op(x, **kwargs):
        return ops.gemm_w8a8(x, a_scale, w, w_scale, impl=impl, **kwargs)

    check_low_derivatives(op, w.double() * w_scale.double()[:, None], a)


def test_gradients_through_a_compiled_layer():
    op, _ = layer_of("native")
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    inputs = [torch.randn(s, requires_grad=True) for s in ((5, 40), (23,), (3, 40), (23, 3))]

    def gradients(layer):
        x, bias, down, up = inputs
        return torch.autograd.grad(layer(x, bias=bias, down=down, up=up).square().sum(), inputs)

    for got, want in zip(gradients(compiled), gradients(op), strict=True):
        assert torch.equal(got, want)


def test_vmap_over_rows_and_over_the_rest():
    check_vmap(layer_of("native")[0], 40, 23)


def test_scales_have_no_derivative():
    a, a_scale, w, w_scale, _ = operands((6,), 20, 32)

    def call(a_scale, w_scale):
        return ops.gemm_w8a8(a, a_scale, w, w_scale)

    check_constants_are_refused(call, {"a_scale": a_scale, "w_scale": w_scale})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(6, 32)}, r"a: expected torch.int8 .*got torch.float32 \[6, 32\]"),
        ({"w": torch.zeros(32, dtype=torch.int8)}, r"w: expected torch.int8 \[N, K\]"),
        (
            {"w": torch.zeros(20, 31, dtype=torch.int8)},
            r"w: expected shape \[20, 32\], got \[20, 31\]",
        ),
        ({"a_scale": None}, r"a: expected floating \[\.\.\., M, K\], got torch.int8"),
        ({"a_scale": torch.ones(5)}, r"a_scale: expected shape \[6\], got \[5\]"),
        (
            {"w_scale": torch.ones(20).double()},
            "w_scale: expected torch.float32, got torch.float64",
        ),
        ({"bias": torch.ones(19)}, r"bias: expected shape \[20\], got \[19\]"),
        ({"out_dtype": torch.int32}, "out_dtype: expected float32, bfloat16, float16 or int8"),
        ({"impl": "cuda"}, "impl: expected one of"),
        (
            {"down": torch.ones(2, 32), "up": torch.ones(20, 2)},
            "down: expected low instead, because a is torch.int8",
        ),
        *bad_branches(32),
    ],
)
def test_bad_input_names_the_argument(change, message):
    a, a_scale, w, w_scale, _ = operands((6,), 20, 32)
    kwargs = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale} | change
    with pytest.raises(ValueError, match=message):
        ops.gemm_w8a8(**kwargs)


def test_k_too_large_for_exact_sums_is_refused():
    a, w = torch.zeros(1, 1 << 17, dtype=torch.int8), torch.zeros(1, 1 << 17, dtype=torch.int8)
    with pytest.raises(ValueError, match="a: expected K below 131072"):
        ops.gemm_w8a8(a, torch.ones(1), w, torch.ones(1))
