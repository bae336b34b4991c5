"""gemm_fp8: exact products, float32 sums in every implementation, the derived budget for both."""

import pytest
import torch

from fewstep import _native, ops
from fewstep.reference._epilogue import finish
from fewstep.reference._prologue import rotate_blocks
from fp8_operands import E4M3, ISAS, integers, numbers, operands
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


PREPARED = [("smooth",), ("rotate",), ("smooth", "rotate")]


def prepared(names, K=48):
    """Return what may come before the rows are quantised."""
    values = {"smooth": torch.rand(K) + 0.5, "rotate": 16}
    return {name: values[name] for name in names}


def check(args, impl, bias=None, out_dtype=torch.float32, branch=None):
    a, a_scale, w, w_scale = args
    out = ops.gemm_fp8(*args, bias=bias, out_dtype=out_dtype, impl=impl, **(branch or {}))
    assert out.dtype == out_dtype
    assert out.shape == (*a.shape[:-1], w.shape[0])
    a, w, K = a.double(), w.double(), a.shape[-1]
    scales = a_scale.double()[..., None] * w_scale.double()
    product, terms = a @ w.mT * scales, a.abs() @ w.abs().mT * scales
    exact = product if bias is None else product + bias.double()
    # See the docstring of the op; tensor cores' worst case needs one term that dwarfs all others.
    before = (K + 3) * 2.0**-24 * terms + 2.0**-24 * exact.abs()
    if impl == "triton":
        before = before + 2.0**-9 * terms
    if branch is not None:
        exact, before = add_branch(exact, before, **branch)
    assert within(out, exact, before)
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_integers_are_exact(shape, impl, device):
    a, a_scale, w, w_scale, _ = operands(*shape, device, draw=integers)
    out = ops.gemm_fp8(a, a_scale * 0 + 1, w, w_scale * 0 + 1, impl=impl)
    assert torch.equal(out.double(), a.double() @ w.double().mT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, impl, device):
    *args, bias = operands(*shape, device)
    check(args, impl, out_dtype=dtype)
    check(args, impl, bias=bias, out_dtype=dtype)
    check(args, impl, bias=bias.to(dtype), out_dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("R", [1, 5, 40])
def test_low_rank_branch_matches_oracle(R, dtype, impl, device):
    for rows, N, K in SHAPES[1:]:
        *args, bias = operands(rows, N, K, device)
        for dtypes in BRANCH_DTYPES if (N, R) == (130, 5) else BRANCH_DTYPES[:1]:
            branch = {k: v.to(device) for k, v in branch_of(rows, N, R, dtypes).items()}
            check(args, impl, out_dtype=dtype, branch=branch)
            check(args, impl, bias=bias, out_dtype=dtype, branch=branch)


def test_every_value_comes_through(impl):
    """1 x each of the 256 bytes, from either side; NaN stays in its row or column."""
    q = torch.arange(256, dtype=torch.uint8).view(E4M3)
    one, ones = torch.ones(1), torch.ones(256)
    for k in (1, 2, 33):  # even and odd places of a pair, whole vectors and their ends
        unit = torch.nn.functional.one_hot(torch.tensor([k - 1]), k).float().to(E4M3)
        values = torch.zeros(256, k).to(E4M3)
        values[:, k - 1] = q
        want = q.float()
        for out in (
            ops.gemm_fp8(unit, one, values, ones, impl=impl)[0],
            ops.gemm_fp8(values, ones, unit, one, impl=impl)[:, 0],
        ):
            torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


def test_nan_stays_in_its_row_and_column(impl):
    a, a_scale, w, w_scale, _ = operands((5,), 20, 30)
    clean = ops.gemm_fp8(a, a_scale, w, w_scale, impl=impl)
    a.view(torch.uint8)[1, 29], w.view(torch.uint8)[7, 0] = 0x7F, 0xFF
    a_scale[3] = float("nan")
    out = ops.gemm_fp8(a, a_scale, w, w_scale, impl=impl)
    poisoned = torch.zeros_like(out, dtype=torch.bool)
    poisoned[[1, 3]], poisoned[:, 7] = True, True
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])


