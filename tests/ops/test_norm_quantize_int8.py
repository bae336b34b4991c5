"""norm_quantize_int8: the bits of its two halves, its error against fp64, and its edges."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("weight", "bias", "scale", "shift")


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=["layer", "rms"])
def kind(request):
    return request.param


def inputs(b, n, c, dtype=torch.float32, device=None, **shapes):
    """x and a dict of everything else; modulation [B, 1, C] unless a shape is given by name."""
    shapes = {"weight": (c,), "bias": (c,), "scale": (b, 1, c), "shift": (b, 1, c)} | shapes
    x = (0.5 + 2 * torch.randn(b, n, c)).to(device, dtype)
    return x, {name: torch.randn(shapes[name]).to(device, dtype) for name in NAMES}


def check(x, options, impl):
    q, q_scale = ops.norm_quantize_int8(x, **options, impl=impl)
    assert (q.dtype, q.shape) == (torch.int8, x.shape)
    assert (q_scale.dtype, q_scale.shape) == (torch.float32, x.shape[:-1])
    assert q.is_contiguous()
    assert q_scale.is_contiguous()
    if impl != "triton" or not x.is_cuda:  # which contracts products and sums differently
        z = ops.norm_jvp(x, **options, impl=impl)[0]
        want = ops.quantize_int8(z, impl="reference")
        assert torch.equal(q, want[0])
        assert torch.equal(q_scale, want[1])
    given = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    z = reference.norm_jvp(x.double(), **given)[0]
    step, eps = q_scale.double()[..., None], torch.finfo(x.dtype).eps
    # Half a step, with three roundings on at most 127 steps; half a unit of z, rounded once; and
    # float32's own error in z: a few units of the largest, sums of C terms included.
    largest = z.abs().amax(-1, keepdim=True)
    bound = step * (0.5 + 127 * 3 * 2.0**-24) + eps / 2 * z.abs() + 16 * 2.0**-24 * largest
    assert ((z - q.double() * step).abs() <= bound).all()
    assert (q.abs().amax(-1) == 127).all()
    return q, q_scale


SHAPES = [(1, 1, 72), (2, 15, 1001), (1, 33, 8)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_and_error(shape, dtype, kind, impl, device):
    x, options = inputs(*shape, dtype, device)
    check(x, {**options, "kind": kind}, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 70, 1152), (1, 2, 3000)], ids=str)
def test_native_wide_rows_and_many(shape, dtype, kind):
    x, options = inputs(*shape, dtype)
    check(x, {**options, "kind": kind}, "native")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, kind, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in DTYPES:
        x, options = inputs(2, 7, 77, dtype)
        check(x, {**options, "kind": kind}, "native")


@pytest.mark.parametrize(
    "shapes",
    [
        {"scale": (24,), "shift": (1, 1, 24)},
        {"scale": (2, 5, 24), "shift": (24,)},
        {"scale": (5, 24), "shift": (2, 5, 24)},
    ],
    ids=["shared", "per token", "mixed"],
)
def test_modulation_broadcasts(shapes, kind, impl):
    x, options = inputs(2, 5, 24, **shapes)
    got = check(x, {**options, "kind": kind}, impl)
    for name in shapes:
        options[name] = options[name].expand(2, 5, 24).clone()
    want = ops.norm_quantize_int8(x, **options, kind=kind, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("lead", [(), (6,), (2, 2, 3)], ids=str)
def test_any_number_of_leading_axes(lead, kind, impl):
    _, options = inputs(1, 1, 24, scale=(24,), shift=(24,))
    if len(lead) == 3:  # one row per frame
        options["scale"] = torch.randn(2, 2, 1, 24)
    check(torch.randn(*lead, 24), {**options, "kind": kind}, impl)


@pytest.mark.parametrize("absent", [*NAMES, "modulation", "all"])
def test_absent_operands(absent, kind, impl):
    x, options = inputs(2, 3, 40)
    for name in {"modulation": NAMES[2:], "all": NAMES}.get(absent, (absent,)):
        options[name] = None
    given = {name: v for name, v in options.items() if v is not None}
    check(x, {**given, "kind": kind}, impl)


def test_eps_counts(kind, impl):
    x, options = inputs(1, 3, 40)
    given = {"scale": options["scale"], "kind": kind}
    small, large = (check(1e-3 * x, {**given, "eps": eps}, impl)[1] for eps in (1e-6, 1e-2))
    assert (small > 10 * large).all()  # rows of size 2e-3: divided by 2e-3, or by 0.1


PREPARED = [(96, True, 0), (96, False, 32), (256, True, 256), (640, True, 128), (48, False, 16)]


@pytest.mark.parametrize(("columns", "smoothed", "rotate"), PREPARED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_smoothing_and_rotation_come_after_the_norm(columns, smoothed, rotate, dtype, impl):
    """To the bit what quantize_int8 makes of the norm's output with the same arguments."""
    x, options = inputs(2, 7, columns, dtype)
    prologue = {"smooth": torch.rand(columns) + 0.1 if smoothed else None, "rotate": rotate}
    got = ops.norm_quantize_int8(x, **options, **prologue, impl=impl)
    if impl == "triton" and x.is_cuda:  # z may fall to the other side of a tie
        want = ops.norm_quantize_int8(x, **options, **prologue, impl="reference")
        torch.testing.assert_close(got[1], want[1], rtol=2 * torch.finfo(dtype).eps, atol=0)
        assert ((got[0].int() - want[0].int()).abs() <= 2).all()
        return
    z = ops.norm_jvp(x, **options, impl=impl)[0]
    want = ops.quantize_int8(z, **prologue, impl="reference")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert (got[0] != ops.norm_quantize_int8(x, **options, impl=impl)[0]).any()


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_smoothing_and_rotation_in_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    test_smoothing_and_rotation_come_after_the_norm(96, True, 32, torch.bfloat16, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float32_parameters_of_a_16_bit_input(dtype, impl):
    x, options = inputs(2, 3, 40, dtype)
    options |= {name: options[name].float() for name in ("weight", "bias")}
    check(x, options, impl)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, kind, impl):
    x, options = inputs(2, 3, 40, shift=(2, 3, 40))
    check(layout(x), {name: layout(v) for name, v in options.items()} | {"kind": kind}, impl)


