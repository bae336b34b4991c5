"""modulate_jvp: every implementation against the fp64 oracle, and the identities it must obey."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "y", "gate", "t_x", "t_y", "t_gate")


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def inputs(b, n, c, dtype=torch.float32, device=None, **shapes):
    """x, y, gate, t_x, t_y, t_gate; gates [B, 1, C] unless a shape is given by name."""
    default = {name: (b, n, c) for name in NAMES} | {"gate": (b, 1, c), "t_gate": (b, 1, c)}
    default |= shapes
    return [torch.randn(default[name]).to(device, dtype) for name in NAMES]


def double(args):
    return [None if v is None else v.double() for v in args]


def plain(x, y, gate, t_x, t_y, t_gate):
    """What users have today: torch's forward mode through the formula, in the dtype of x."""
    shape = x.shape
    gate = torch.ones_like(x) if gate is None else gate.expand(shape).contiguous()
    zeros = torch.zeros_like(x)
    tangents = tuple(
        zeros if t is None else t.expand(shape).contiguous() for t in (t_x, t_y, t_gate)
    )
    return torch.func.jvp(lambda x, y, gate: x + gate * y, (x, y, gate), tangents)


def check(args, impl):
    got = ops.modulate_jvp(*args, impl=impl)
    want = reference.modulate_jvp(*double(args))
    x = args[0]
    eps = torch.finfo(x.dtype).eps
    for name, ours, theirs, exact in zip(("out", "t_out"), got, plain(*args), want, strict=True):
        assert ours.shape == x.shape, name
        assert ours.dtype == x.dtype, name
        # Never worse than torch, which rounds each product and each sum; a unit of slack where
        # both happen to be exact.
        assert relative_error(ours, exact) <= relative_error(theirs, exact) + eps, name
        if eps > 1e-4:  # and rounded once: no element is off by more than half a unit
            assert relative_error(ours, exact) <= eps / 2, name


