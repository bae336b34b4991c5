"""modulate_jvp_backward: every implementation against the fp64 oracle, and the oracle itself."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("y", "gate", "t_y", "t_gate")


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def inputs(b, n, c, dtype=torch.float32, device=None, **shapes):
    """d_out, dt_out, y, gate, t_y, t_gate; gates [B, 1, C] unless a shape is given by name."""
    default = {name: (b, n, c) for name in ("d_out", "dt_out", "y", "gate", "t_y", "t_gate")}
    default |= {"gate": (b, 1, c), "t_gate": (b, 1, c)} | shapes
    return [torch.randn(shape).to(device, dtype) for shape in default.values()]


def double(args):
    return [None if v is None else v.double() for v in args]


def given(args):
    return [name for name, v in zip(NAMES, args[2:], strict=True) if v is not None]


def plain_gradients(args):
    """The formula of the forward, differentiated by torch in the dtype at hand."""
    leaves = [None if v is None else v.clone().requires_grad_() for v in args[2:]]
    y, gate, t_y, t_gate = leaves
    outputs = reference.modulate_jvp(torch.zeros_like(y), y, gate, None, t_y, t_gate)
    pairs = [(o, c) for o, c in zip(outputs, args[:2], strict=True) if c is not None]
    pairs = [(o, c) for o, c in pairs if o.requires_grad]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [v for v in leaves if v is not None],
        [c for _, c in pairs],
        materialize_grads=True,
    )
    return dict(zip(given(args), found, strict=True))


def check(args, impl, wanted=None):
    got = ops.modulate_jvp_backward(*args, wanted=wanted, impl=impl)
    wanted = wanted or given(args)
    want = reference.modulate_jvp_backward(*double(args), wanted=wanted)
    eps = torch.finfo(args[2].dtype).eps
    plain = want if eps > 1e-4 else plain_gradients(args)
    for name, ours, primal in zip(NAMES, got, args[2:], strict=True):
        if name not in wanted:
            assert ours is None
            continue
        assert ours.shape == primal.shape, name
        assert ours.dtype == primal.dtype, name
        # 16 bits: rounded once, from float32. Otherwise the error of torch's own, and some units
        # for sums in another order.
        bound = 1.1 * eps / 2
        if eps < 1e-4:
            bound = 2 * relative_error(plain[name], want[name]) + 4 * eps
        assert relative_error(ours, want[name]) <= bound, name


SHAPES = [(1, 1, 72), (2, 15, 100), (1, 33, 8)]


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
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 1152)], ids=str)
@pytest.mark.triton
def test_triton(shape, dtype, device):
    check(inputs(*shape, dtype, device), "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        check(inputs(2, 3, 77, dtype), "native")


def test_oracle_is_the_gradient():
    args = inputs(2, 7, 24, torch.float64, gate=(24,), t_gate=(1, 7, 24))
    got = reference.modulate_jvp_backward(*args, wanted=NAMES)
    for name, want in plain_gradients(args).items():
        assert relative_error(got[name], want) < 1e-14


@pytest.mark.parametrize(
    "shapes",
    [{"gate": (24,), "t_gate": (2, 18, 24)}, {"gate": (2, 18, 24), "t_gate": (1, 18, 24)}],
    ids=["a", "b"],
)
def test_gate_broadcasts(shapes, impl):
    check(inputs(2, 18, 24, **shapes), impl)


@pytest.mark.parametrize("lead", [(), (6,), (2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, impl):
    gates = ((2, 1, 1, 24), (2, 3, 24)) if len(lead) == 3 else ((24,), (24,))
    d_out, dt_out, y, t_y = (torch.randn(*lead, 24) for _ in range(4))
    check([d_out, dt_out, y, torch.randn(gates[0]), t_y, torch.randn(gates[1])], impl)


@pytest.mark.parametrize("absent", [(0,), (1,), (3, 5), (4,), (5,), (4, 5), (3, 4, 5)], ids=str)
def test_absent_operands(absent, impl):
    check([None if i in absent else v for i, v in enumerate(inputs(2, 3, 40))], impl)


@pytest.mark.parametrize("wanted", [["y"], ["gate"], ["t_y"], ["t_gate"], ["y", "gate"]], ids=str)
def test_only_what_is_wanted(wanted, impl):
    check(inputs(2, 3, 40, t_gate=(2, 3, 40)), impl, wanted)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    check([layout(v) for v in inputs(2, 3, 40, gate=(40,), t_gate=(2, 3, 40))], impl)


def test_writes_stay_inside(kernel):
    args = inputs(2, 18, 40, gate=(2, 18, 40), t_gate=(2, 18, 40))
    by_row = [padded(torch.zeros(2, 18, 40)) for _ in range(4)]
    launch, per_sum = None, 64
    if kernel == "triton":
        from fewstep.kernels.modulate_jvp_backward import ROWS_PER_SUM as per_sum
        from fewstep.kernels.modulate_jvp_backward import launch_modulate_jvp_backward as launch
    sums = [padded(torch.zeros(2, -(-18 // per_sum), 40)) for _ in range(2)]
    everything = (*args, *by_row, *sums)
    launch(*everything) if launch else _native.call("modulate_jvp_backward", *everything)
    assert all(padding_intact(v) for v in (*by_row, *sums))
    want = reference.modulate_jvp_backward(*double(args), wanted=NAMES)
    for name, v in zip(("y", "t_y", "gate", "t_gate"), by_row, strict=True):
        assert relative_error(v, want[name]) < 1e-6
    for name, v in zip(("gate", "t_gate"), sums, strict=True):
        assert relative_error(v.sum(1), want[name].sum(1)) < 1e-6


def test_gradients_are_tensors_of_their_own(impl):
    """Without a gate they are the cotangents themselves: an op must not return its input."""
    d_out, dt_out, y, _, t_y, _ = inputs(2, 3, 8)
    before = d_out.clone(), dt_out.clone()
    for gradient in ops.modulate_jvp_backward(d_out, dt_out, y, None, t_y, impl=impl):
        if gradient is not None:
            gradient.fill_(7)
    assert torch.equal(d_out, before[0])
    assert torch.equal(dt_out, before[1])


def test_empty(impl):
    for shape in ((0, 5, 8), (2, 0, 8)):
        y, gate = torch.randn(shape), torch.randn(8)
        d_y, d_gate, *_ = ops.modulate_jvp_backward(y, y, y, gate, impl=impl)
        assert d_y.shape == shape
        assert not d_gate.any()


def test_threads_do_not_change_a_bit():
    args = inputs(2, 130, 40)
    one = ops.modulate_jvp_backward(*args, impl="native")
    torch.set_num_threads(4)
    many = ops.modulate_jvp_backward(*args, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_opcheck():
    args = inputs(2, 3, 8)
    op = torch.ops.fewstep.modulate_jvp_backward.default
    for wanted in (0b1111, 0b0010):
        torch.library.opcheck(op, (*args, wanted, "native"))


def test_a_tangent_is_refused():
    d_out, *rest = inputs(1, 2, 8)
    with pytest.raises(DerivativeError, match="modulate_jvp_backward has no forward-mode rule"):
        torch.func.jvp(lambda d: ops.modulate_jvp_backward(d, *rest), (d_out,), (d_out,))


def test_bad_input_names_the_argument():
    d_out, dt_out, y, _, t_y, t_gate = inputs(2, 3, 8)
    call = ops.modulate_jvp_backward
    with pytest.raises(ValueError, match=r"d_out: expected the shape of y, \[2, 3, 8\], got"):
        call(d_out[:1], dt_out, y)
    with pytest.raises(ValueError, match=r"dt_out: expected the dtype of y, torch\.float32, got"):
        call(d_out, dt_out.half(), y)
    with pytest.raises(ValueError, match="gate: expected a shape that broadcasts against y"):
        call(d_out, dt_out, y, torch.randn(3, 1, 8))
    with pytest.raises(ValueError, match="t_gate: expected gate to be given"):
        call(d_out, dt_out, y, None, t_y, t_gate)
    with pytest.raises(ValueError, match=r"wanted: expected names of given tensors .*, got 'gate'"):
        call(d_out, dt_out, y, wanted=["gate"])