def test_chunks_of_one_projection_are_read_in_place(impl):
    """scale and shift as adaLN has them: slices of one [B, 6 C] tensor."""
    x, _ = inputs(2, 3, 40)
    shift, scale = (v[:, None] for v in torch.randn(2, 6 * 40).chunk(6, 1)[:2])
    check(x, {"scale": scale, "shift": shift}, impl)


@pytest.mark.parametrize("columns", [1, 15, 17, 40, 67])
def test_writes_stay_inside(columns, kind):
    x, options = inputs(2, 5, columns)
    options |= {name: options[name].expand(x.shape) for name in ("scale", "shift")}
    q, q_scale = padded(torch.zeros(2, 5, columns, dtype=torch.int8)), padded(torch.zeros(2, 5))
    outputs = (None, 0, q, q_scale)
    _native.call("norm_quantize_int8", x, *options.values(), *outputs, kind == "layer", 1e-6)
    assert padding_intact(q)
    assert padding_intact(q_scale)
    want = ops.norm_quantize_int8(x, **options, kind=kind, impl="native")
    assert torch.equal(q, want[0])
    assert torch.equal(q_scale, want[1])


def test_a_constant_row_is_zero(impl):
    """LayerNorm takes a constant away: z is zero, which quantize_int8 gives scale 1."""
    x, _ = inputs(1, 3, 40)
    x[0, 1] = 2.0
    q, q_scale = ops.norm_quantize_int8(x, impl=impl)
    assert not q[0, 1].any()
    assert q_scale[0, 1] == 1
    assert (q[0, [0, 2]].abs().amax(-1) == 127).all()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows_are_visible_and_alone(value, dtype, kind, impl):
    x, options = inputs(1, 6, 40, dtype)
    clean = ops.norm_quantize_int8(x, **options, kind=kind, impl=impl)
    x[0, 2, 5] = value
    q, q_scale = ops.norm_quantize_int8(x, **options, kind=kind, impl=impl)
    others = [0, 1, 3, 4, 5]
    assert q_scale[0, 2].isnan()
    assert not q[0, 2].any()
    assert torch.equal(q[0, others], clean[0][0, others])
    assert torch.equal(q_scale[0, others], clean[1][0, others])


