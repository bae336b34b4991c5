"""quantize_int8: bits against the oracle in every implementation, and what happens at the edges."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (64,), (1, 1), (3, 33, 65), (2, 3, 5, 31), (129, 257), (2, 5001)]
TINY = 127 * 2.0**-126


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def check_bits(x, impl):
    q, scale = ops.quantize_int8(x, impl=impl)
    want_q, want_scale = reference.quantize_int8(x.float())
    assert (q.dtype, scale.dtype, q.shape) == (torch.int8, torch.float32, x.shape)
    assert torch.equal(q, want_q)
    assert torch.equal(scale, want_scale)
    return q, scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_match_oracle(shape, dtype, impl, device):
    check_bits((torch.randn(shape) * 5).to(device, dtype), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_half_a_step(dtype, impl):
    x = torch.randn(200, 300).to(dtype)
    q, scale = ops.quantize_int8(x, impl=impl)
    error = (x.double() - q.double() * scale.double()[:, None]).abs()
    # x * (127 / amax) carries two roundings of 2^-24 relative, and the scale one: at most
    # 127 * 3 * 2^-24 steps on top of the half that rounding leaves.
    assert (error <= scale.double()[:, None] * (0.5 + 127 * 3 * 2.0**-24)).all()
    assert (q.abs().amax(1) == 127).all()


def test_float64_oracle_agrees_with_float32_up_to_ties():
    x = torch.randn(100, 100, dtype=torch.float64)
    q, scale = reference.quantize_int8(x)
    q32, scale32 = reference.quantize_int8(x.float())
    assert scale.dtype == torch.float64
    torch.testing.assert_close(scale32.double(), scale, rtol=2**-22, atol=0)
    assert ((q - q32).abs() <= 1).all()
    assert (q != q32).float().mean() < 1e-3


def test_ties_go_to_even(impl):
    # amax = 127 makes both factors exact, so the halves are real ties.
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale = ops.quantize_int8(x, impl=impl)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]
    assert scale.item() == 1.0


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_do_not_read_padding(layout, dtype, impl):
    x = layout(torch.randn(3, 19, 70).to(dtype))
    check_bits(x, impl)
    if layout is padded:
        assert padding_intact(x)


def test_outputs_are_contiguous_as_the_fake_says(impl):
    # A compiled graph reads the outputs by the fake's strides.
    q, scale = check_bits(torch.randn(2, 5, 7).permute(2, 0, 1), impl)
    assert q.is_contiguous()
    assert scale.is_contiguous()


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 31, 63, 65, 70])
def test_native_writes_only_its_outputs(columns):
    x = torch.randn(3, columns)
    q, scale = padded(torch.zeros(3, columns, dtype=torch.int8)), padded(torch.zeros(3))
    _native.call("quantize_int8", x, None, 0, None, "", q, scale, None)
    assert padding_intact(q)
    assert padding_intact(scale)
    assert torch.equal(q, reference.quantize_int8(x)[0])


def test_zero_and_tiny_rows(impl):
    x = torch.zeros(4, 20)
    x[1, 3] = TINY / 2
    x[2, 3] = TINY
    x[3, 3] = -1e-45
    q, scale = check_bits(x, impl)
    assert scale[[0, 1, 3]].tolist() == [1, 1, 1]
    assert q.abs().amax(1).tolist() == [0, 0, 127, 0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows_are_visible_and_alone(value, dtype, impl):
    x = torch.randn(3, 77).to(dtype)
    clean_q, clean_scale = ops.quantize_int8(x, impl=impl)
    x[1, 70] = value
    q, scale = ops.quantize_int8(x, impl=impl)
    assert scale[1].isnan()
    assert (q[1] == 0).all()
    assert torch.equal(q[[0, 2]], clean_q[[0, 2]])
    assert torch.equal(scale[[0, 2]], clean_scale[[0, 2]])


@pytest.mark.parametrize("factor", [1e-34, 1e-30, 1e4, 1e30, 2e38])
def test_extreme_magnitudes(factor, impl):
    x = (torch.rand(5, 99) - 0.5) * factor
    q, scale = check_bits(x, impl)
    assert scale.isfinite().all()
    assert (q.abs().amax(1) == 127).all()


def test_empty(impl):
    for shape, scales in (((0, 8), (0,)), ((3, 0, 8), (3, 0)), ((4, 0), (4,))):
        q, scale = ops.quantize_int8(torch.zeros(shape), impl=impl)
        assert q.shape == shape
        assert scale.shape == scales
        assert (scale == 1).all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for columns in (1, 7, 67, 300):
        check_bits((torch.randn(9, columns) * 100).to(dtype), "native")
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    check_bits(every[every.isfinite()][None], "native")


def test_threads_do_not_change_a_bit():
    x = torch.randn(500, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.quantize_int8(x, impl="native")
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(ops.quantize_int8(x, impl="native"), one, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_opcheck(impl):
    torch.library.opcheck(
        torch.ops.fewstep.quantize_int8.default, (torch.randn(3, 8, 16), None, 0, "", impl)
    )


def test_compiles_without_graph_break():
    x = torch.randn(3, 8, 16)
    compiled = torch.compile(ops.quantize_int8, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x), ops.quantize_int8(x), strict=True):
        assert torch.equal(got, want)


def test_tangents_and_gradients_are_refused():
    x = torch.randn(4, 8)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(ops.quantize_int8, (x,), (x,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.quantize_int8(x.clone().requires_grad_())


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        ops.quantize_int8([1.0])
    with pytest.raises(ValueError, match=r"x: expected a floating dtype, got torch\.int32"):
        ops.quantize_int8(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., K\].*0-d"):
        ops.quantize_int8(torch.tensor(1.0))
    with pytest.raises(ops.UnsupportedError, match="expected one of float32, bfloat16, float16"):
        ops.quantize_int8(torch.zeros(3, dtype=torch.float64), impl="native")
    assert "got float64" in str(ops.explain("quantize_int8", torch.zeros(3, dtype=torch.float64)))
