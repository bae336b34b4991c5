"""snapshot_store: bits against the oracle in every implementation, errors, products, edges."""

import pytest
import torch

from fewstep import _native, ops
from fewstep.ops._register import DerivativeError
from fewstep.ops._slots import ring_views
from fewstep.reference._slots import dequantize
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CODES = [torch.float8_e4m3fn, torch.int8, torch.uint8]
SHAPES = [(1, 2), (3, 5, 66), (2, 2, 3, 128), (1, 1030)]
GROUP = 32
TOPS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0, torch.uint8: 7.0}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def ring_of(shape, dtype, slots=3, group=GROUP, device=None):
    """Return a ring and a scale that hold what nobody has stored: NaN, or 127."""
    columns = shape[-1] // 2 if dtype == torch.uint8 else shape[-1]
    fill = float("nan") if dtype.is_floating_point else 127
    ring = torch.full((slots, *shape[:-1], columns), fill, device=device).to(dtype)
    if dtype in FLOATS:
        return ring, None
    count = -(-shape[-1] // group)
    return ring, torch.full((slots, *shape[:-1], count), torch.nan, device=device)


def bits(x):
    return x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def store(x, ring, scale, impl, **kwargs):
    """Store in copies; return them and the products."""
    ring, scale = ring.clone(), None if scale is None else scale.clone()
    group = kwargs.pop("group", GROUP)
    products = ops.snapshot_store(x, ring, scale=scale, group=group, impl=impl, **kwargs)
    return ring, scale, products


def check_bits(x, ring, scale, impl, **kwargs):
    found = store(x, ring, scale, impl, **kwargs)
    want = store(x, ring, scale, "reference", **kwargs)
    assert torch.equal(bits(found[0]), bits(want[0]))
    assert scale is None or torch.equal(bits(found[1]), bits(want[1]))
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*FLOATS, *CODES], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_match_oracle_and_other_slots_stay(shape, dtype, impl, device):
    ring, scale = ring_of(shape, dtype, device=device)
    x, base = torch.randn(shape).to(device).bfloat16(), torch.randn(shape).to(device)
    new, scales, _ = check_bits(x, ring, scale, impl, slot=1, base=base)
    for k in (0, 2):
        assert torch.equal(bits(new[k]), bits(ring[k]))
        assert scale is None or torch.equal(bits(scales[k]), bits(scale[k]))
    check_bits(base, ring, scale, impl, slot=torch.tensor([2], device=device))


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("group", [2, 50, 128])
def test_error_of_a_value(group, dtype, impl):
    x = torch.randn(2, 3, 130) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    ring, scale = ring_of(x.shape, dtype, 1, group)
    ring, scale, _ = store(x, ring, scale, impl, slot=0, group=group)
    values = dequantize(ring[0], scale[0], group, torch.float64)
    step = scale[0].double().repeat_interleave(group, -1)[..., :130]
    error = (values - x.double()).abs()
    # The inverse, the step and the scale are rounded: 3 roundings of 2^-24 of the value.
    slack = 3 * 2.0**-24 * x.double().abs()
    half = 2.0**-4 * x.double().abs() if dtype == torch.float8_e4m3fn else step / 2
    near_zero = 2.0**-10 * step if dtype == torch.float8_e4m3fn else 0 * step
    assert (error <= torch.maximum(half, near_zero) + slack).all()
    amax = torch.nn.functional.pad(x.abs(), (0, -130 % group)).unflatten(-1, (-1, group)).amax(-1)
    assert torch.equal(scale[0], amax / torch.full_like(amax, TOPS[dtype]))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_ties_go_to_even(dtype, impl):
    top = TOPS[dtype]
    x = torch.tensor([[top, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, -top]])  # scale 1: halves are ties
    ring, scale = ring_of(x.shape, dtype, 1)
    ring, scale, _ = store(x, ring, scale, impl, slot=0)
    want = [[top, 0, 2, 2, 0, -2, -2, -top]]
    assert dequantize(ring[0], scale[0], GROUP, torch.float32).tolist() == want


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_zero_tiny_and_non_finite_groups(dtype, impl):
    x = torch.randn(1, 6 * GROUP)
    x[0, :GROUP] = 0
    x[0, GROUP : 2 * GROUP] = 1e-37
    x[0, 2 * GROUP] = torch.inf
    x[0, 3 * GROUP] = torch.nan
    x[0, 4 * GROUP : 5 * GROUP] *= 1e37
    ring, scale = ring_of(x.shape, dtype, 1)
    ring, scale, _ = check_bits(x, ring, scale, impl, slot=0)
    assert scale[0, 0].isnan().tolist() == [False, False, True, True, False, False]
    assert (scale[0, 0, 0], ring.view(torch.uint8)[0, 0, 0]) == (0, 0)
    values = dequantize(ring[0], scale[0], GROUP, torch.float32)[0]
    assert values[4 * GROUP :].isfinite().all()