def test_a_large_mean_costs_no_accuracy(impl):
    x, options = inputs(1, 3, 72, torch.bfloat16)
    check((x + 100).to(torch.bfloat16), options, impl)


def test_empty(impl):
    for shape in ((0, 5, 8), (2, 0, 8)):
        q, q_scale = ops.norm_quantize_int8(torch.randn(shape), impl=impl)
        assert q.shape == shape
        assert q_scale.shape == shape[:-1]


def test_threads_do_not_change_a_bit():
    x, options = inputs(2, 130, 40)
    one = ops.norm_quantize_int8(x, **options, impl="native")
    torch.set_num_threads(4)
    many = ops.norm_quantize_int8(x, **options, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_feeds_the_products():
    """q and q_scale are what gemm_w8a8 makes of the norm's output itself."""
    x, options = inputs(2, 5, 96, torch.bfloat16)
    w, w_scale = ops.quantize_int8(torch.randn(48, 96))
    q, q_scale = ops.norm_quantize_int8(x, **options)
    got = ops.gemm_w8a8(q, q_scale, w, w_scale, out_dtype=torch.bfloat16)
    z = ops.norm_jvp(x, **options)[0]
    assert torch.equal(got, ops.gemm_w8a8(z, None, w, w_scale))


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_opcheck(impl, kind):
    x, options = inputs(2, 3, 8)
    args = (x, *options.values(), torch.rand(8) + 0.1, 0, kind == "layer", 1e-6, impl)
    torch.library.opcheck(torch.ops.fewstep.norm_quantize_int8.default, args)


def test_compiles_without_graph_break():
    x, options = inputs(2, 3, 16)
    compiled = torch.compile(ops.norm_quantize_int8, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, **options), ops.norm_quantize_int8(x, **options), strict=True):
        assert torch.equal(got, want)


def test_tangents_and_gradients_are_refused():
    x, options = inputs(1, 3, 8)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(ops.norm_quantize_int8, (x,), (x,))
    options["scale"].requires_grad_()
    with pytest.raises(DerivativeError, match="gradient"):
        ops.norm_quantize_int8(x, **options)


def test_bad_input_names_the_argument():
    x, options = inputs(2, 3, 8)
    with pytest.raises(ValueError, match="kind: expected 'layer' or 'rms', got 'group'"):
        ops.norm_quantize_int8(x, kind="group")
    with pytest.raises(ValueError, match=r"weight: expected \[C\] = \[8\], got \[7\]"):
        ops.norm_quantize_int8(x, weight=torch.ones(7))
    with pytest.raises(ValueError, match=r"scale: expected a shape that broadcasts"):
        ops.norm_quantize_int8(x, scale=torch.ones(3, 1, 8))
    with pytest.raises(ValueError, match=r"shift: expected the dtype of x"):
        ops.norm_quantize_int8(x, shift=options["shift"].half())
    with pytest.raises(ValueError, match=r"smooth: expected floating \[8\]"):
        ops.norm_quantize_int8(x, smooth=torch.ones(7))
    with pytest.raises(
        ValueError, match="rotate: expected a block that divides K = 8 of x, got 16"
    ):
        ops.norm_quantize_int8(x, rotate=16)
    with pytest.raises(TypeError, match="eps: expected a number"):
        ops.norm_quantize_int8(x, eps=torch.tensor(1e-6))
    with pytest.raises(ops.UnsupportedError, match="expected one of float32, bfloat16, float16"):
        ops.norm_quantize_int8(x.double(), impl="native")
    with pytest.raises(ops.UnsupportedError, match="at most 16384 columns"):
        ops.norm_quantize_int8(torch.zeros(1, 16385), impl="triton")
