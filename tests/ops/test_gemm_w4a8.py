"""gemm_w4a8: the integers of the folded weight, and then gemm_w8a8 to the bit.

test_gemm_w8a8.py holds what the two have in common to the error bounds; here the product with a
4-bit weight is compared with that of the int8 weight it stands for.
"""

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops.gemm_w4a8 import fold_int4
from fewstep.ops.quantize_int4 import unpack_nibbles
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
ISAS = ["portable", "avx2", "avx512"]
# (..., M), N, K, G: every group, remainders of the tiles, panel edges, more than one slice of K.
SHAPES = [
    ((1,), 1, 32, 32),
    ((), 5, 64, 64),
    ((7,), 65, 96, 32),
    ((13,), 130, 128, 128),
    ((2, 3), 48, 416, 32),
    ((50,), 200, 192, 64),
    ((197,), 17, 128, 64),
]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def weight_of(N, K, group, dtype=torch.bfloat16, device=None):
    w = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    w_scale = (torch.rand(N, K // group) + 0.01).to(dtype)
    return w.to(device), w_scale.to(device)


def operands(rows, N, K, group, dtype=torch.bfloat16, device=None):
    a = torch.randint(-128, 128, (*rows, K), dtype=torch.int8)
    a_scale, bias = (torch.rand(rows) + 0.1) / 100, torch.randn(N) * 10
    weight = weight_of(N, K, group, dtype, device)
    return [a.to(device), a_scale.to(device), *weight, bias.to(device)]


def check(args, impl, bias=None, out_dtype=torch.float32, branch=None):
    a, a_scale, w, w_scale = args
    out = ops.gemm_w4a8(*args, bias=bias, out_dtype=out_dtype, impl=impl, **(branch or {}))
    assert out.dtype == out_dtype
    assert out.shape == (*a.shape[:-1], w.shape[0])
    w8, scale = fold_int4(w, w_scale)
    product = a.double() @ w8.double().mT * a_scale.double()[..., None] * scale.double()
    exact = product if bias is None else product + bias.double()
    before = 3 * 2.0**-24 * product.abs() + 2.0**-24 * exact.abs()
    if branch is not None:
        exact, before = add_branch(exact, before, **branch)
    assert within(out, exact, before)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_fold_is_the_formula(dtype):
    """Every q with every factor that a scale can have, in whole numbers."""
    top = torch.tensor([1.0, 0.37, 3e-5]).to(dtype)
    ratios = torch.cat([torch.rand(500), torch.tensor([0.0, 2.0**-13, 1.0])])
    w_scale = torch.cat([(top[:, None].float() * ratios).to(dtype), top[:, None]], 1)
    w_scale = torch.minimum(w_scale, top[:, None])
    q = torch.arange(-8, 8, dtype=torch.int8).repeat(2).repeat(3, w_scale.shape[1])
    halves = (q.view(torch.uint8) & 15).unflatten(1, (-1, 2))
    w = halves[..., 0] | (halves[..., 1] << 4)
    assert torch.equal(unpack_nibbles(w), q)
    w8, scale = fold_int4(w, w_scale)
    for row in range(3):
        for g, s in enumerate(w_scale[row].tolist()):
            f = round(float(4096 * (torch.tensor(s) / torch.tensor(w_scale[row, -1].item()))))
            want = [(v * f + 128) // 256 for v in range(-8, 8)]
            assert w8[row, 32 * g : 32 * g + 16].tolist() == want
    assert torch.equal(scale, top.float() / 16)
    # The bound of the docstring, in units of the largest weight's 1/112.
    exact = q.double().unflatten(1, (w_scale.shape[1], -1)) * w_scale.double()[..., None]
    error = w8.double() - exact.flatten(1) / scale.double()[:, None]
    assert error.abs().max() <= 0.5 + 8 / 512


def test_values_at_both_ends_of_the_fold(impl):
    # Factors 4096 with q = -8 and 7 are the ends of int8's range and of the 16-bit intermediates.
    a = torch.randint(-128, 128, (3, 64), dtype=torch.int8)
    for byte, value in ((0x88, -128), (0x77, 112)):
        w = torch.full((2, 32), byte, dtype=torch.uint8)
        out = ops.gemm_w4a8(a, torch.ones(3), w, torch.full((2, 1), 16.0).bfloat16(), impl=impl)
        assert torch.equal(out, (a.sum(1, dtype=torch.int32) * value).float()[:, None].expand(3, 2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(shape, scale_dtype, impl, device):
    a, a_scale, w, w_scale, _ = operands(*shape, scale_dtype, device)
    w_scale[:, 0] = 16  # so that the column's scale is 1
    out = ops.gemm_w4a8(a, a_scale * 0 + 1, w, w_scale, impl=impl)
    assert torch.equal(out.double(), a.double() @ fold_int4(w, w_scale)[0].double().mT)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_oracle(dtype, impl, device):
    for shape in SHAPES:
        *args, bias = operands(*shape, device=device)
        check(args, impl, out_dtype=dtype)
        check(args, impl, bias=bias.to(dtype), out_dtype=dtype)
    for i, R in enumerate((1, 5, 40)):
        branch = branch_of((13,), 130, R, BRANCH_DTYPES[i])
        branch = {name: x.to(device) for name, x in branch.items()}
        *args, bias = operands(*SHAPES[3], device=device)
        check(args, impl, bias=bias, out_dtype=dtype, branch=branch)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_bits_of_gemm_w8a8(isa, monkeypatch):
    shapes = SHAPES + [((M,), N, 160, 32) for M in (1, 4, 6, 8, 9) for N in (15, 33, 79, 113)]
    for i, shape in enumerate(shapes):
        scale_dtype = (torch.bfloat16, torch.float16)[i % 2]
        a, a_scale, w, w_scale, bias = operands(*shape, scale_dtype)
        w8, scale = fold_int4(w, w_scale)
        for branch in ({}, branch_of(shape[0], shape[1], 7)):
            kwargs = {"bias": bias, "out_dtype": DTYPES[i % 3], "impl": "native"} | branch
            want = ops.gemm_w8a8(a, a_scale, w8, scale, **kwargs)
            monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
            assert torch.equal(ops.gemm_w4a8(a, a_scale, w, w_scale, **kwargs), want)
            monkeypatch.delenv("FEWSTEP_CPU_ISA")


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    *args, bias = operands((3, 19), 70, 96, 32)
    a, a_scale, w, w_scale = [layout(t) for t in args]
    branch = {name: layout(x) for name, x in branch_of((3, 19), 70, 6).items()}
    check([a, a_scale, w, w_scale], impl, bias=layout(bias), branch=branch)
    check([a.transpose(0, 1), a_scale.t(), w, w_scale], impl)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_native_writes_only_its_outputs(shape, isa, monkeypatch):
    rows, N, K, group = (torch.Size(shape[0]).numel(), *shape[1:])
    a, a_scale, w, w_scale, bias = operands((rows,), N, K, group)
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    call = [padded(t) for t in (a, a_scale, w, w_scale, bias)]
    plain = (None, 0, "", None, None, None)  # smooth to scale
    for branch in ({}, branch_of((rows,), N, 3)):
        out = padded(torch.zeros(rows, N))
        parts = [padded(x) for x in branch.values()] or [None, None]
        _native.call("gemm_w4a8", *call, *parts, *plain, out)
        assert padding_intact(out)
        want = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, **branch, impl="native")
        assert torch.equal(out, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_input_is_quantised_in_the_call(dtype, impl):
    _, _, w, w_scale, bias = operands((), 40, 96, 32)
    x = torch.randn(2, 9, 96).to(dtype)
    q, scale = ops.quantize_int8(x, impl=impl)
    want = ops.gemm_w4a8(q, scale, w, w_scale, bias=bias, out_dtype=dtype, impl=impl)
    assert torch.equal(ops.gemm_w4a8(x, None, w, w_scale, bias=bias, impl=impl), want)
    x[1, 3, 5] = float("inf")
    out = ops.gemm_w4a8(x, None, w, w_scale, impl=impl)
    assert out[1, 3].isnan().all()
    assert out.isnan().sum() == 40


@pytest.mark.parametrize("rows", [3, 20])
@pytest.mark.parametrize("negative", [False, True])
def test_nan_scale_makes_its_column_nan_and_no_other(rows, negative, impl):
    a, a_scale, w, w_scale, bias = operands((rows,), 70, 96, 32)
    clean = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    # The sign of a NaN says nothing, but x86 makes them with one.
    bits = torch.tensor(-0x40 if negative else 0x7FC0, dtype=torch.int16)
    w_scale[66, 1] = bits.view(torch.bfloat16)
    assert w_scale[66, 1].isnan()
    out = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    assert out[:, 66].isnan().all()
    keep = torch.arange(70) != 66
    assert torch.equal(out[:, keep], clean[:, keep])


def test_column_of_zero_scales_is_the_bias(impl):
    a, a_scale, w, w_scale, bias = operands((9,), 20, 64, 32)
    w_scale[3] = 0
    out = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    assert torch.equal(out[:, 3], bias[3].expand(9))


def test_empty_axes(impl):
    for rows, N, K in (((0,), 5, 64), ((2, 0), 5, 64), ((3,), 0, 64)):
        a, a_scale, w, w_scale, bias = operands(rows, N, K, 32)
        out = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
        assert out.shape == (*rows, N)
    a, a_scale, bias = torch.zeros(3, 0, dtype=torch.int8), torch.ones(3), torch.randn(5)
    w, w_scale = torch.zeros(5, 0, dtype=torch.uint8), torch.zeros(5, 0, dtype=torch.bfloat16)
    out = ops.gemm_w4a8(a, a_scale, w, w_scale, bias=bias, impl=impl)
    assert torch.equal(out, bias.expand(3, 5))


@pytest.mark.parametrize("rows", [5, 500])
def test_threads_do_not_change_a_bit(rows):
    *args, bias = operands((rows,), 1100, 256, 64)
    kwargs = {"bias": bias, "impl": "native"} | branch_of((rows,), 1100, 8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.gemm_w4a8(*args, **kwargs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.gemm_w4a8(*args, **kwargs))


def test_opcheck():
    *args, bias = operands((2, 6), 20, 64, 32)
    op = torch.ops.fewstep.gemm_w4a8.default
    low, up = branch_of((2, 6), 20, 3).values()
    end = (None, None, None)  # test__epilogue.py has these
    for branch in ((None, None, None), (None, up, low)):
        torch.library.opcheck(op, (*args, bias, None, 0, *branch, *end, torch.bfloat16, "native"))
    x, down = torch.randn(2, 6, 64, requires_grad=True), torch.randn(3, 64, requires_grad=True)
    full = (x, None, *args[2:], bias, None, 0, down, up, None, *end, torch.float32, "native")
    torch.library.opcheck(op, full)


def test_compiles_without_graph_break():
    *args, bias = operands((2, 6), 20, 64, 32)
    compiled = torch.compile(ops.gemm_w4a8, fullgraph=True, backend="aot_eager")
    for branch in ({}, branch_of((2, 6), 20, 3)):
        kwargs = {"bias": bias, "out_dtype": torch.bfloat16} | branch
        assert torch.equal(compiled(*args, **kwargs), ops.gemm_w4a8(*args, **kwargs))


def layer_of(impl):
    """Return the op bound to a weight, and that weight dequantised: the folded one, which it is."""
    w, w_scale = weight_of(23, 64, 32)
    w8, scale = fold_int4(w, w_scale)
    weight = w8.double() * scale.double()[:, None]
    return lambda x, **kwargs: ops.gemm_w4a8(x, None, w, w_scale, impl=impl, **kwargs), weight


def test_derivatives_are_those_of_the_dequantised_layer(impl):
    check_derivatives(*layer_of(impl))


def test_derivatives_of_low_beside_integers(impl):
    a, a_scale, w, w_scale, _ = operands((7,), 23, 64, 32)
    w8, scale = fold_int4(w, w_scale)

    def op(x, **kwargs):
        return ops.gemm_w4a8(x, a_scale, w, w_scale, impl=impl, **kwargs)

    check_low_derivatives(op, w8.double() * scale.double()[:, None], a)


def test_vmap_over_rows_and_over_the_rest():
    check_vmap(layer_of("native")[0], 64, 23)


def test_scales_have_no_derivative():
    a, a_scale, w, w_scale, _ = operands((6,), 20, 64, 32)

    def call(a_scale, w_scale):
        return ops.gemm_w4a8(a, a_scale, w, w_scale)

    check_constants_are_refused(call, {"a_scale": a_scale, "w_scale": w_scale})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(6, 64)}, r"a: expected torch.int8 .*got torch.float32 \[6, 64\]"),
        ({"a": torch.zeros(6, 63, dtype=torch.int8)}, "a: expected an even K, got 63"),
        ({"w": torch.zeros(20, 32, dtype=torch.int8)}, r"w: expected torch.uint8 \[N, K / 2\]"),
        ({"a": torch.zeros(6, 96, dtype=torch.int8)}, r"w: expected shape \[20, 48\]"),
        ({"w_scale": torch.ones(20, 2)}, r"w_scale: expected bfloat16 or float16 \[20, 64 / G\]"),
        ({"w_scale": torch.ones(20, 4).bfloat16()}, r"w_scale: expected .*got torch.bfloat16"),
        ({"a_scale": None}, r"a: expected floating \[\.\.\., M, K\], got torch.int8"),
        ({"a_scale": torch.ones(5)}, r"a_scale: expected shape \[6\], got \[5\]"),
        ({"bias": torch.ones(19)}, r"bias: expected shape \[20\], got \[19\]"),
        ({"out_dtype": torch.int32}, "out_dtype: expected float32, bfloat16, float16 or int8"),
        ({"impl": "cuda"}, "impl: expected one of"),
        (
            {"down": torch.ones(2, 64), "up": torch.ones(20, 2)},
            "down: expected low instead, because a is torch.int8",
        ),
        *bad_branches(64),
    ],
)
def test_bad_input_names_the_argument(change, message):
    a, a_scale, w, w_scale, _ = operands((6,), 20, 64, 32)
    kwargs = {"a": a, "a_scale": a_scale, "w": w, "w_scale": w_scale} | change
    with pytest.raises(ValueError, match=message):
        ops.gemm_w4a8(**kwargs)


def test_the_missing_cuda_kernel_is_said_in_words():
    if not _native.build_info().get("cuda"):
        reason = _native.unavailable("gemm_w4a8", torch.device("cuda"))
        assert "built without CUDA kernels" in reason
        return
    reason = _native.unavailable("quantize_int4", torch.device("cuda"))
    assert reason == "there is no native cuda kernel for this op"
