"""norm_jvp: every implementation against the fp64 oracle, and the identities it must obey."""

import pytest
import torch
import torch.nn.functional as F

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("t_x", "weight", "bias", "scale", "shift", "t_scale", "t_shift")
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
    """x and a dict of everything else; modulation [B, 1, C] unless a shape is given by name."""
    default = {"t_x": (b, n, c), "weight": (c,), "bias": (c,)}
    default |= {name: (b, 1, c) for name in NAMES[3:]} | shapes
    x = 0.5 + 2 * torch.randn(b, n, c)
    others = {name: torch.randn(default[name]).to(device, dtype) for name in NAMES}
    return x.to(device, dtype), others


def double(x, others):
    return x.double(), {k: None if v is None else v.double() for k, v in others.items()}


def plain_jvp(x, others, kind):
    """What users have today: torch's forward mode through its norms, in the dtype of x."""
    c = x.shape[-1:]
    zeros = torch.zeros_like(x)
    names = [name for name in ("scale", "shift") if others[name] is not None]

    def modulated(x, *modulation):
        given = dict(zip(names, modulation, strict=True))
        if kind == "layer":
            z = F.layer_norm(x, c, others["weight"], others["bias"], 1e-6)
        else:
            z = F.rms_norm(x, c, others["weight"], 1e-6)
            z = z if others["bias"] is None else z + others["bias"]
        return z * (1 + given.get("scale", 0)) + given.get("shift", 0)

    primals = [x, *(others[name].expand(x.shape).contiguous() for name in names)]
    tangents = [others["t_x"], *(others[f"t_{name}"] for name in names)]
    tangents = [zeros if t is None else t.expand(x.shape).contiguous() for t in tangents]
    return torch.func.jvp(modulated, tuple(primals), tuple(tangents))


def check(x, others, kind, impl):
    got = ops.norm_jvp(x, **others, kind=kind, return_stats=True, impl=impl)
    exact_x, exact_others = double(x, others)
    want = reference.norm_jvp(exact_x, **exact_others, kind=kind)
    plain = plain_jvp(x, others, kind)
    eps = torch.finfo(x.dtype).eps
    for name, ours, theirs, exact in zip(("y", "t_y"), got, plain, want, strict=False):
        assert ours.shape == x.shape, name
        assert ours.dtype == x.dtype, name
        # 16 bits: rounded once, from float32, so no element is off by more than half a unit.
        # Otherwise the error of torch's own, and some units for sums in another order.
        bound = eps / 2 if eps > 1e-4 else 2 * relative_error(theirs, exact) + 4 * eps
        assert relative_error(ours, exact) <= bound, name
    # Means over at most 3,000 terms of random sign: sqrt(3000) 2^-24 = 3e-6 of their size.
    bound = 1e-13 if x.dtype == torch.float64 else 1e-5
    assert got[2].dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert (got[2] - want[2]).abs().max() <= bound * (1 + want[2].abs().max())


