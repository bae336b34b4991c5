"""norm_jvp_backward: every implementation against the fp64 oracle, and the oracle itself."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "t_x", "weight", "bias", "scale", "shift", "t_scale", "t_shift")
KINDS = ["layer", "rms"]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def inputs(b, n, c, dtype=torch.float32, device=None, **shapes):
    """Cotangents d_y and dt_y, and the inputs of norm_jvp by name."""
    default = {"x": (b, n, c), "t_x": (b, n, c), "weight": (c,), "bias": (c,)}
    default |= {name: (b, 1, c) for name in NAMES[4:]} | shapes
    primals = {name: torch.randn(default[name]).to(device, dtype) for name in NAMES}
    return [torch.randn(b, n, c).to(device, dtype) for _ in range(2)], primals


def statistics(primals, kind):
    x, t_x = primals["x"], primals["t_x"]
    return reference.norm_jvp(x, t_x, kind=kind)[2].contiguous()


def double(values):
    return {name: None if v is None else v.double() for name, v in values.items()}


def oracle(cotangents, primals, kind, wanted):
    """The gradients in fp64, from statistics in fp64."""
    exact = double(primals)
    d_y, dt_y = (None if v is None else v.double() for v in cotangents)
    return reference.norm_jvp_backward(
        d_y, dt_y, **exact, stats=statistics(exact, kind), wanted=wanted, kind=kind
    )


def plain_gradients(cotangents, primals, kind, wanted):
    """The formula of the forward in the dtype at hand, differentiated by torch."""
    leaves = {k: v if v is None else v.clone().requires_grad_() for k, v in primals.items()}
    y, t_y, _ = reference.norm_jvp(**leaves, kind=kind)
    pairs = [(o, c) for o, c in zip((y, t_y), cotangents, strict=True) if c is not None]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [leaves[name] for name in wanted],
        [c for _, c in pairs],
        materialize_grads=True,
    )
    return dict(zip(wanted, found, strict=True))


def check(cotangents, primals, kind, impl, wanted=None):
    stats = statistics(primals, kind)
    got = ops.norm_jvp_backward(
        *cotangents, **primals, stats=stats, wanted=wanted, kind=kind, impl=impl
    )
    wanted = wanted or [name for name in NAMES if primals[name] is not None]
    want = oracle(cotangents, primals, kind, wanted)
    dtype = primals["x"].dtype
    eps = torch.finfo(dtype).eps
    plain = plain_gradients(cotangents, primals, kind, wanted)
    for name, ours in zip(NAMES, got, strict=True):
        if name not in wanted:
            assert ours is None
            continue
        assert ours.shape == primals[name].shape, name
        assert ours.dtype == primals[name].dtype, name
        # The error of torch's own through the formula, which has the same precision, and some units
        # for another order. 16 bits: or half a unit, rounded once; rows of a full operand that are
        # then added are each rounded before.
        theirs = 2 * relative_error(plain[name], want[name])
        bound = max(theirs, 1.1 * eps / 2) if eps > 1e-4 else theirs + 4 * eps
        assert relative_error(ours, want[name]) <= bound, name


SHAPES = [(1, 1, 72), (2, 15, 100), (1, 33, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, kind, device):
    check(*inputs(2, 5, 72, dtype, device), kind, "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 1152), (1, 2, 3001), (1, 3, 1)], ids=str)
def test_native(shape, dtype, kind):
    check(*inputs(*shape, dtype), kind, "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 1152)], ids=str)
@pytest.mark.triton
def test_triton(shape, dtype, kind, device):
    check(*inputs(*shape, dtype, device), kind, "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, kind, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        check(*inputs(2, 3, 77, dtype), kind, "native")


def test_oracle_is_the_gradient(kind):
    """The gradients written out by hand are torch's of the forward's formula, in fp64."""
    shapes = {"scale": (24,), "shift": (2, 7, 24), "t_scale": (1, 7, 24)}
    cotangents, primals = inputs(2, 7, 24, torch.float64, **shapes)
    got = oracle(cotangents, primals, kind, NAMES)
    for name, want in plain_gradients(cotangents, primals, kind, NAMES).items():
        assert relative_error(got[name], want) < 1e-14


@pytest.mark.parametrize(
    "shapes",
    [
        {"scale": (24,), "t_scale": (2, 18, 24), "shift": (1, 1, 24), "t_shift": (1, 18, 24)},
        {"scale": (2, 18, 24), "t_scale": (24,), "shift": (18, 24), "t_shift": (2, 1, 24)},
    ],
    ids=["a", "b"],
)
def test_modulation_broadcasts(shapes, kind, impl):
    check(*inputs(2, 18, 24, **shapes), kind, impl)


@pytest.mark.parametrize("lead", [(), (6,), (2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, kind, impl):
    whole = (*lead, 24)
    shapes = {"x": whole, "t_x": whole} | {name: (24,) for name in NAMES[4:]}
    if len(lead) == 3:  # of one token, of a batch item, of a token in all batch items
        shapes |= {"scale": (2, 1, 1, 24), "t_scale": (2, 3, 24), "shift": (2, 2, 1, 24)}
    _, primals = inputs(2, 2, 24, **shapes)
    check([torch.randn(whole), torch.randn(whole)], primals, kind, impl)


@pytest.mark.parametrize("absent", ["d_y", "dt_y", *NAMES[1:]])
def test_absent_operands(absent, kind, impl):
    cotangents, primals = inputs(2, 3, 40)
    if absent in ("d_y", "dt_y"):
        cotangents[absent == "dt_y"] = None
    else:
        primals[absent] = None
        if f"t_{absent}" in NAMES[4:]:
            primals[f"t_{absent}"] = None
    check(cotangents, primals, kind, impl)


@pytest.mark.parametrize("wanted", [[name] for name in NAMES] + [["x", "scale"], ["weight", "t_x"]])
def test_only_what_is_wanted(wanted, impl):
    cotangents, primals = inputs(2, 3, 40, t_shift=(2, 3, 40))
    check(cotangents, primals, "layer", impl, wanted)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, kind, impl):
    cotangents, primals = inputs(2, 3, 40, scale=(40,), t_scale=(2, 3, 40))
    check([layout(v) for v in cotangents], {k: layout(v) for k, v in primals.items()}, kind, impl)


@pytest.mark.parametrize("rows", ["x", "columns"])
def test_writes_stay_inside(rows, kernel, kind):
    cotangents, primals = inputs(2, 18, 40, scale=(2, 18, 40), t_scale=(2, 18, 40))
    stats = statistics(primals, kind)
    by_row = [padded(torch.zeros(2, 18, 40)) if rows == "x" else None for _ in range(4)]
    launch, per_sum = None, 64
    if kernel == "triton":
        from fewstep.kernels.norm_jvp_backward import ROWS_PER_SUM as per_sum
        from fewstep.kernels.norm_jvp_backward import launch_norm_jvp_backward as launch
    parts = -(-18 // per_sum)
    sums = padded(torch.zeros(2, parts, 3, 40)) if rows == "columns" else None
    some = (primals[name] for name in ("weight", "bias", "scale", "t_scale"))
    args = (*cotangents, primals["x"], primals["t_x"], stats, *some, *by_row, sums)
    args = (*args, 0b001011 if rows == "columns" else 0, kind == "layer")
    launch(*args) if launch else _native.call("norm_jvp_backward", *args)
    want = oracle(cotangents, primals, kind, NAMES)
    if rows == "columns":
        assert padding_intact(sums)
        got = dict(zip(("weight", "bias", "shift"), sums.sum(1).unbind(1), strict=True))
        got |= {"weight": got["weight"].sum(0), "bias": got["bias"].sum(0)}
        got["shift"] = got["shift"][:, None]
    else:
        assert all(padding_intact(v) for v in by_row)
        got = dict(zip(("x", "t_x", "scale", "t_scale"), by_row, strict=True))
    assert all(relative_error(v, want[name]) < 1e-6 for name, v in got.items())


def test_float32_parameters_of_a_16_bit_input(impl):
    cotangents, primals = inputs(2, 3, 40, torch.bfloat16)
    primals |= {name: primals[name].float() for name in ("weight", "bias")}
    check(cotangents, primals, "layer", impl)


def test_gradients_are_tensors_of_their_own(impl):
    """That of a full shift is the cotangent itself: an op must not return its input."""
    cotangents, primals = inputs(2, 3, 8, shift=(2, 3, 8), t_shift=(2, 3, 8))
    stats = statistics(primals, "layer")
    before = [v.clone() for v in cotangents]
    for gradient in ops.norm_jvp_backward(*cotangents, **primals, stats=stats, impl=impl):
        gradient.fill_(7)
    assert all(torch.equal(a, b) for a, b in zip(cotangents, before, strict=True))


def test_empty(impl):
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.randn(shape)
        scale = torch.randn(shape[0], 1, 8)
        weight, stats = torch.randn(8), torch.empty(*shape[:-1], 4)
        got = ops.norm_jvp_backward(
            x, x, x, x, stats, weight=weight, scale=scale, shift=x, impl=impl
        )
        assert got[0].shape == got[1].shape == got[5].shape == shape
        assert not got[2].any()
        assert got[4].shape == scale.shape


def test_threads_do_not_change_a_bit():
    cotangents, primals = inputs(2, 130, 40)
    call = {**primals, "stats": statistics(primals, "layer"), "impl": "native"}
    one = ops.norm_jvp_backward(*cotangents, **call)
    torch.set_num_threads(4)
    many = ops.norm_jvp_backward(*cotangents, **call)
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_nan_stays_in_its_row(kernel):
    cotangents, primals = inputs(1, 4, 40)
    primals["x"][0, 2, 5] = float("nan")
    stats = statistics(primals, "layer")
    d_x, d_t_x, *_ = ops.norm_jvp_backward(*cotangents, **primals, stats=stats, impl=kernel)
    for out in (d_x, d_t_x):
        assert out[0, 2].isnan().all()
        assert not out[0, [0, 1, 3]].isnan().any()


def test_opcheck():
    cotangents, primals = inputs(2, 3, 8, shift=(2, 3, 8))
    op = torch.ops.fewstep.norm_jvp_backward.default
    others = [primals[name] for name in NAMES[2:]]
    x, t_x, stats = primals["x"], primals["t_x"], statistics(primals, "layer")
    for wanted in (0b11111111, 0b101):
        args = (*cotangents, x, t_x, stats, *others, wanted, True, "native")
        torch.library.opcheck(op, args)


def test_a_tangent_is_refused():
    cotangents, primals = inputs(1, 2, 8)
    stats = statistics(primals, "layer")

    def f(d_y):
        return ops.norm_jvp_backward(d_y, cotangents[1], **primals, stats=stats)

    with pytest.raises(DerivativeError, match="norm_jvp_backward has no forward-mode rule"):
        torch.func.jvp(f, (cotangents[0],), (cotangents[0],))


def test_bad_input_names_the_argument():
    (d_y, dt_y), primals = inputs(2, 3, 8)
    stats = statistics(primals, "layer")

    def call(d_y=d_y, dt_y=dt_y, stats=stats, **changes):
        return ops.norm_jvp_backward(d_y, dt_y, stats=stats, **{**primals, **changes})

    with pytest.raises(ValueError, match=r"d_y: expected the shape of x, \[2, 3, 8\], got"):
        call(d_y=d_y[:1])
    with pytest.raises(ValueError, match=r"dt_y: expected the dtype of x, torch\.float32, got"):
        call(dt_y=dt_y.half())
    with pytest.raises(ValueError, match=r"stats: expected torch\.float32 \[2, 3, 4\] as norm_jvp"):
        call(stats=stats[..., :2])
    with pytest.raises(ValueError, match="stats: expected"):
        call(stats=stats.double())
    with pytest.raises(ValueError, match=r"wanted: expected names of given tensors .*, got 'y'"):
        call(wanted=["x", "y"])
    with pytest.raises(ValueError, match=r"wanted: expected names of given tensors .*, got 'bias'"):
        call(bias=None, wanted=["bias"])
    with pytest.raises(ValueError, match=r"weight: expected \[C\] = \[8\], got"):
        call(weight=d_y)
    with pytest.raises(ValueError, match="kind: expected 'layer' or 'rms'"):
        call(kind="batch")