def test_agrees_with_torch_scaled_mm(impl):
    a, w, one = numbers(32, 96), numbers(64, 96), torch.ones(())
    a_scale, w_scale = torch.full((32,), 2.0**-7), torch.full((64,), 2.0**-7)
    want = torch._scaled_mm(a, w.t(), one / 128, one / 128, out_dtype=torch.bfloat16)
    out = ops.gemm_fp8(a, a_scale, w, w_scale, out_dtype=torch.bfloat16, impl=impl)
    terms = a.double().abs() @ w.double().abs().mT * 2.0**-14
    # Each of the two within its bound and half a unit of bfloat16.
    slack = 2 * 2.0**-9 * terms + 2.0**-7 * want.double().abs()
    assert ((out.double() - want.double()).abs() <= slack).all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa, monkeypatch):
    # Few rows and many k: slices of K that go on from sums in memory.
    for shape in SHAPES + [((M,), N, 5) for M in range(1, 8) for N in (15, 33, 79, 113)] + [
        ((3,), 70, 300), ((9,), 70, 3100)
    ]:  # fmt: skip
        *args, bias = operands(*shape)
        best = [ops.gemm_fp8(*args, bias=bias, out_dtype=d, impl="native") for d in DTYPES]
        monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
        for dtype, want in zip(DTYPES, best, strict=True):
            got = ops.gemm_fp8(*args, bias=bias, out_dtype=dtype, impl="native")
            assert torch.equal(got, want)
        check(args, "native", bias=bias)
        branch = branch_of(shape[0], shape[1], 7)
        got = check(args, "native", bias=bias, branch=branch)
        monkeypatch.delenv("FEWSTEP_CPU_ISA")
        assert torch.equal(got, ops.gemm_fp8(*args, bias=bias, **branch, impl="native"))


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_quantises_alike(isa, monkeypatch):
    _, _, w, w_scale, _ = operands((), 40, 48)
    for dtype in DTYPES:
        x = torch.randn(9, 48).to(dtype)
        for first in ({}, *map(prepared, PREPARED)):
            want = ops.gemm_fp8(x, None, w, w_scale, **first, impl="native")
            monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
            assert torch.equal(ops.gemm_fp8(x, None, w, w_scale, **first, impl="native"), want)
            monkeypatch.delenv("FEWSTEP_CPU_ISA")


def test_a_row_does_not_depend_on_the_others():
    """Neither on how many there are, which chooses tiles and slices of K."""
    *args, bias = operands((200,), 130, 3100)
    a, a_scale, w, w_scale = args
    want = ops.gemm_fp8(*args, bias=bias, impl="native")
    for M in (1, 8, 9, 193):
        out = ops.gemm_fp8(a[:M], a_scale[:M], w, w_scale, bias=bias, impl="native")
        assert torch.equal(out, want[:M])


@pytest.mark.parametrize("activation", [None, "gelu", "geglu"])
def test_slices_of_k_meet_what_follows(activation):
    """Of the same bits as torch's y in one piece, whichever slices the number of rows chooses."""
    args = operands((20,), 140, 1600)[:4]
    gate, residual = torch.randn(140), torch.randn(20, 140)
    if activation == "geglu":
        gate, residual = gate[:70], residual[:, :70]
    end = {"activation": activation, "gate": gate}
    out = ops.gemm_fp8(*args, **end, residual=residual, impl="native")
    y = ops.gemm_fp8(*args, impl="native").double()
    want = finish(y, activation, gate, residual)
    assert ((out - want).abs() <= 2.0**-19 * (y.abs().amax() ** 2 + 1)).all()
    for M in (1, 8, 9):
        few = (args[0][:M], args[1][:M], *args[2:])
        some = ops.gemm_fp8(*few, **end, residual=residual[:M], impl="native")
        assert torch.equal(some, out[:M])


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
    for dtype in DTYPES:
        out = padded(torch.zeros(rows, N, dtype=dtype))
        plain = (None, 0, "", None, None, None)  # smooth to scale
        call = [padded(a.view(torch.uint8)), padded(a_scale), padded(w.view(torch.uint8))]
        for branch in ({}, branch_of((rows,), N, 3)):
            parts = [padded(x) for x in branch.values()] or [None, None]
            _native.call("gemm_fp8", *call, padded(w_scale), padded(bias), *parts, *plain, out)
            assert padding_intact(out)
            want = ops.gemm_fp8(
                a, a_scale, w, w_scale, bias=bias, **branch, out_dtype=dtype, impl="native"
            )
            assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_input_is_quantised_in_the_call(dtype, impl):
    _, _, w, w_scale, bias = operands((), 40, 33)
    x = torch.randn(2, 9, 33).to(dtype)
    q, scale = ops.quantize_fp8(x, impl=impl)
    want = ops.gemm_fp8(q, scale, w, w_scale, bias=bias, out_dtype=dtype, impl=impl)
    assert torch.equal(ops.gemm_fp8(x, None, w, w_scale, bias=bias, impl=impl), want)
    wide = ops.gemm_fp8(x, None, w, w_scale, bias=bias, out_dtype=torch.float32, impl=impl)
    assert wide.dtype == torch.float32
    x[1, 3, 5] = float("inf")
    out = ops.gemm_fp8(x, None, w, w_scale, impl=impl)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 40


