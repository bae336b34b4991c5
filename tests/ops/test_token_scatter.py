"""token_scatter: every implementation against the fp64 oracle, in place and out of place."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2, 1), (3, 7, 66, 5), (2, 20, 128, 19), (1, 5, 1030, 3)]  # B, N, C, M
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def inputs(shape, dtype, kind=torch.int64, device=None):
    """Return value, a map that leaves about half of the tokens, base and gate."""
    B, N, C, M = shape
    value = torch.randn(B, M, C).to(device, dtype)
    base = torch.randn(B, N, C).to(device, dtype)
    position = torch.randint(-M, M, (B, N)).to(device, kind)
    gate = torch.randn(B, 2 * C).to(device, dtype)[:, C:]
    return value, position, base, gate


def put(value, position, base):
    """Return the result row by row, as Python counts them."""
    y = base.clone()
    for b, row in enumerate(position.tolist()):
        for n, p in enumerate(row):
            if p >= 0:
                y[b, n] = value[b, p]
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_puts_rows_in_place_to_the_bit(shape, dtype, impl, device):
    kind = torch.int32 if dtype == torch.bfloat16 else torch.int64
    value, position, base, _ = inputs(shape, dtype, kind, device)
    value.view(-1)[0] = -0.0
    want = put(*(x.cpu() for x in (value, position, base))).to(base.device)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    y = ops.token_scatter(value, position, base, impl=impl)
    assert y.is_contiguous()
    assert torch.equal(y.view(bits), want.view(bits))
    own = base.clone()
    assert ops.token_scatter(value, position, own, in_place=True, impl=impl) is own
    assert torch.equal(own.view(bits), want.view(bits))


def check(value, position, base, impl, gate=None, residual=True):
    """Compare with the oracle, in place and not, which agree to the bit."""
    y = ops.token_scatter(value, position, base, gate=gate, residual=residual, impl=impl)
    args = [x if x is position else x.double() for x in (value, position, base)]
    wide = None if gate is None else gate.double()
    want = reference.token_scatter(*args, gate=wide, residual=residual)
    # A product and a sum, rounded once each, or once together, and once more to the dtype of y.
    sizes = args[0].abs(), position, args[2].abs()
    size = reference.token_scatter(
        *sizes, gate=None if gate is None else wide.abs(), residual=residual
    )
    bound = 2 * 2.0**-24 * size
    bound += EPS[y.dtype] * (want.abs() + bound) + 2.0**-25  # the last for float16's subnormals
    assert ((y.double() - want).abs() <= bound).all()
    own = base.clone()
    options = {"gate": gate, "residual": residual, "in_place": True}
    assert torch.equal(ops.token_scatter(value, position, own, **options, impl=impl), y)
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gate_and_residual_match_the_oracle(shape, dtype, impl, device):
    value, position, base, gate = inputs(shape, dtype, device=device)
    check(value, position, base, impl, gate)
    check(value, position, base, impl, gate, residual=False)
    check(value, position, base, impl)


def test_tokens_may_share_a_row_and_rows_may_be_unused(impl):
    value, _, base, _ = inputs((2, 4, 40, 3), torch.float32)
    position = torch.tensor([[2, 2, -1, 2], [-7, 0, 0, -1]])
    want = torch.stack(
        [
            torch.stack([value[0, 2], value[0, 2], base[0, 2], value[0, 2]]),
            torch.stack([base[1, 0], value[1, 0], value[1, 0], base[1, 3]]),
        ]
    )
    assert torch.equal(ops.token_scatter(value, position, base, impl=impl), want)


@pytest.mark.parametrize("residual", [False, True])
def test_position_beyond_is_nan_and_nothing_else_is(residual, impl):
    value, _, base, _ = inputs((2, 4, 40, 3), torch.float32)
    position = torch.tensor([[3, -1, 2, 2**31 - 1], [0, 2**40, -(2**40), -1]])
    y = ops.token_scatter(value, position, base, residual=residual, impl=impl)
    assert torch.equal(y.isnan().all(-1), position > 2)
    assert torch.equal(y.isnan().any(-1), position > 2)


def test_kept_rows_may_hold_anything_and_stay(impl):
    value, _, base, gate = inputs((1, 4, 40, 2), torch.float32)
    base[0, 1], base[0, 2] = torch.nan, torch.inf
    position = torch.tensor([[0, -1, -1, 1]])
    y = ops.token_scatter(value, position, base, gate=gate, residual=True, impl=impl)
    assert y[0, 1].isnan().all()
    assert torch.equal(y[0, 2], base[0, 2])
    assert y[0, [0, 3]].isfinite().all()


def test_no_rows_of_value(impl):
    _, _, base, _ = inputs((2, 4, 40, 3), torch.float32)
    nothing = torch.full((2, 4), -1)
    assert torch.equal(ops.token_scatter(base[:, :0], nothing, base, impl=impl), base)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in FLOATS:
        value, position, base, gate = inputs((2, 9, 77, 6), dtype)
        check(value, position, base, "native", gate)
        check(value, position, base, "native", gate, residual=False)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    value, position, base, gate = inputs((3, 19, 70, 8), torch.float32)
    want = check(value, position, base, impl, gate)
    own = layout(value), strided(position), layout(base)
    y = ops.token_scatter(*own, gate=layout(gate), residual=True, impl=impl)
    assert torch.equal(y, want)


def test_in_place_writes_rows_of_a_wider_tensor_alone(impl):
    value, position, base, _ = inputs((2, 9, 70, 5), torch.float32)
    wide = torch.zeros(2, 9, 100)
    wide[..., 20:90] = base
    ops.token_scatter(value, position, wide[..., 20:90], in_place=True, impl=impl)
    assert torch.equal(wide[..., 20:90], put(value, position, base))
    assert not wide[..., :20].any()
    assert not wide[..., 90:].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_writes_only_its_output(dtype):
    value, position, base, _ = inputs((2, 5, 71, 3), dtype)
    y = padded(torch.zeros(2, 5, 71, dtype=dtype))
    _native.call("token_scatter", padded(value), position, padded(base), None, y, True)
    assert padding_intact(y)
    assert y.isfinite().all()


def test_float64_native():
    value, position, base, gate = inputs((2, 9, 70, 4), torch.float64)
    y = ops.token_scatter(value, position, base, gate=gate, residual=True, impl="native")
    want = reference.token_scatter(value, position, base, gate=gate, residual=True)
    torch.testing.assert_close(y, want, rtol=1e-15, atol=1e-15)


def test_sample_does_not_see_its_batch_mates(impl):
    args = inputs((3, 9, 50, 6), torch.float32)
    whole = ops.token_scatter(*args[:3], gate=args[3], residual=True, impl=impl)
    own = [x[1:2] for x in args]
    alone = ops.token_scatter(*own[:3], gate=own[3], residual=True, impl=impl)
    assert torch.equal(whole[1:2], alone)


def test_threads_do_not_change_a_bit():
    value, position, base, gate = inputs((2, 300, 70, 100), torch.bfloat16)
    threads = torch.get_num_threads()
    options = {"gate": gate, "residual": True, "impl": "native"}
    try:
        torch.set_num_threads(1)
        one = ops.token_scatter(value, position, base, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.token_scatter(value, position, base, **options))


@pytest.mark.parametrize("shape", [(0, 4, 8, 2), (2, 0, 8, 2), (2, 3, 0, 2)], ids=str)
def test_empty(shape, impl):
    value, position, base, _ = inputs(shape, torch.float32)
    assert ops.token_scatter(value, position, base, impl=impl).shape == base.shape


def test_opcheck_and_compile():
    value, position, base, gate = inputs((2, 5, 64, 3), torch.float32)
    op = torch.ops.fewstep.token_scatter.default
    torch.library.opcheck(op, (value, position, base, gate, base.clone(), True, "native"))
    torch.library.opcheck(op, (value, position, None, None, base.clone(), False, "native"))

    def update(value, position, base):
        kept = base.clone()
        ops.token_scatter(value, position, kept, in_place=True)
        return kept, ops.token_scatter(value, position, kept, gate=gate, residual=True)

    compiled = torch.compile(update, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(value, position, base), update(value, position, base), strict=True
    ):
        assert torch.equal(got, want)


def test_in_place_is_seen_by_autograd():
    value, position, base, _ = inputs((1, 5, 8, 3), torch.float32)
    factor = torch.ones_like(base).requires_grad_()
    y = factor * base
    with torch.no_grad():
        for impl in ("native", "reference"):
            before = base._version
            ops.token_scatter(value, position, base, in_place=True, impl=impl)
            assert base._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_tangents_and_gradients_are_refused():
    value, position, base, _ = inputs((2, 5, 8, 3), torch.float32)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda v: ops.token_scatter(v, position, base), (value,), (value,))
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda v: ops.token_scatter(value, position, v), (base,), (base,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.token_scatter(value, position, base.clone().requires_grad_())


VALUE, MAP, BASE = torch.randn(2, 3, 8), torch.zeros(2, 5).long(), torch.randn(2, 5, 8)
GATE = torch.ones(2, 8)
BAD = [
    ((VALUE[0], MAP, BASE), {}, r"value: expected \[B, N, C\], got \[3, 8\]"),
    ((VALUE.int(), MAP, BASE), {}, "value: expected a floating dtype, got torch.int32"),
    ((VALUE, MAP, BASE[:1]), {}, "base: expected .*with B = 2 and C = 8 .*got .1, 5, 8."),
    ((VALUE, MAP, BASE[..., :4]), {}, "base: expected .*got .2, 5, 4."),
    ((VALUE, MAP, BASE.half()), {}, "base: expected torch.float32 on cpu, got torch.float16"),
    ((VALUE, MAP.float(), BASE), {}, "position: expected int32 or int64 on cpu"),
    ((VALUE, MAP[:, :3], BASE), {}, r"position: expected \[2, 5\], got \[2, 3\]"),
    ((VALUE, MAP, BASE), {"gate": GATE[:, :3]}, r"gate: expected a row a sample, \[2, 8\]"),
    ((VALUE, MAP, BASE), {"gate": GATE.half()}, "gate: expected torch.float32"),
    ((VALUE, MAP, BASE.mT.contiguous().mT), {"in_place": True}, "base: expected unit stride"),
    ((VALUE, MAP, BASE[:, :1].expand(BASE.shape)), {"in_place": True}, "memory of its own"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_bad_input_names_the_argument(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.token_scatter(*args, **kwargs)


def test_wrong_kinds_and_unknown_implementations():
    with pytest.raises(TypeError, match="position: expected a tensor, got list"):
        ops.token_scatter(VALUE, [[0]], BASE)
    with pytest.raises(TypeError, match="residual: expected True or False, got int"):
        ops.token_scatter(VALUE, MAP, BASE, residual=1)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        ops.token_scatter(VALUE.double(), MAP, BASE.double(), impl="triton")


NATIVE = (VALUE, MAP, BASE, GATE, torch.empty(2, 5, 8), True)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, VALUE[0], "value: expected 3 axes"),
        (1, MAP.float(), "position: expected int32"),
        (1, MAP[:, :4], "position: expected size 5"),
        (2, BASE.half(), "base: expected float32"),
        (2, BASE.mT.contiguous().mT, "base: expected unit stride"),
        (3, GATE[:, :4], "gate: expected size 8"),
        (4, torch.empty(2, 5, 16)[..., ::2], "y: expected unit stride"),
        (4, torch.empty(2, 5, 9), "y: expected size 8"),
    ],
)
def test_native_call_checks_for_itself(at, value, message):
    args = [value if i == at else old for i, old in enumerate(NATIVE)]
    with pytest.raises(ValueError, match=message):
        _native.call("token_scatter", *args)