@pytest.mark.parametrize("dtype", [*FLOATS, *CODES], ids=str)
@pytest.mark.parametrize("shape", [(3, 66), (2, 3, 350)], ids=str)
def test_products(shape, dtype, impl):
    ring, scale = ring_of(shape, dtype, 4)
    for slot in (0, 3, 1):  # slot 2 holds NaN or what is no code: its entries mean nothing
        x, base = torch.randn(shape) + 1, torch.randn(shape).half()
        at = slot if slot else torch.tensor(slot, device=x.device)
        new = store(x, ring, scale, impl, slot=at, base=base, gram=True)
        ring, scale, products = new
    values = dequantize(ring, scale, GROUP, torch.float64).flatten(2)[[0, 1, 3]]
    want = (values[1] * values).sum(-1).T
    size = (values[1] * values).abs().sum(-1).T
    # A thread of the CPU adds n <= 16,384 products over at least 4 lanes; the values of codes are
    # rounded once each and their products once or twice: a root of n / 4 roundings, and a few.
    assert products.dtype == torch.float32
    assert products.shape == (shape[0], 4)
    bound = ((x[0].numel() / 4) ** 0.5 + 8) * 2.0**-24 * size
    assert ((products[:, [0, 1, 3]].double() - want).abs() <= bound).all()


def test_slot_outside_of_the_ring_stores_nothing(impl):
    ring, scale = ring_of((2, 40), torch.int8)
    for slot in (-1, 3):
        at = torch.tensor(slot, device=ring.device)
        new, scales, products = store(torch.ones(2, 40), ring, scale, impl, slot=at, gram=True)
        assert torch.equal(new, ring)
        assert scales.isnan().all()
        assert products.isnan().all()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    for dtype in (*FLOATS, *CODES):
        ring, scale = ring_of((2, 3, 78), dtype)
        x, base = torch.randn(2, 3, 78).half(), torch.randn(2, 3, 78)
        monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
        *_, products = check_bits(x, ring, scale, "native", slot=0, base=base, gram=True)
        monkeypatch.delenv("FEWSTEP_CPU_ISA")
        *_, want = store(x, ring, scale, "reference", slot=0, base=base, gram=True)
        torch.testing.assert_close(products[:, 0], want[:, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts(layout, impl):
    for dtype in (torch.bfloat16, torch.uint8):
        ring, scale = ring_of((3, 9, 70), dtype)
        x, base = layout(torch.randn(3, 9, 70)), torch.randn(9, 3, 70).transpose(0, 1)
        check_bits(x, ring, scale, impl, slot=2, base=base)
        check_bits(base, ring, scale, impl, slot=2, base=x)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kernel", ["native", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, *CODES], ids=str)
def test_writes_only_its_slot(dtype, kernel, device):
    ring, scale = ring_of((2, 3, 70), dtype, device=device)
    ring, scale = ring_views(ring, scale)
    ring, scales = padded(ring), None if scale is None else padded(scale)
    x, module = torch.randn(2, 3, 70, device=device), ops.module("snapshot_store")
    gram = padded(torch.zeros(2, 3, device=device))
    launch = module._launch_native
    if kernel == "triton":
        from fewstep.kernels.snapshot_store import launch_snapshot_store as launch
    launch(x, None, ring, scales, 1, None, GROUP, gram)
    assert all(padding_intact(out) for out in (ring, gram, *([] if scale is None else [scales])))


def test_float64_native():
    x, base = (torch.randn(2, 5, 70, dtype=torch.float64) for _ in range(2))
    ring = torch.randn(3, 2, 5, 70, dtype=torch.float64)
    products = ops.snapshot_store(x, ring, slot=1, base=base, gram=True, impl="native")
    assert torch.equal(ring[1], x - base)
    want = (ring[1] * ring).flatten(2).sum(-1).T
    torch.testing.assert_close(products, want, rtol=1e-12, atol=1e-12)


def test_sample_does_not_see_its_batch_mates(impl):
    x, (ring, scale) = torch.randn(3, 7, 50), ring_of((3, 7, 50), torch.int8)
    *_, whole = store(x, ring, scale, impl, slot=0, gram=True)
    alone = [t[:, 1:2].contiguous() for t in (ring, scale)]
    *_, one = store(x[1:2], *alone, impl, slot=0, gram=True)
    assert torch.equal(whole[1:2, 0], one[:, 0])


def test_threads_do_not_change_a_bit():
    x, (ring, scale) = torch.randn(2, 300, 70), ring_of((2, 300, 70), torch.int8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = store(x, ring, scale, "native", slot=0, gram=True)
    finally:
        torch.set_num_threads(threads)
    many = store(x, ring, scale, "native", slot=0, gram=True)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[2][:, 0], many[2][:, 0])


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 3, 0), (0, 2)], ids=str)
def test_empty(shape, impl):
    for dtype in (torch.float32, torch.int8):
        ring, scale = ring_of(shape, dtype)
        *_, products = store(torch.randn(shape), ring, scale, impl, slot=0, gram=True)
        assert torch.equal(products, torch.zeros(shape[0], 3))


