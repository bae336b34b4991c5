"""forecast_apply: every implementation against the fp64 oracle, in all formats of snapshots."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from fewstep.ops.quantize_int4 import pack_nibbles
from fewstep.reference._slots import dequantize
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [*FLOATS, torch.float8_e4m3fn, torch.int8, torch.uint8]
SHAPES = [(1, 2), (3, 5, 66), (2, 2, 3, 128), (1, 1030)]
GROUP = 32
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def snapshots_of(shape, dtype, slots=3, device=None):
    """Return a ring and its scale (None for floats)."""
    shape = (slots, *shape)
    if dtype in FLOATS:
        return torch.randn(shape).to(device, dtype), None
    scale = torch.rand(*shape[:-1], -(-shape[-1] // GROUP)).to(device) + 0.1
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype).to(device), scale
    if dtype == torch.uint8:
        return pack_nibbles(torch.randint(-7, 8, shape, dtype=torch.int8)).to(device), scale
    return (torch.randn(shape) * 100).to(dtype).to(device), scale


def check(ring, weights, impl, base=None, scale=None, step=None, out_dtype=None):
    args = {"base": base, "scale": scale, "group": GROUP, "step": step}
    y = ops.forecast_apply(ring, weights, **args, out_dtype=out_dtype, impl=impl)
    wide = args | {
        "base": None if base is None else base.double(),
        "scale": None if scale is None else scale.double(),
    }
    want = reference.forecast_apply(ring, weights.double(), **wide)
    # What the terms add up to without their signs.
    positive = ring.double().abs() if scale is None else ring
    ring_size = dequantize(positive, scale, GROUP, torch.float64).abs()
    wide["base"] = None if base is None else base.double().abs()
    wide["scale"] = None
    size = reference.forecast_apply(ring_size, weights.double().abs(), **wide)
    # Each of K terms is rounded twice, times scale and weight, and once for each later addition:
    # less than K + 3 roundings of 2^-24 of that size, and one to the dtype of y.
    slots = ring.shape[0]
    bound = (slots + 3) * 2.0**-24 * size
    bound += EPS[y.dtype] * (want.abs() + bound) + 2.0**-25  # the last for float16's subnormals
    assert y.shape == want.shape
    assert y.is_contiguous()
    assert ((y.double() - want).abs() <= bound).all()
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype, impl, device):
    ring, scale = snapshots_of(shape, dtype, device=device)
    weights = torch.randn(3).to(device)
    base = torch.randn(shape).to(device, torch.bfloat16)
    check(ring, weights, impl, base, scale)
    check(ring, weights, impl, None, scale)


@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base_dtype", FLOATS, ids=str)
def test_dtypes_of_base_and_output(base_dtype, out_dtype, impl):
    ring, scale = snapshots_of((2, 40), torch.int8)
    base = torch.randn(2, 40).to(base_dtype)
    y = check(ring, torch.randn(3), impl, base, scale, out_dtype=out_dtype)
    assert y.dtype == out_dtype
    assert check(ring, torch.randn(3), impl, base, scale).dtype == base_dtype
    assert check(ring, torch.randn(3), impl, None, scale).dtype == torch.float32
    assert check(ring.to(out_dtype), torch.randn(3), impl).dtype == out_dtype


@pytest.mark.parametrize("slots", [1, 5, 8])
def test_any_number_of_slots_and_a_row_of_weights_each_sample(slots, impl):
    ring, _ = snapshots_of((3, 4, 40), torch.float32, slots)
    check(ring, torch.randn(3, slots), impl)


def test_table_row_is_taken_by_a_tensor(impl):
    ring, scale = snapshots_of((2, 3, 64), torch.float8_e4m3fn)
    table = torch.randn(6, 3)
    for step in (0, 5):
        at = torch.tensor([step], device=ring.device)
        y = check(ring, table, impl, scale=scale, step=at)
        assert torch.equal(
            y, ops.forecast_apply(ring, table[step], scale=scale, group=GROUP, impl=impl)
        )
    for step in (-1, 6):  # there is no host to raise
        at = torch.tensor(step, device=ring.device)
        y = ops.forecast_apply(ring, table, scale=scale, group=GROUP, step=at, impl=impl)
        assert y.isnan().all()


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_a_snapshot_of_weight_zero_may_hold_anything(dtype, impl):
    ring, scale = snapshots_of((2, 5, 66), dtype)
    weights = torch.tensor([0.5, 0.0, -2.0])
    want = ops.forecast_apply(ring, weights, scale=scale, group=GROUP, impl=impl)
    if scale is not None:
        scale[1] = torch.nan
    if dtype.is_floating_point:
        ring[1] = torch.nan
    assert torch.equal(ops.forecast_apply(ring, weights, scale=scale, group=GROUP, impl=impl), want)
    rows = torch.stack([weights, torch.ones(3)])  # and a sample's weights are its own
    y = ops.forecast_apply(ring, rows, scale=scale, group=GROUP, impl=impl)
    assert torch.equal(y[0], want[0])
    assert y[1].isnan().all() or dtype == torch.int8 or dtype == torch.uint8


def test_nan_stays_in_its_group(impl):
    ring, scale = snapshots_of((1, 2, 70), torch.int8)
    scale[0, 0, 1, 0] = torch.nan
    y = ops.forecast_apply(ring, torch.ones(3), scale=scale, group=GROUP, impl=impl)
    assert y[0, 1, :GROUP].isnan().all()
    assert y.isnan().sum() == GROUP


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_code_in_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(1, 1, 256)
    one = torch.ones(1)
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.uint8):
        ring = codes.view(dtype)
        columns = 512 if dtype == torch.uint8 else 256
        scale = torch.ones(1, 1, columns // GROUP)
        y = ops.forecast_apply(ring, one, scale=scale, group=GROUP, impl="native")
        want = reference.forecast_apply(ring, one, scale=scale, group=GROUP)
        assert torch.equal(y.nan_to_num(1e9), want.nan_to_num(1e9))
    for dtype in FORMATS:
        ring, scale = snapshots_of((2, 3, 78), dtype)
        check(ring, torch.randn(3), "native", torch.randn(2, 3, 78), scale)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_subnormal_codes_survive_flushing(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    ring = torch.arange(8, dtype=torch.uint8).view(1, 1, 8).view(torch.float8_e4m3fn)
    torch.set_flush_denormal(True)
    try:
        y = ops.forecast_apply(ring, torch.ones(1), scale=torch.ones(1, 1, 1), impl="native")
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, torch.arange(8)[None] * 2.0**-9)


@pytest.mark.triton
def test_every_code_in_triton():
    codes = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(1, 1, 256)
    one, scale = torch.ones(1), torch.ones(1, 1, 256 // GROUP)
    ring = codes.view(torch.float8_e4m3fn)
    y = ops.forecast_apply(ring, one, scale=scale, group=GROUP, impl="triton")
    assert torch.equal(y.nan_to_num(1e9), ring[0].float().nan_to_num(1e9))


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_of_base(layout, impl):
    ring, scale = snapshots_of((3, 19, 70), torch.float8_e4m3fn)
    check(ring, torch.randn(3), impl, layout(torch.randn(3, 19, 70)), scale)
    check(ring, torch.randn(3), impl, torch.randn(19, 3, 70).transpose(0, 1), scale)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_native_writes_only_its_output_and_reads_only_its_inputs(dtype):
    ring, scale = snapshots_of((2, 3, 70), dtype)
    ring = ring.view(torch.uint8) if dtype == torch.float8_e4m3fn else ring
    ring, y = padded(ring), padded(torch.zeros(2, 3, 70))
    scales = None if scale is None else padded(scale)
    _native.call("forecast_apply", ring, torch.ones(3), None, scales, None, GROUP, y)
    assert padding_intact(y)
    assert y.isfinite().all()


def test_float64_native():
    ring = torch.randn(3, 2, 5, 70, dtype=torch.float64)
    weights, base = torch.randn(3, dtype=torch.float64), torch.randn(2, 5, 70, dtype=torch.float64)
    y = ops.forecast_apply(ring, weights, base=base, impl="native")
    want = reference.forecast_apply(ring, weights, base=base)
    torch.testing.assert_close(y, want, rtol=1e-14, atol=1e-14)


def test_sample_does_not_see_its_batch_mates(impl):
    ring, scale = snapshots_of((3, 7, 50), torch.int8)
    whole = ops.forecast_apply(ring, torch.ones(3), scale=scale, group=GROUP, impl=impl)
    alone = [x[:, 1:2].contiguous() for x in (ring, scale)]
    one = ops.forecast_apply(alone[0], torch.ones(3), scale=alone[1], group=GROUP, impl=impl)
    assert torch.equal(whole[1:2], one)


def test_threads_do_not_change_a_bit():
    ring, _ = snapshots_of((2, 300, 70), torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.forecast_apply(ring, torch.ones(3), impl="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.forecast_apply(ring, torch.ones(3), impl="native"))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0), (0, 2)], ids=str)
def test_empty(shape, impl):
    ring = torch.randn(3, *shape)
    assert ops.forecast_apply(ring, torch.ones(3), impl=impl).shape == shape


def test_six_axes(impl):
    ring, scale = snapshots_of((2, 2, 2, 3, 34), torch.int8)
    check(ring, torch.randn(3), impl, torch.randn(2, 2, 2, 3, 34), scale)


def test_opcheck_and_compile():
    ring, scale = snapshots_of((2, 3, 64), torch.int8)
    base, step, table = torch.randn(2, 3, 64), torch.tensor([1]), torch.randn(4, 3)
    args = (ring, table, base, scale, GROUP, step, torch.bfloat16, "native")
    torch.library.opcheck(torch.ops.fewstep.forecast_apply.default, args)

    def forecast(ring, table, step):
        return ops.forecast_apply(ring, table, base=base, scale=scale, group=GROUP, step=step)

    compiled = torch.compile(forecast, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ring, table, step), forecast(ring, table, step))


def test_tangents_and_gradients_are_refused():
    ring, base = torch.randn(3, 2, 8), torch.randn(2, 8)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda b: ops.forecast_apply(ring, torch.ones(3), base=b), (base,), (base,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.forecast_apply(ring, torch.ones(3).requires_grad_())


RING, CODES, SCALE = torch.randn(3, 2, 8), torch.ones(3, 2, 8).char(), torch.ones(3, 2, 1)
W = torch.ones(3)
BAD = [
    ((RING[0], W), {}, "snapshots: expected .K, B, ..., C.*got .2, 8."),
    ((RING.repeat(3, 1, 1), torch.ones(9)), {}, "snapshots: expected .* K from 1 to 8"),
    ((RING.mT, W), {}, "snapshots: expected a contiguous tensor"),
    ((RING.int(), W), {}, "snapshots: expected a floating dtype, .*got torch.int32"),
    ((RING, W), {"scale": SCALE}, "scale: expected None with snapshots in torch.float32"),
    ((CODES, W), {}, "scale: expected one with snapshots in torch.int8, got None"),
    ((CODES, W), {"scale": SCALE, "group": 4}, r"scale: expected a contiguous \[3, 2, 2\]"),
    ((CODES, W), {"scale": SCALE.double()}, "scale: expected float32"),
    ((CODES, W), {"scale": SCALE, "group": 0}, "group: expected an int from 1 to 4096, got 0"),
    ((CODES.byte(), W), {"scale": SCALE, "group": 5}, "group: expected an even int"),
    ((RING, W.half()), {}, "weights: expected torch.float32"),
    ((RING, W[:2]), {}, r"weights: expected \[3\] or \[2, 3\], got \[2\]"),
    ((RING, W), {"step": torch.tensor([0])}, r"weights: expected a table \[T, 3\] with step"),
    ((RING, W[None]), {"step": torch.tensor([0.0])}, "step: expected one element of int64"),
    ((RING, W[None]), {"step": torch.tensor([0, 1])}, "step: expected one element of int64"),
    ((RING, W), {"base": RING}, r"base: expected the shape of a snapshot, \[2, 8\]"),
    ((RING, W), {"base": RING[0].double()}, "base: expected float32, bfloat16 or float16"),
    ((RING, W), {"out_dtype": torch.int8}, "out_dtype: expected float32, bfloat16 or float16"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_bad_input_names_the_argument(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.forecast_apply(*args, **kwargs)


def test_wrong_kinds_and_unknown_implementations():
    with pytest.raises(TypeError, match="snapshots: expected a tensor, got list"):
        ops.forecast_apply([RING], W)
    with pytest.raises(TypeError, match="step: expected a tensor, got int"):
        ops.forecast_apply(RING, W[None], step=0)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        ops.forecast_apply(RING.double(), W.double(), impl="triton")


NATIVE = (RING[:, :, None], W, None, None, None, 128, torch.empty(2, 1, 8))


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, RING, "snapshots: expected 4 axes"),
        (0, CODES[:, :, None], "scale: expected one with codes"),
        (1, torch.ones(2), "weights: expected size 3"),
        (1, W.double(), "weights: expected float32"),
        (2, torch.empty(2, 1, 4), "base: expected size 8"),
        (3, SCALE[:, :, None], "scale: expected one with codes and none with floats"),
        (4, torch.tensor([0]), "weights: expected 2 axes"),
        (5, 0, "group: expected at least 1"),
        (6, torch.empty(2, 1, 8).double(), "y: expected float64 just with float64"),
        (6, torch.empty(2, 1, 16)[..., ::2], "y: expected unit stride"),
    ],
)
def test_native_call_checks_for_itself(index, value, message):
    args = [value if i == index else old for i, old in enumerate(NATIVE)]
    with pytest.raises(ValueError, match=message):
        _native.call("forecast_apply", *args)
