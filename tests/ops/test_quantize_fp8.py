"""quantize_fp8: bits against the oracle in every implementation, and what happens at the edges."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [None, 128]
SHAPES = [(1,), (64,), (1, 1), (3, 33, 65), (2, 3, 5, 130), (29, 257), (2, 4700)]
TINY = 448 * 2.0**-126


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=BLOCKS)
def block(request):
    return request.param


def same(got, want):
    """Whether two e4m3 tensors agree to the bit: comparing would take -0 for 0."""
    return torch.equal(got.view(torch.uint8), want.view(torch.uint8))


def check_bits(x, impl, block=None):
    q, scale = ops.quantize_fp8(x, block=block, impl=impl)
    want_q, want_scale = reference.quantize_fp8(x.float(), block=block)
    assert (q.dtype, q.shape) == (torch.float8_e4m3fn, x.shape)
    count = () if block is None else (-(-x.shape[-1] // block),)
    assert (scale.dtype, scale.shape) == (torch.float32, (*x.shape[:-1], *count))
    assert same(q, want_q.contiguous())
    assert torch.equal(scale, want_scale)
    return q, scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_match_oracle(shape, dtype, impl, block, device):
    check_bits((torch.randn(shape) * 5).to(device, dtype), impl, block)


def test_every_rounding(impl):
    """Every float16 as it is: the scale is 1, so all of e4m3 is met, its ties and subnormals."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.abs() <= 448].float()
    # A hair off each tie as well, which float16 can't hold.
    x = torch.cat([every, every * (1 + 2.0**-20), every * (1 - 2.0**-20)]).clamp(-448, 448)
    q, scale = check_bits(x[None], impl)
    assert scale.item() == 1
    assert same(q[0], x.to(torch.float8_e4m3fn))


def test_error_is_half_a_step(impl, block):
    x = torch.randn(50, 300) * torch.logspace(-6, 3, 50)[:, None]
    q, scale = ops.quantize_fp8(x, block=block, impl=impl)
    scale = scale[:, None] if block is None else scale.repeat_interleave(128, 1)[:, :300]
    error = (x.double() - q.double() * scale.double()).abs()
    # Half of a step, 2^-3 of a power of two below the value or 2^-9 of the scale; the divisions
    # add two roundings of the value.
    bound = torch.maximum(x.double().abs() * 2.0**-4, scale.double() * 2.0**-10)
    assert (error <= bound + 2 * 2.0**-24 * x.double().abs()).all()
    assert q.double().abs().amax() == 448


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_do_not_read_padding(layout, dtype, impl, block):
    x = layout(torch.randn(3, 7, 150).to(dtype))
    check_bits(x, impl, block)
    if layout is padded:
        assert padding_intact(x)


def test_outputs_are_contiguous_as_the_fake_says(impl, block):
    q, scale = check_bits(torch.randn(2, 5, 7).permute(2, 0, 1), impl, block)
    assert q.is_contiguous()
    assert scale.is_contiguous()