SHAPES = [(1, 1, 72), (2, 15, 1001), (1, 33, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, device):
    check(inputs(2, 5, 72, dtype, device), "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 1152), (1, 3, 1)], ids=str)
def test_native(shape, dtype):
    check(inputs(*shape, dtype), "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 1152)], ids=str)
@pytest.mark.triton
def test_triton(shape, dtype, device):
    check(inputs(*shape, dtype, device), "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        check(inputs(2, 3, 77, dtype), "native")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_sixteen_bits_are_widened_exactly_and_rounded_to_nearest_even(dtype, isa, monkeypatch):
    """Every bit pattern as x, others as y: subnormals, ties, overflow, infinities, NaN."""
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16)
    x, y = (v.view(dtype).view(2, 32, 1024)[..., :1019] for v in (patterns, patterns.roll(12345)))
    gate = torch.tensor([0.25, 2.0**-9], dtype=dtype).view(2, 1, 1).expand(2, 1, 1019)
    got, _ = ops.modulate_jvp(x, y, gate, impl="native")
    # A power of two times y is exact in float32, so only the sum is rounded, and then the result.
    want = (x.float() + gate.float() * y.float()).to(dtype)
    assert torch.equal(got.isnan(), want.isnan())
    exact = ~want.isnan()
    assert torch.equal(got.view(torch.int16)[exact], want.view(torch.int16)[exact])


def test_oracle_is_the_derivative():
    args = inputs(2, 7, 24, torch.float64, gate=(24,), t_gate=(2, 7, 24))
    for ours, theirs in zip(reference.modulate_jvp(*args), plain(*args), strict=True):
        assert relative_error(ours, theirs) < 1e-15


@pytest.mark.parametrize(
    "shapes",
    [{"gate": (24,), "t_gate": (2, 5, 24)}, {"gate": (2, 5, 24), "t_gate": (1, 5, 24)}],
    ids=["a", "b"],
)
def test_gate_broadcasts(shapes, impl):
    args = inputs(2, 5, 24, **shapes)
    check(args, impl)
    whole = [v.expand(2, 5, 24).clone() for v in args]
    got, want = (ops.modulate_jvp(*a, impl=impl) for a in (args, whole))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lead", [(), (6,), (2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, impl):
    gates = ((2, 1, 1, 24), (2, 3, 24)) if len(lead) == 3 else ((24,), (24,))
    x, y, t_x, t_y = (torch.randn(*lead, 24) for _ in range(4))
    check([x, y, torch.randn(gates[0]), t_x, t_y, torch.randn(gates[1])], impl)


@pytest.mark.parametrize("absent", [(2, 5), (3,), (4,), (5,), (3, 4, 5), (2, 3, 4, 5)], ids=str)
def test_absent_operands(absent, impl):
    args = [None if i in absent else v for i, v in enumerate(inputs(2, 3, 40))]
    check(args, impl)
    if {3, 4, 5} <= set(absent):
        assert not ops.modulate_jvp(*args, impl=impl)[1].any()


def test_zero_tangents_give_exactly_zero(impl):
    x, y, gate, *tangents = inputs(2, 3, 40)
    assert not ops.modulate_jvp(x, y, gate, *map(torch.zeros_like, tangents), impl=impl)[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_do_not_change_a_bit_of_the_primal(dtype, impl):
    args = inputs(2, 3, 72, dtype)
    with_tangents, _ = ops.modulate_jvp(*args, impl=impl)
    assert torch.equal(with_tangents, ops.modulate_jvp(*args[:3], impl=impl)[0])


def test_linear_in_the_tangents():
    x, y, gate, *u = inputs(2, 3, 72, torch.float64)
    w = inputs(2, 3, 72, torch.float64)[3:]
    mixed = [2 * a - 3 * b for a, b in zip(u, w, strict=True)]
    t_u, t_w, t_mixed = (ops.modulate_jvp(x, y, gate, *t, impl="native")[1] for t in (u, w, mixed))
    assert relative_error(2 * t_u - 3 * t_w, t_mixed) < 1e-15


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    check([layout(v) for v in inputs(2, 3, 40, gate=(40,), t_gate=(2, 3, 40))], impl)


def test_writes_stay_inside(kernel):
    args = inputs(2, 5, 40, gate=(2, 5, 40), t_gate=(2, 5, 40))
    outputs = [padded(torch.zeros(2, 5, 40)) for _ in range(2)]
    if kernel == "native":
        _native.call("modulate_jvp", *args, *outputs)
    else:
        from fewstep.kernels.modulate_jvp import launch_modulate_jvp

        launch_modulate_jvp(*args, *outputs)
    assert all(padding_intact(out) for out in outputs)
    want = reference.modulate_jvp(*double(args))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(outputs, want, strict=True))


def test_empty(impl):
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.randn(shape)
        out, t_out = ops.modulate_jvp(x, x, torch.randn(8), impl=impl)
        assert out.shape == t_out.shape == shape


def test_threads_do_not_change_a_bit():
    args = inputs(2, 130, 40)
    one = ops.modulate_jvp(*args, impl="native")
    torch.set_num_threads(4)
    many = ops.modulate_jvp(*args, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def differentiable_inputs(dtype=torch.float64):
    return [v.requires_grad_() for v in inputs(2, 3, 4, dtype, gate=(4,), t_gate=(2, 3, 4))]


def native(*args):
    return ops.modulate_jvp(*args, impl="native")


def test_gradients():
    args = differentiable_inputs()
    assert torch.autograd.gradcheck(native, args)
    assert torch.autograd.gradgradcheck(native, args)
    x, y, _, t_x, t_y, _ = args
    assert torch.autograd.gradcheck(native, (x, y, None, t_x, t_y, None))


@pytest.mark.parametrize(
    ("way", "present"),
    [
        *((way, present) for way in ("native", "reference") for present in range(16)),
        *(("compiled", present) for present in (0b0010, 0b1010, 0b1111)),
    ],
)
def test_gradients_through_t_out_of_what_is_there(way, present):
    """t_out depends on no x where t_x is None: nothing may be handed back for it."""
    kept = [True, True, *(bool(present >> i & 1) for i in (3, 0, 1, 2))]
    kept[5] = kept[5] and kept[2]
    args = [v if keep else None for v, keep in zip(differentiable_inputs(), kept, strict=True)]
    leaves = [v for v in args if v is not None]

    def losses(f):
        # Of both, of t_out alone, and of t_out for the tangents alone.
        for weight, wanted in ((1, leaves), (0, leaves), (0, leaves[2 + kept[2] :])):
            out, t_out = f(*args)
            loss = t_out.sin().sum() + (out.sin().sum() if weight else 0)
            if wanted and loss.requires_grad:
                yield torch.autograd.grad(loss, wanted, materialize_grads=True)
            else:
                yield tuple(torch.zeros_like(v) for v in wanted)

    def call(*args):
        return ops.modulate_jvp(*args, impl="auto" if way == "compiled" else way)

    if way == "compiled":
        call = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(list(losses(call)), list(losses(reference.modulate_jvp)))


def test_gradients_of_some():
    """Only what is asked for is computed; a loss on one output alone is enough."""
    args = differentiable_inputs()
    for i in range(6):
        for loss in (lambda out, t_out: out.sin().sum(), lambda out, t_out: t_out.cos().sum()):
            found = [
                torch.autograd.grad(loss(*f(*args)), args[i], allow_unused=True)[0]
                for f in (native, reference.modulate_jvp)
            ]
            if found[1] is None:
                assert found[0] is None or not found[0].any()
            else:
                torch.testing.assert_close(*found)


def test_func_transforms():
    args = [v.detach() for v in differentiable_inputs()]

    def loss(f):
        return lambda *args: sum(out.sin().sum() for out in f(*args))

    where = tuple(range(6))
    fs = (native, reference.modulate_jvp)
    torch.testing.assert_close(*(torch.func.grad(loss(f), where)(*args) for f in fs))
    t_many = torch.randn(3, *args[3].shape, dtype=torch.float64)
    dims = (None, None, None, 0, None, None)
    torch.testing.assert_close(*(torch.vmap(f, dims)(*args[:3], t_many, *args[4:]) for f in fs))


def test_compiles_with_gradients():
    args = differentiable_inputs(torch.float32)

    def step(*args):
        out, t_out = native(*args)
        return (out.sin() + t_out.cos()).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, step))
    torch.testing.assert_close(got, want)


def test_opcheck():
    args = inputs(2, 3, 8)
    op = torch.ops.fewstep.modulate_jvp.default
    torch.library.opcheck(op, (*args, "native"))
    torch.library.opcheck(op, (*(v.mT for v in args[:2]), None, None, None, None, "native"))


def test_a_tangent_is_refused():
    x, y, *_ = inputs(1, 2, 8)
    with pytest.raises(DerivativeError, match="modulate_jvp has no forward-mode rule"):
        torch.func.jvp(lambda y: ops.modulate_jvp(x, y)[0], (y,), (y,))


def test_bad_input_names_the_argument():
    x, y, gate, t_x, t_y, t_gate = inputs(2, 3, 8)
    call = ops.modulate_jvp
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        call(x.int(), y)
    with pytest.raises(
        ValueError, match=r"y: expected the shape of x, \[2, 3, 8\], got \[1, 3, 8\]"
    ):
        call(x, y[:1])
    with pytest.raises(ValueError, match=r"t_y: expected the dtype of x, torch\.float32, got"):
        call(x, y, gate, t_x, t_y.half())
    with pytest.raises(ValueError, match=r"gate: expected a shape that broadcasts against x"):
        call(x, y, torch.randn(3, 1, 8))
    with pytest.raises(ValueError, match="t_gate: expected gate to be given"):
        call(x, y, None, t_x, t_y, t_gate)
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        call(x.double(), y.double(), impl="triton")