@pytest.mark.parametrize("names", PREPARED, ids="-".join)
def test_rows_are_smoothed_and_rotated_as_by_quantize_fp8(names, impl):
    _, _, w, w_scale, bias = operands((), 40, 48)
    first = prepared(names)
    for dtype in DTYPES:
        x = torch.randn(2, 9, 48).to(dtype)
        q, scale = ops.quantize_fp8(x, **first, impl=impl)
        want = ops.gemm_fp8(q, scale, w, w_scale, bias=bias, out_dtype=dtype, impl=impl)
        got = ops.gemm_fp8(x, None, w, w_scale, bias=bias, **first, impl=impl)
        assert torch.equal(got, want)


def test_down_is_the_product_that_low_would_be(impl):
    _, _, w, w_scale, bias = operands((), 40, 33)
    x, down, up = torch.randn(2, 9, 33), torch.randn(4, 33), torch.randn(40, 4)
    low = torch.nn.functional.linear(x, down)
    out = ops.gemm_fp8(x, None, w, w_scale, bias=bias, down=down, up=up, impl=impl)
    want = ops.gemm_fp8(x, None, w, w_scale, bias=bias, low=low, up=up, impl=impl)
    if impl != "reference":
        assert torch.equal(out, want)
    # The reference projects in float64, so low differs by the float32 sums of 33 terms.
    slack = 33 * 2.0**-24 * (x.abs() @ down.abs().mT) @ up.abs().mT + 2.0**-22 * want.abs()
    assert ((out - want).abs() <= slack).all()


def test_empty_axes(impl):
    for rows, N, K in (((0,), 5, 4), ((2, 0), 5, 4), ((3,), 0, 4)):
        a, a_scale, w, w_scale, bias = operands(rows, N, K)
        out = ops.gemm_fp8(a, a_scale, w, w_scale, bias=bias, impl=impl)
        assert out.shape == (*rows, N)
    a, a_scale, w, w_scale, bias = operands((3,), 5, 0)
    out = ops.gemm_fp8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    assert torch.equal(out, bias.expand(3, 5))


@pytest.mark.parametrize("R", [0, 8])
def test_threads_do_not_change_a_bit(R):
    *args, bias = operands((500,), 300, 200)
    kwargs = {"bias": bias, "impl": "native"} | (branch_of((500,), 300, R) if R else {})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.gemm_fp8(*args, **kwargs)
        torch.set_num_threads(2)
        assert torch.equal(one, ops.gemm_fp8(*args, **kwargs))
    finally:
        torch.set_num_threads(threads)


def test_a_layer_errs_as_e4m3_does(impl):
    """28.6 dB for normal operands, and no less for tails or columns of different sizes.

    A value in [1, 2) times a power of two errs by 2^-3 / sqrt(12) of that power. For values spread
    evenly that is 5.6e-4 of their mean square, 7/3, or -32.5 dB; an operand of normal values, of
    which more are small in their binade, has -31.7, and the errors of two add up to 3 dB more.
    """
    w = torch.randn(160, 128)
    q, scale = ops.quantize_fp8(w)

    def decibels(x):
        exact = x.double() @ w.double().mT
        out = ops.gemm_fp8(x, None, q, scale, impl=impl).double()
        return float(10 * torch.log10(exact.square().sum() / (out - exact).square().sum()))

    x = torch.randn(64, 128)
    assert 28.2 < decibels(x) < 29.2
    tails = torch.randn(64, 128) / torch.randn(4, 64, 128).square().mean(0).sqrt()  # Student, 4
    sizes = 2.0 ** torch.arange(-4, 4, 1 / 16)
    assert decibels(tails) > 28.2
    assert decibels(x * sizes) > 28.2


def test_opcheck():
    *args, bias = operands((2, 6), 20, 32)
    op = torch.ops.fewstep.gemm_fp8.default
    low, up = branch_of((2, 6), 20, 3).values()
    end = (None, None, None, torch.bfloat16, "native")
    # Its schema check compares tensors by arithmetic that torch lacks for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    x, down = torch.randn(2, 6, 32, requires_grad=True), torch.randn(3, 32, requires_grad=True)
    full = (x, None, *args[2:], bias, torch.rand(32) + 1, 16, down, up, None, *end)
    torch.library.opcheck(op, full, test_utils=checks)
    for branch in ((None, None, None), (None, up, low)):
        call = (*args, bias, None, 0, *branch, *end)
        torch.library.opcheck(op, call, test_utils="test_faketensor")
        inputs = [x if isinstance(x, torch.Tensor) else None for x in call]
        before = [None if x is None else x.double() for x in inputs]
        op(*call)
        assert all(
            x is None or torch.equal(x.double(), y) for x, y in zip(inputs, before, strict=True)
        )