SHAPES = [(1, 1, 72), (2, 15, 1001), (1, 33, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, kind, device):
    check(*inputs(2, 5, 72, dtype, device), kind, "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 70, 1152), (1, 2, 3000), (1, 3, 1)], ids=str)
def test_native(shape, dtype, kind):
    check(*inputs(*shape, dtype), kind, "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 3, 1152)], ids=str)
@pytest.mark.triton
def test_triton(shape, dtype, kind, device):
    check(*inputs(*shape, dtype, device), kind, "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, kind, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        check(*inputs(2, 3, 77, dtype), kind, "native")


def test_oracle_is_the_derivative(kind):
    """The hand-written tangent is what torch's forward mode gives in fp64."""
    x, others = inputs(2, 7, 24, torch.float64, shift=(24,), t_shift=(2, 7, 24))
    got = reference.norm_jvp(x, **others, kind=kind)
    for ours, theirs in zip(got, plain_jvp(x, others, kind), strict=False):
        assert relative_error(ours, theirs) < 1e-13


@pytest.mark.parametrize(
    "shapes",
    [
        {"scale": (24,), "t_scale": (2, 5, 24), "shift": (1, 1, 24), "t_shift": (1, 5, 24)},
        {"scale": (2, 5, 24), "t_scale": (24,), "shift": (5, 24), "t_shift": (2, 1, 24)},
    ],
    ids=["a", "b"],
)
def test_modulation_broadcasts(shapes, kind, impl):
    x, others = inputs(2, 5, 24, **shapes)
    check(x, others, kind, impl)
    whole = {k: v.expand(2, 5, 24).clone() if k in shapes else v for k, v in others.items()}
    got, want = (ops.norm_jvp(x, **o, kind=kind, impl=impl) for o in (others, whole))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lead", [(), (6,), (2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, kind, impl):
    shapes = {"t_x": (*lead, 24)} | {name: (24,) for name in NAMES[3:]}
    if len(lead) == 3:  # of one token, of a batch item, of a token in all batch items
        shapes |= {"scale": (2, 1, 1, 24), "t_scale": (2, 3, 24), "shift": (2, 2, 1, 24)}
    x, others = inputs(2, 2, 24, **shapes)
    x = torch.randn(*lead, 24)
    check(x, others, kind, impl)


@pytest.mark.parametrize("absent", [*NAMES, "all tangents", "modulation", "all"])
def test_absent_operands(absent, kind, impl):
    groups = {
        "all tangents": ("t_x", "t_scale", "t_shift"),
        "modulation": ("scale", "shift", "t_scale", "t_shift"),
        "all": NAMES,
        "scale": ("scale", "t_scale"),
        "shift": ("shift", "t_shift"),
    }
    x, others = inputs(2, 3, 40)
    for name in groups.get(absent, (absent,)):
        others[name] = None
    check(x, others, kind, impl)
    if absent in ("all tangents", "all"):
        assert not ops.norm_jvp(x, **others, kind=kind, impl=impl)[1].any()


def test_zero_tangents_give_exactly_zero(kind, impl):
    x, others = inputs(2, 3, 40)
    for name in ("t_x", "t_scale", "t_shift"):
        others[name] = torch.zeros_like(others[name])
    _, t_y, stats = ops.norm_jvp(x, **others, kind=kind, return_stats=True, impl=impl)
    assert not t_y.any()
    assert not stats[..., 2:].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_do_not_change_a_bit_of_the_primal(dtype, kind, impl):
    x, others = inputs(2, 3, 72, dtype)
    for keep in ((), ("weight", "bias", "scale", "shift"), ("bias", "shift")):
        alone = {name: others[name] if name in keep else None for name in NAMES}
        want, _, stats = ops.norm_jvp(x, **alone, kind=kind, return_stats=True, impl=impl)
        tangents = {"t_x": others["t_x"]}
        tangents |= {
            f"t_{name}": others[f"t_{name}"] for name in ("scale", "shift") if name in keep
        }
        options = {**alone, **tangents}
        y, _, got = ops.norm_jvp(x, **options, kind=kind, return_stats=True, impl=impl)
        assert torch.equal(y, want)
        assert torch.equal(got[..., :2], stats[..., :2])


def test_linear_in_the_tangents(kind):
    x, u = inputs(2, 3, 72, torch.float64)
    _, w = inputs(2, 3, 72, torch.float64)
    w |= {name: u[name] for name in ("weight", "bias", "scale", "shift")}
    tangents = ("t_x", "t_scale", "t_shift")
    mixed = {**u, **{name: 2 * u[name] - 3 * w[name] for name in tangents}}
    t_u, t_w, t_mixed = (ops.norm_jvp(x, **o, kind=kind, impl="native")[1] for o in (u, w, mixed))
    assert relative_error(2 * t_u - 3 * t_w, t_mixed) < 1e-14


def test_the_norm_ignores_what_it_removes():
    """A constant moves every element of a row alike: LayerNorm's tangent is zero along it."""
    x, _ = inputs(2, 3, 72, torch.float64)
    _, t_y = ops.norm_jvp(x, torch.ones_like(x), impl="native")
    assert t_y.abs().max() < 1e-14
    # And along x itself only eps is left: t_n = eps rstd^2 n.
    y, t_y = ops.norm_jvp(x, x, kind="rms", eps=1e-3, impl="native")
    rstd = (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
    assert (t_y - 1e-3 * rstd**2 * y).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_large_mean_costs_no_accuracy(dtype, kernel):
    x, others = inputs(1, 3, 72, dtype)
    check((x + 100).to(dtype), others, "layer", kernel)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, kind, impl):
    x, others = inputs(2, 3, 40, shift=(40,), t_shift=(2, 3, 40))
    check(layout(x), {name: layout(v) for name, v in others.items()}, kind, impl)


def test_chunks_of_one_projection_are_read_in_place(impl):
    """scale and shift as adaLN has them: slices of one [B, 6 C] tensor."""
    x, others = inputs(2, 3, 40)
    table, t_table = torch.randn(2, 6 * 40), torch.randn(2, 6 * 40)
    shift, scale = (v[:, None] for v in table.chunk(6, 1)[:2])
    t_shift, t_scale = (v[:, None] for v in t_table.chunk(6, 1)[:2])
    others |= {"scale": scale, "shift": shift, "t_scale": t_scale, "t_shift": t_shift}
    check(x, others, "layer", impl)


def test_writes_stay_inside(kernel, kind):
    x, others = inputs(2, 5, 40, **{name: (2, 5, 40) for name in NAMES[3:]})
    outputs = [padded(torch.zeros(2, 5, 40)) for _ in range(2)]
    outputs.append(padded(torch.zeros(2, 5, 4)))
    args = (x, *(others[name] for name in NAMES), *outputs, kind == "layer", 1e-6)
    if kernel == "native":
        _native.call("norm_jvp", *args)
    else:
        from fewstep.kernels.norm_jvp import launch_norm_jvp

        launch_norm_jvp(*args)
    assert all(padding_intact(out) for out in outputs)
    exact_x, exact_others = double(x, others)
    want = reference.norm_jvp(exact_x, **exact_others, kind=kind)
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(outputs, want, strict=True))


def test_float32_parameters_of_a_16_bit_input(impl):
    x, others = inputs(2, 3, 40, torch.bfloat16)
    others |= {name: others[name].float() for name in ("weight", "bias")}
    got = ops.norm_jvp(x, **others, impl=impl)
    exact_x, exact_others = double(x, others)
    want = reference.norm_jvp(exact_x, **exact_others)
    for ours, exact in zip(got, want, strict=False):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, exact) <= 2.0**-8


def test_empty(impl):
    for shape in ((0, 5, 8), (2, 0, 8)):
        x = torch.randn(shape)
        y, t_y, stats = ops.norm_jvp(x, x, return_stats=True, impl=impl)
        assert y.shape == t_y.shape == shape
        assert stats.shape == (*shape[:-1], 4)


def test_a_row_does_not_see_the_others(kernel):
    x, others = inputs(2, 70, 40)
    whole = ops.norm_jvp(x, **others, impl=kernel)
    some = {k: v[1:2] if v.dim() == 3 else v for k, v in others.items()}
    some["t_x"] = some["t_x"][:, 66:67]
    alone = ops.norm_jvp(x[1:2, 66:67], **some, impl=kernel)
    assert all(torch.equal(a, b[1:2, 66:67]) for a, b in zip(alone, whole, strict=True))


def test_threads_do_not_change_a_bit():
    x, others = inputs(2, 130, 40)
    one = ops.norm_jvp(x, **others, return_stats=True, impl="native")
    torch.set_num_threads(4)
    many = ops.norm_jvp(x, **others, return_stats=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_nan_stays_in_its_row(kernel):
    x, others = inputs(1, 4, 40)
    x[0, 2, 5] = float("nan")
    for out in ops.norm_jvp(x, **others, impl=kernel):
        assert out[0, 2].isnan().all()
        assert not out[0, [0, 1, 3]].isnan().any()


def called(kind):
    def f(x, t_x, *others):
        options = dict(zip(NAMES[1:], others, strict=True))
        return ops.norm_jvp(x, t_x, **options, kind=kind, return_stats=True, impl="native")

    return f


def differentiable_inputs(dtype=torch.float64):
    x, others = inputs(2, 3, 5, dtype, shift=(5,), t_scale=(2, 3, 5), t_shift=(1, 3, 5))
    return [v.requires_grad_() for v in (x, *others.values())]


def test_gradients(kind):
    assert torch.autograd.gradcheck(called(kind), differentiable_inputs())


def test_gradients_of_gradients(kind):
    """Through y and t_y; the gradient of stats on the way is one of this."""

    def f(*args):
        return called(kind)(*args)[:2]

    assert torch.autograd.gradgradcheck(f, differentiable_inputs())


def test_gradients_of_some(kind):
    """Only what is asked for is computed, and what is absent needs nothing."""
    x, t_x, weight, *_ = differentiable_inputs()
    for wanted in ([x], [t_x], [weight], [x, weight]):
        y, t_y = ops.norm_jvp(x, t_x, weight=weight, kind=kind, impl="native")
        got = torch.autograd.grad((y.sin() + t_y.cos()).sum(), wanted)
        y, t_y, _ = reference.norm_jvp(x, t_x, weight=weight, kind=kind)
        want = torch.autograd.grad((y.sin() + t_y.cos()).sum(), wanted)
        torch.testing.assert_close(got, want)
    y, _ = ops.norm_jvp(x, None, kind=kind, impl="native")
    y.sum().backward()  # a cotangent for y alone


def test_func_transforms(kind):
    args = [v.detach() for v in differentiable_inputs()]

    def loss(f):
        return lambda *args: sum(out.sin().sum() for out in f(*args)[:2])

    def oracle(x, t_x, *others):
        options = dict(zip(NAMES[1:], others, strict=True))
        return reference.norm_jvp(x, t_x, **options, kind=kind)

    where = tuple(range(len(args)))
    got, want = (torch.func.grad(loss(f), where)(*args) for f in (called(kind), oracle))
    torch.testing.assert_close(got, want)
    t_many = torch.randn(3, *args[1].shape, dtype=torch.float64)
    dims = (None, 0, *[None] * 6)
    got, want = (torch.vmap(f, dims)(args[0], t_many, *args[2:]) for f in (called(kind), oracle))
    torch.testing.assert_close(got, want)


def test_compiles_with_gradients():
    args = differentiable_inputs(torch.float32)

    def step(*args):
        y, t_y, _ = called("layer")(*args)
        return (y.sin() + t_y.cos()).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, step))
    torch.testing.assert_close(got, want)


def test_opcheck():
    x, others = inputs(2, 3, 8)
    op = torch.ops.fewstep.norm_jvp.default
    torch.library.opcheck(op, (x, *others.values(), True, 1e-6, "native"))
    torch.library.opcheck(op, (x.mT, None, *[None] * 6, False, 1e-6, "native"))


def test_a_tangent_is_refused():
    x, others = inputs(1, 2, 8)
    with pytest.raises(DerivativeError, match="norm_jvp has no forward-mode rule"):
        torch.func.jvp(lambda x: ops.norm_jvp(x, **others)[0], (x,), (x,))
    with pytest.raises(DerivativeError, match="norm_jvp has no forward-mode rule"):
        torch.func.jvp(lambda s: ops.norm_jvp(x, scale=s)[0], (x,), (x,))


def test_bad_input_names_the_argument():
    x, others = inputs(2, 3, 8)
    call = ops.norm_jvp
    with pytest.raises(ValueError, match="kind: expected 'layer' or 'rms', got 'group'"):
        call(x, kind="group")
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        call(x.int())
    with pytest.raises(ValueError, match=r"x: expected \[\.\.\., C\] with C at least 1, got \[\]"):
        call(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"t_x: expected the shape of x, \[2, 3, 8\], got"):
        call(x, others["t_x"][:1])
    with pytest.raises(ValueError, match=r"t_x: expected the dtype of x, torch\.float32, got"):
        call(x, others["t_x"].half())
    with pytest.raises(ValueError, match=r"weight: expected \[C\] = \[8\], got \[2, 3, 8\]"):
        call(x, weight=x)
    with pytest.raises(ValueError, match=r"bias: expected torch\.float32 as x has"):
        call(x, bias=others["bias"].half())
    with pytest.raises(ValueError, match=r"scale: expected a shape that broadcasts against x"):
        call(x, scale=torch.randn(3, 1, 8))
    with pytest.raises(
        ValueError, match=r"shift: expected .* with all of its last axis, got \[1\]"
    ):
        call(x, shift=torch.randn(1))
    with pytest.raises(ValueError, match="t_scale: expected scale to be given"):
        call(x, t_scale=others["t_scale"])
    with pytest.raises(ValueError, match="impl: expected one of"):
        call(x, impl="cuda")
    with pytest.raises(ops.UnsupportedError, match="expected at most 16384 columns, got 16385"):
        call(torch.randn(1, 16385), impl="triton")
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        call(x.double(), impl="triton")


def test_parameters_in_float32_beside_float64(impl):
    if impl == "triton":
        pytest.skip("no float64")
    x, others = inputs(2, 3, 8, torch.float64)
    low = {name: others[name].float().requires_grad_() for name in ("weight", "bias")}
    y, t_y = ops.norm_jvp(x, others["t_x"], **low, impl=impl)
    exact = {name: v.detach().double() for name, v in low.items()}
    torch.testing.assert_close((y, t_y), ops.norm_jvp(x, others["t_x"], **exact, impl=impl))
    gradients = torch.autograd.grad(y.sin().sum(), list(low.values()))
    assert all(g.dtype == torch.float32 for g in gradients)
    with pytest.raises(TypeError, match="weight: expected a tensor or None, got float"):
        ops.norm_jvp(x, weight=1.0)