def test_nothing_is_returned_without_gram_and_autograd_hears_of_the_write(impl):
    ring, scale = ring_of((2, 40), torch.int8)
    before = ring._version, scale._version
    x = torch.ones(2, 40)
    assert ops.snapshot_store(x, ring, slot=0, scale=scale, group=GROUP, impl=impl) is None
    assert ring._version > before[0]
    assert scale._version > before[1]


def test_opcheck_and_compile():
    x, (ring, scale) = torch.randn(2, 3, 64), ring_of((2, 3, 64), torch.int8)
    ring, scale = ring.zero_(), scale.zero_()
    args = (x, ring, 1, None, None, scale, GROUP, True, "native")
    torch.library.opcheck(torch.ops.fewstep.snapshot_store.default, args)

    def step(x, ring, scale, slot):
        products = ops.snapshot_store(x, ring, slot=slot, scale=scale, group=GROUP, gram=True)
        return products, ops.forecast_apply(ring, torch.ones(3), scale=scale, group=GROUP)

    slot = torch.tensor(2)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    ours = compiled(x, ring, scale, slot)
    other, other_scale = torch.zeros_like(ring), torch.zeros_like(scale)
    theirs = step(x, other, other_scale, slot)
    assert torch.equal(ring, other)
    assert torch.equal(scale, other_scale)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_tangents_and_gradients_are_refused():
    x, ring = torch.randn(2, 8), torch.zeros(3, 2, 8)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda a: ops.snapshot_store(a, ring, slot=0, gram=True), (x,), (x,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.snapshot_store(x.requires_grad_(), ring, slot=0)
    assert (ring == 0).all()


X, RING = torch.randn(2, 8), torch.zeros(3, 2, 8)
Q, SCALE = torch.zeros(3, 2, 8, dtype=torch.int8), torch.zeros(3, 2, 1)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((X, RING), {"slot": 3}, "slot: expected one of 0 to 2, got 3"),
        ((X, RING), {"slot": -1}, "slot: expected one of 0 to 2, got -1"),
        ((X, RING), {"slot": torch.tensor(1.0)}, "slot: expected one element of int64"),
        ((X[:1], RING), {}, r"x: expected the shape of a slot, \[2, 8\], got \[1, 8\]"),
        ((X.double(), RING), {}, "x: expected float32, bfloat16 or float16"),
        ((X.int(), RING), {}, "x: expected float32, bfloat16 or float16"),
        ((X, RING), {"base": X[:1]}, "base: expected the shape of a slot"),
        ((X, RING.mT), {}, "snapshots: expected a contiguous tensor"),
        ((X, Q), {}, "scale: expected one with snapshots in torch.int8"),
        ((X, Q), {"scale": SCALE, "group": 4097}, "group: expected an int from 1 to 4096"),
        ((X, RING), {"scale": SCALE}, "scale: expected None"),
    ],
)
def test_bad_input_names_the_argument(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.snapshot_store(*args, **{"slot": 0, **kwargs})


def test_wrong_kinds_and_unknown_implementations():
    with pytest.raises(TypeError, match="slot: expected an int or a tensor, got float"):
        ops.snapshot_store(X, RING, slot=1.0)
    with pytest.raises(TypeError, match="gram: expected True or False, got int"):
        ops.snapshot_store(X, RING, slot=0, gram=1)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        ops.snapshot_store(X.double(), RING.double(), slot=0, impl="triton")


NATIVE = (X[:, None], None, RING[:, :, None], None, 0, None, 128, None, None)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, X, "x: expected 3 axes|snapshots"),
        (1, X[:, None, :4], "base: expected size 8"),
        (2, Q[:, :, None], "scale: expected one with codes"),
        (2, RING[:, :, None].double(), "snapshots: expected float64 just with float64 x"),
        (3, SCALE[:, :, None], "scale: expected one with codes and none with floats"),
        (4, 3, "slot: expected one of 3, got 3"),
        (5, torch.tensor([0.0]), "slot_at: expected int64"),
        (7, torch.empty(2, 1, 3).double(), "partials, gram: expected both or neither"),
    ],
)
def test_native_call_checks_for_itself(index, value, message):
    args = [value if i == index else old for i, old in enumerate(NATIVE)]
    with pytest.raises(ValueError, match=message):
        _native.call("snapshot_store", *args)