def test_compiles_without_graph_break():
    *args, bias = operands((2, 6), 20, 32)
    compiled = torch.compile(ops.gemm_fp8, fullgraph=True, backend="aot_eager")
    for branch in ({}, branch_of((2, 6), 20, 3)):
        kwargs = {"bias": bias, "out_dtype": torch.bfloat16} | branch
        assert torch.equal(compiled(*args, **kwargs), ops.gemm_fp8(*args, **kwargs))


def layer_of(impl, K=40, N=23):
    """Return the op bound to a weight, and that weight dequantised."""
    w, w_scale = ops.quantize_fp8(torch.randn(N, K))
    weight = w.double() * w_scale.double()[:, None]
    return lambda x, **kwargs: ops.gemm_fp8(x, None, w, w_scale, impl=impl, **kwargs), weight


def test_derivatives_are_those_of_the_dequantised_layer(impl):
    check_derivatives(*layer_of(impl))


@pytest.mark.parametrize("names", PREPARED, ids="-".join)
def test_derivatives_with_smoothing_and_rotation(names):
    op, weight = layer_of("native", 48)
    first = prepared(names)
    if "rotate" in first:
        weight = rotate_blocks(weight, 16)
    if "smooth" in first:
        weight = weight / first["smooth"].double()
    check_derivatives(lambda x, **kwargs: op(x, **first, **kwargs), weight)


def test_derivatives_of_low_beside_e4m3(impl):
    a, a_scale, w, w_scale, _ = operands((7,), 23, 40)

    def op(x, **kwargs):
        return ops.gemm_fp8(x, a_scale, w, w_scale, impl=impl, **kwargs)

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


def test_quantised_operands_and_scales_have_no_derivative():
    a, a_scale, w, w_scale, _ = operands((6,), 20, 32)

    def call(a_scale, w_scale):
        return ops.gemm_fp8(a, a_scale, w, w_scale)

    check_constants_are_refused(call, {"a_scale": a_scale, "w_scale": w_scale})
    for name, args in (
        ("a", (a.clone().requires_grad_(), a_scale, w, w_scale)),
        ("w", (a, a_scale, w.clone().requires_grad_(), w_scale)),
    ):
        with pytest.raises(ops._register.DerivativeError, match=f"^{name}: expected a constant"):
            ops.gemm_fp8(*args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"a": torch.zeros(6, 32)},
            r"a: expected torch.float8_e4m3fn .*got torch.float32 \[6, 32\]",
        ),
        ({"a": torch.zeros(6, 32).to(torch.float8_e5m2)}, "a: .*got torch.float8_e5m2"),
        ({"a_scale": None}, r"a: expected floating \[\.\.\., M, K\], got torch.float8_e4m3fn"),
        (
            {"w": torch.zeros(32).to(E4M3)},
            r"w: expected torch.float8_e4m3fn \[N, K\], got .*\[32\]",
        ),
        ({"w": torch.zeros(20, 32, dtype=torch.int8)}, "w: expected torch.float8_e4m3fn .*int8"),
        ({"w": torch.zeros(20, 31).to(E4M3)}, r"w: expected shape \[20, 32\], got \[20, 31\]"),
        ({"a_scale": torch.ones(6, 2)}, r"a_scale: expected shape \[6, 1\], got \[6, 2\]"),
        (
            {"w_scale": torch.ones(20).double()},
            "w_scale: expected torch.float32, got torch.float64",
        ),
        ({"bias": torch.ones(19)}, r"bias: expected shape \[20\], got \[19\]"),
        ({"smooth": torch.ones(32)}, "smooth: expected none, because a is quantised already"),
        ({"rotate": 16}, "rotate: expected none, because a is quantised already"),
        ({"out_dtype": torch.int32}, "out_dtype: expected float32, bfloat16, float16 or int8"),
        ({"activation": "relu"}, "activation: expected None or one of .*, got 'relu'"),
        ({"impl": "cuda"}, "impl: expected one of"),
        (
            {"down": torch.ones(2, 32), "up": torch.ones(20, 2)},
            "down: expected low instead, because a is torch.float8_e4m3fn",
        ),
        *bad_branches(32),
    ],
)
def test_bad_input_names_the_argument(change, message):
    a, a_scale, w, w_scale, _ = operands((6,), 20, 32)
    kwargs = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale} | change
    with pytest.raises(ValueError, match=message):
        ops.gemm_fp8(**kwargs)