@pytest.mark.parametrize("columns", [1, 15, 127, 128, 129, 300])
def test_native_writes_only_its_outputs(columns):
    x = torch.randn(3, columns)
    blocks = -(-columns // 128)
    q = padded(torch.zeros(3, columns, dtype=torch.uint8))
    scale = padded(torch.zeros(3, blocks))
    _native.call("quantize_fp8", x, None, 0, None, "", q, scale, 128, None)
    assert padding_intact(q)
    assert padding_intact(scale)
    assert torch.equal(q, reference.quantize_fp8(x, block=128)[0].contiguous().view(torch.uint8))


def test_zero_and_tiny_rows(impl, block):
    x = torch.zeros(4, 20)
    x[1, 3] = TINY / 2
    x[2, 3] = TINY
    x[3, 3] = -1e-45
    q, scale = check_bits(x, impl, block)
    assert scale.flatten()[[0, 1, 3]].tolist() == [1, 1, 1]
    assert q.double().abs().amax(1).tolist() == [0, 0, 448, 0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_blocks_are_visible_and_alone(value, dtype, impl, block):
    x = torch.randn(3, 150).to(dtype)
    clean_q, clean_scale = ops.quantize_fp8(x, block=block, impl=impl)
    x[1, 140] = value
    q, scale = ops.quantize_fp8(x, block=block, impl=impl)
    struck = torch.zeros(3, 150, dtype=torch.bool)
    struck[1, 0 if block is None else block :] = True
    assert (q.double()[struck] == 0).all()
    assert same(q[~struck], clean_q[~struck])
    assert scale.isnan().sum() == 1
    assert scale[1].isnan().flatten()[-1]
    assert torch.equal(scale[~scale.isnan()], clean_scale[~scale.isnan()])


@pytest.mark.parametrize("factor", [1e-34, 1e-30, 1e4, 1e30, 3e38])
def test_extreme_magnitudes(factor, impl, block):
    q, scale = check_bits((torch.rand(5, 99) - 0.5) * factor, impl, block)
    assert scale.isfinite().all()
    assert (q.double().abs().amax(1) == 448).all()


def test_empty(impl):
    for shape, scales in (((0, 8), (0,)), ((3, 0, 8), (3, 0)), ((4, 0), (4,))):
        q, scale = ops.quantize_fp8(torch.zeros(shape), impl=impl)
        assert (q.shape, scale.shape) == (shape, scales)
        assert (scale == 1).all()
    q, scale = ops.quantize_fp8(torch.zeros(4, 0), block=128, impl=impl)
    assert (q.shape, scale.shape) == ((4, 0), (4, 0))


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype, block, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for columns in (1, 7, 67, 300):
        check_bits((torch.randn(9, columns) * 100).to(dtype), "native", block)
    test_every_rounding("native")


def test_threads_do_not_change_a_bit():
    x = torch.randn(500, 300)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.quantize_fp8(x, impl="native")
    finally:
        torch.set_num_threads(threads)
    q, scale = ops.quantize_fp8(x, impl="native")
    assert same(q, one[0])
    assert torch.equal(scale, one[1])


def test_float64_oracle_agrees_with_float32():
    x = torch.randn(100, 100, dtype=torch.float64)
    q, scale = reference.quantize_fp8(x)
    q32, scale32 = reference.quantize_fp8(x.float())
    assert scale.dtype == torch.float64
    torch.testing.assert_close(scale32.double(), scale, rtol=2**-22, atol=0)
    assert (q.double() != q32.double()).double().mean() < 1e-3


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_opcheck(impl, block):
    args = (torch.randn(3, 4, 160), block, None, 0, "", impl)
    # No schema check: torch's compares outputs with allclose, which float8 has not.
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fewstep.quantize_fp8.default, args, test_utils=checks)
    args = (*args[:2], torch.rand(160) + 0.1, 32, torch.randn(3, 160), "", impl)
    torch.library.opcheck(torch.ops.fewstep.quantize_fp8_low.default, args, test_utils=checks)


def test_compiles_without_graph_break():
    x = torch.randn(3, 8, 16)
    compiled = torch.compile(ops.quantize_fp8, fullgraph=True, backend="aot_eager")
    (q, scale), (want_q, want_scale) = compiled(x), ops.quantize_fp8(x)
    assert same(q, want_q)
    assert torch.equal(scale, want_scale)


def test_tangents_and_gradients_are_refused():
    x = torch.randn(4, 8)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(ops.quantize_fp8, (x,), (x,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.quantize_fp8(x.clone().requires_grad_())


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        ops.quantize_fp8([1.0])
    with pytest.raises(ValueError, match=r"x: expected a floating dtype, got torch\.int32"):
        ops.quantize_fp8(torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., K\].*0-d"):
        ops.quantize_fp8(torch.tensor(1.0))
    with pytest.raises(ValueError, match="block: expected None or 128, got 64"):
        ops.quantize_fp8(torch.zeros(3), block=64)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32, bfloat16, float16"):
        ops.quantize_fp8(torch.zeros(3, dtype=torch.float64), impl="native")
