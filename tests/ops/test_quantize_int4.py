"""quantize_int4: bits against the oracle in every implementation, and what happens at the edges."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from fewstep.ops.quantize_int4 import pack_nibbles, unpack_nibbles
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GROUPS = [32, 64, 128]
ISAS = ["portable", "avx2", "avx512"]
TINY = 2.0**-126


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def dequantize(q, scale):
    return (unpack_nibbles(q).double().unflatten(1, (scale.shape[1], -1))) * scale[
        ..., None
    ].double()


def check_bits(w, impl, group=32):
    q, scale = ops.quantize_int4(w, group=group, impl=impl)
    want_q, want_scale = reference.quantize_int4(w.float(), group=group)
    N, K = w.shape
    assert (q.dtype, q.shape) == (torch.uint8, (N, K // 2))
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (N, K // group))
    assert torch.equal(q, want_q)
    assert torch.equal(scale.view(torch.int16), want_scale.view(torch.int16))
    return q, scale


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_bits_match_oracle(group, dtype, impl, device):
    for rows, groups in ((1, 1), (3, 5), (130, 2)):
        check_bits((torch.randn(rows, groups * group) * 5).to(device, dtype), impl, group)


@pytest.mark.parametrize("group", GROUPS)
def test_packing_is_its_own_inverse_and_puts_the_even_column_low(group):
    q = torch.randint(-8, 8, (5, group), dtype=torch.int8)
    packed = pack_nibbles(q)
    assert torch.equal(unpack_nibbles(packed), q)
    assert torch.equal((packed & 15).int(), q[:, ::2].int() & 15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_error_is_half_a_step(group, dtype, impl):
    w = torch.randn(50, 2 * group).to(dtype)
    q, scale = ops.quantize_int4(w, group=group, impl=impl)
    error = (w.double().unflatten(1, (2, -1)) - dequantize(q, scale)).abs()
    # Half a step, the division's 2^-24 of at most 7.03 steps, and where the scale was rounded down
    # (by at most 2^-9 of it) what clamping takes: 7 (1 + 2^-8) - 7 - 1/2 < 0. Nothing is added.
    assert (error <= scale.double()[..., None] * (0.5 + 8 * 2.0**-24)).all()
    assert (unpack_nibbles(q).unflatten(1, (2, -1)).abs().amax(-1) == 7).all()


def test_float64_oracle_agrees_with_float32_up_to_ties():
    w = torch.randn(100, 128, dtype=torch.float64)
    (q, scale), (q32, scale32) = reference.quantize_int4(w), reference.quantize_int4(w.float())
    assert torch.equal(scale, scale32)
    assert (q != q32).float().mean() < 1e-3


def test_ties_go_to_even(impl):
    # max 7 makes the scale 1, so the halves are real ties.
    w = torch.zeros(1, 32)
    w[0, :8] = torch.tensor([7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -6.5])
    q, scale = ops.quantize_int4(w, group=32, impl=impl)
    assert unpack_nibbles(q)[0, :8].tolist() == [7, 0, 2, 2, 0, -2, -2, -6]
    assert scale.item() == 1.0


def test_q_is_taken_with_the_rounded_scale(impl):
    # 1 + 2^-8 and 3 * 2^-8 are ties of bfloat16, to 1 and to 1 + 2^-6: the grid moves with them.
    for factor, want in ((1 + 2.0**-8, 1.0), (1 + 3 * 2.0**-8, 1 + 2.0**-6)):
        w = torch.full((1, 32), 7 * factor)
        w[0, 1] = 3.5 * want  # a tie on the rounded grid only
        q, scale = check_bits(w, impl)
        assert scale.item() == want
        assert unpack_nibbles(q)[0, :2].tolist() == [7, 4]


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_do_not_read_padding(layout, dtype, impl):
    w = layout(torch.randn(19, 96).to(dtype))
    check_bits(w, impl)
    if layout is padded:
        assert padding_intact(w)


def test_outputs_are_contiguous_as_the_fake_says(impl):
    # A compiled graph reads the outputs by the fake's strides.
    for out in check_bits(torch.randn(64, 5).t(), impl):
        assert out.is_contiguous()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("group", GROUPS)
def test_native_writes_only_its_outputs(group, isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    w = torch.randn(3, 3 * group)
    q = padded(torch.zeros(3, 3 * group // 2, dtype=torch.uint8))
    scale = padded(torch.zeros(3, 3, dtype=torch.bfloat16))
    _native.call("quantize_int4", w, 0, q, scale)
    assert padding_intact(q)
    assert padding_intact(scale)
    want_q, want_scale = reference.quantize_int4(w, group=group)
    assert torch.equal(q, want_q)
    assert torch.equal(scale, want_scale)


def test_zero_and_tiny_groups(impl):
    w = torch.zeros(5, 32)
    w[1, 3] = 7 * TINY / 2
    w[2, 3] = 7 * TINY
    w[3, 3] = -1e-45
    q, scale = check_bits(w, impl)
    assert scale[[0, 1, 3, 4], 0].tolist() == [TINY] * 4
    assert unpack_nibbles(q).abs().amax(1).tolist() == [0, 0, 7, 0, 0]


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_groups_are_visible_and_alone(value, dtype, impl):
    w = torch.randn(3, 192).to(dtype)
    clean_q, clean_scale = ops.quantize_int4(w, group=64, impl=impl)
    w[1, 70] = value
    q, scale = ops.quantize_int4(w, group=64, impl=impl)
    assert scale[1, 1].isnan()
    assert (q[1, 32:64] == 0).all()
    q[1, 32:64], scale[1, 1] = clean_q[1, 32:64], clean_scale[1, 1]
    assert torch.equal(q, clean_q)
    assert torch.equal(scale, clean_scale)


@pytest.mark.parametrize("factor", [1e-35, 1e-30, 1e4, 1e30, 3.4e38])
def test_extreme_magnitudes(factor, impl):
    w = torch.rand(5, 96) * factor
    w[:, ::32] = factor
    q, scale = check_bits(w, impl)
    assert scale.isfinite().all()
    assert (unpack_nibbles(q)[:, ::32] == 7).all()


def test_empty(impl):
    for N, K in ((0, 64), (3, 0)):
        q, scale = ops.quantize_int4(torch.zeros(N, K), impl=impl)
        assert q.shape == (N, K // 2)
        assert scale.shape == (N, K // 64)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for group in GROUPS:
        check_bits((torch.randn(9, 3 * group) * 100).to(dtype), "native", group)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    check_bits(every[torch.randperm(1 << 16)].view(64, -1), "native")


def test_threads_do_not_change_a_bit():
    w = torch.randn(300, 256)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.quantize_int4(w, impl="native")
    finally:
        torch.set_num_threads(threads)
    for got, want in zip(ops.quantize_int4(w, impl="native"), one, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_opcheck(impl):
    torch.library.opcheck(
        torch.ops.fewstep.quantize_int4.default, (torch.randn(3, 64), 32, 0, impl)
    )


def test_compiles_without_graph_break():
    w = torch.randn(3, 128)
    compiled = torch.compile(ops.quantize_int4, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(w), ops.quantize_int4(w), strict=True):
        assert torch.equal(got, want)


def test_tangents_and_gradients_are_refused():
    w = torch.randn(4, 64)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(ops.quantize_int4, (w,), (w,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.quantize_int4(w.clone().requires_grad_())


def test_bad_input_names_the_argument():
    with pytest.raises(TypeError, match="w: expected a tensor, got list"):
        ops.quantize_int4([1.0])
    with pytest.raises(ValueError, match=r"w: expected floating \[N, K\], got torch\.int32"):
        ops.quantize_int4(torch.zeros(3, 64, dtype=torch.int32))
    with pytest.raises(
        ValueError, match=r"w: expected floating \[N, K\], got torch.float32 \[64\]"
    ):
        ops.quantize_int4(torch.zeros(64))
    with pytest.raises(ValueError, match="w: expected K that is a multiple of group 64, got 96"):
        ops.quantize_int4(torch.zeros(3, 96))
    with pytest.raises(ValueError, match=r"group: expected one of \(32, 64, 128\), got 16"):
        ops.quantize_int4(torch.zeros(3, 64), group=16)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32, bfloat16, float16"):
        ops.quantize_int4(torch.zeros(3, 64, dtype=torch.float64), impl="native")
    with pytest.raises(ValueError, match="scale: expected"):
        _native.call(
            "quantize_int4",
            torch.zeros(3, 256),
            0,
            torch.zeros(3, 128, dtype=torch.uint8),
            torch.zeros(3, 1, dtype=torch.bfloat16),
        )
