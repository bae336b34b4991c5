"""What the low-bit products do after their sums, against float64: activation, gate, residual, int8.

test_gemm_*.py hold the sums themselves. Bounds are those of `ops/_epilogue.py`, on top of the
op's own.
"""

import functools

import pytest
import torch

from epilogue_rules import DTYPES, OPS, UNIT, finished, operands, sums
from fewstep import ops
from fewstep.ops._epilogue import ACTIVATIONS, activate, is_glu, width
from helpers import padded, row_sliced, strided
from product_rules import branch_of, within

IMPLS = ["reference", "native", "triton"]
ISAS = ["portable", "avx2", "avx512"]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def check(op, impl, rows, outputs, activation, gate, residual, **options):
    """Run the op with `outputs` columns left over and compare it with float64."""
    N = outputs * 2 if is_glu(activation) else outputs
    dtype = options.get("dtype", torch.float32)
    args, bias = operands(op, rows, N, dtype=dtype if op == "gemm_w4a16" else None)
    branch = branch_of(rows, N, options["R"]) if options.get("R") else {}
    kwargs = {"bias": bias, "activation": activation, "gate": gate, "residual": residual} | branch
    out = getattr(ops, op)(*args, **kwargs, out_dtype=dtype, impl=impl)
    assert out.dtype == dtype
    assert out.shape == (*rows, outputs)
    exact, bound = finished(*sums(op, args, bias, branch), activation, gate, residual)
    assert within(out, exact, bound)
    return out, args, kwargs


# (..., M) and outputs: single elements, tile and panel edges, halves that no panel starts with.
SHAPES = [((1,), 1), ((2, 3), 24), ((7,), 65), ((13,), 80), ((3, 5), 130), ((2, 1, 9), 192)]


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_matches_oracle(op, activation, impl):
    for i, (rows, outputs) in enumerate(SHAPES):
        dtype = DTYPES[i % 3]
        gate = torch.randn(outputs).to(dtype) if i % 2 else None
        residual = torch.randn(*rows, outputs).to(dtype) if i % 3 else None
        check(op, impl, rows, outputs, activation, gate, residual, dtype=dtype, R=i % 2 * 5)


@pytest.mark.parametrize("gate_dtype", DTYPES, ids=str)
def test_gate_and_residual_of_every_dtype(op, gate_dtype, impl):
    rows, outputs = (2, 9), 40
    gate, residual = torch.randn(2, 1, outputs).to(gate_dtype), torch.randn(*rows, outputs)
    for activation in (None, "silu", "geglu"):
        for residual_dtype in DTYPES:
            r = residual.to(residual_dtype)
            check(op, impl, rows, outputs, activation, gate, r, dtype=torch.bfloat16)
        check(op, impl, rows, outputs, activation, gate, None)
        check(op, impl, rows, outputs, activation, None, residual)


# Gates of outputs [2, 3, 4, 24].
GATES = [(24,), (1, 24), (3, 1, 24), (2, 1, 1, 24), (2, 3, 1, 24), (1, 3, 1, 24), (4, 24),
         (2, 1, 4, 24), (2, 3, 4, 24), (1, 1, 1, 24)]  # fmt: skip


@pytest.mark.parametrize("shape", GATES, ids=str)
def test_gates_broadcast(op, shape, impl):
    rows = (2, 3, 4)
    gate, residual = torch.randn(shape), torch.randn(*rows, 24)
    out, args, kwargs = check(op, impl, rows, 24, "silu", gate, residual)
    full = kwargs | {"gate": gate.expand(*rows, 24).contiguous()}
    assert torch.equal(out, getattr(ops, op)(*args, **full, impl=impl))


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
@pytest.mark.parametrize("activation", [None, "gelu", "swiglu"])
def test_layouts_do_not_read_padding(op, activation, layout, impl):
    rows, outputs = (2, 5), 70
    gate, residual = torch.randn(2, 1, outputs), torch.randn(*rows, outputs)
    out, args, kwargs = check(op, impl, rows, outputs, activation, gate, residual)
    again = kwargs | {"gate": layout(gate), "residual": layout(residual)}
    assert torch.equal(out, getattr(ops, op)(*args, **again, impl=impl))
    turned = residual.transpose(0, 1).contiguous().transpose(0, 1)
    again = kwargs | {"residual": turned}
    assert torch.equal(out, getattr(ops, op)(*args, **again, impl=impl))


def test_many_rows(op, impl):
    """Past the blocks of rows of a task, and where Triton folds a 4-bit weight beforehand."""
    for activation in ("gelu_tanh", "geglu"):
        check(op, impl, (530,), 72, activation, torch.randn(72), torch.randn(530, 72), R=3)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_ends(activation, impl):
    """Sums of every size: what the activation leaves of itself, or of nothing, and no NaN."""
    ends = [0.0, 1e-30, 1e-8, 1e-3, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 14, 20, 88, 104, 1e4, 1e20, 1e38]
    ends = torch.tensor([sign * x for x in ends for sign in (1, -1)])
    a, a_scale = torch.zeros(1, 32, dtype=torch.int8), torch.ones(1)
    bias = torch.cat([torch.ones_like(ends), ends]) if is_glu(activation) else ends
    w, w_scale = torch.zeros(len(bias), 32, dtype=torch.int8), torch.ones(len(bias))
    out = ops.gemm_w8a8(a, a_scale, w, w_scale, bias=bias, activation=activation, impl=impl)
    exact = activate(bias.double(), activation)
    assert ((out[0].double() - exact).abs() <= 8 * UNIT * ends.double().abs()).all()
    assert (out[0, ends > 20] == ends[ends > 20]).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_whole_range_of_an_activation(activation, impl):
    """Every step of 1 / 256 where an activation bends, and the largest error in units of |y|."""
    ends = torch.arange(-1600, 1601) / 256
    N = len(ends)
    bias = torch.cat([torch.ones(N), ends]) if is_glu(activation) else ends
    w, w_scale = torch.zeros(len(bias), 32, dtype=torch.int8), torch.ones(len(bias))
    args = (torch.zeros(1, 32, dtype=torch.int8), torch.ones(1), w, w_scale)
    out = ops.gemm_w8a8(*args, bias=bias, activation=activation, impl=impl)
    error = (out[0].double() - activate(bias.double(), activation)).abs()
    assert (error <= 8 * UNIT * ends.double().abs()).all()


def test_nan_stays_where_it_is(op, impl):
    rows, outputs = (6,), 40
    gate, residual = torch.randn(6, outputs), torch.randn(6, outputs)
    for activation in (None, "gelu", "silu", "swiglu"):
        clean, args, kwargs = check(op, impl, rows, outputs, activation, gate, residual)
        bad = {"gate": gate.clone(), "residual": residual.clone()}
        bad["gate"][1, 3], bad["residual"][4, 39] = float("nan"), float("nan")
        out = getattr(ops, op)(*args, **kwargs | bad, impl=impl)
        assert out.isnan().nonzero().tolist() == [[1, 3], [4, 39]]
        kept = ~out.isnan()
        assert torch.equal(out[kept], clean[kept])
        bias = kwargs["bias"].clone()
        bias[2] = float("nan")
        out = getattr(ops, op)(*args, **kwargs | {"bias": bias}, impl=impl)
        assert out[:, 2].isnan().all()
        assert out.isnan().sum() == 6


@pytest.mark.parametrize("rows", [(3,), (2, 9)], ids=str)
@pytest.mark.parametrize("dtype", [None, *DTYPES], ids=str)
def test_int8_outputs_are_those_of_quantize_int8(op, dtype, rows, impl):
    if op == "gemm_w4a16" and dtype is None:
        return
    outputs, rounded = 70, dtype or torch.bfloat16
    gate, residual = torch.randn(outputs), torch.randn(*rows, outputs)
    for activation in (None, "geglu") if impl == "triton" else (None, "gelu", "geglu"):
        N = outputs * 2 if is_glu(activation) else outputs
        args, bias = operands(op, rows, N, dtype=dtype)
        run = functools.partial(getattr(ops, op), *args, bias=bias, impl=impl)
        end = {"activation": activation, "gate": gate, "residual": residual}
        if dtype is not None:
            end |= {"down": torch.randn(3, 64).to(dtype), "up": torch.randn(N, 3)}
        for kwargs in ({}, end):
            if is_glu(activation) and not kwargs:
                continue
            q, scale = run(**kwargs, out_dtype=torch.int8)
            want, want_scale = ops.quantize_int8(run(**kwargs, out_dtype=rounded))
            assert torch.equal(q, want)
            assert torch.equal(scale, want_scale)
            assert q.is_contiguous()
            assert scale.shape == rows


def test_int8_output_of_a_row_with_nan(impl):
    args, _ = operands("gemm_w8a8", (5,), 40)
    residual = torch.randn(5, 40)
    residual[3, 7] = float("nan")
    q, scale = ops.gemm_w8a8(*args, residual=residual, out_dtype=torch.int8, impl=impl)
    assert scale.isnan().tolist() == [False, False, False, True, False]
    assert (q[3] == 0).all()


def test_empty_axes(op, impl):
    for rows, outputs in (((0,), 5), ((2, 0), 5), ((3,), 0)):
        for activation in ("gelu", "swiglu"):
            N = outputs * 2 if is_glu(activation) else outputs
            args, bias = operands(op, rows, N)
            kwargs = {"bias": bias, "activation": activation, "gate": torch.randn(outputs)}
            run = functools.partial(getattr(ops, op), *args, **kwargs, impl=impl)
            assert run().shape == (*rows, outputs)
            q, scale = run(out_dtype=torch.int8)
            assert (q.shape, scale.shape) == ((*rows, outputs), rows)
            assert (scale == 1).all()


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_instruction_set_has_the_same_bits(op, activation, monkeypatch):
    for i, (rows, outputs) in enumerate(SHAPES):
        N, dtype = outputs * 2 if is_glu(activation) else outputs, DTYPES[i % 3]
        args, bias = operands(op, rows, N, dtype=dtype)
        gate, residual = torch.randn(outputs).to(dtype), torch.randn(*rows, outputs).to(dtype)
        kwargs = {"bias": bias, "activation": activation} | branch_of(rows, N, 3)
        kwargs |= [{"gate": gate}, {"residual": residual}, {"gate": gate, "residual": residual}][
            i % 3
        ]
        outs = []
        for isa in ISAS:
            monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
            out = getattr(ops, op)(*args, **kwargs, impl="native")
            quantised = getattr(ops, op)(*args, **kwargs, out_dtype=torch.int8, impl="native")
            outs.append((out, *quantised))
        for other in outs[1:]:
            assert all(torch.equal(x, y) for x, y in zip(outs[0], other, strict=True))


def test_rows_do_not_change_each_other(op):
    """A row's result is the same alone: tiles, blocks and slices of K have one order."""
    (rows, outputs), gate = ((11,), 90), torch.randn(90)
    residual = torch.randn(11, 90)
    out, args, kwargs = check(op, "native", rows, outputs, "geglu", gate, residual, R=4)
    for m in (0, 7):
        one = slice(m, m + 1)
        left = [x[one] for x in args[:-2]]
        part = kwargs | {"residual": kwargs["residual"][one], "low": kwargs["low"][one]}
        assert torch.equal(getattr(ops, op)(*left, *args[-2:], **part, impl="native"), out[one])


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
@pytest.mark.parametrize("rows", [5, 400])
def test_threads_do_not_change_a_bit(op, rows, activation):
    N = 1100 if is_glu(activation) else 550
    args, bias = operands(op, (rows,), N, 128, torch.bfloat16)
    gate, residual = torch.randn(550), torch.randn(rows, 550)
    kwargs = {"bias": bias, "activation": activation, "gate": gate, "residual": residual}
    run = functools.partial(getattr(ops, op), *args, **kwargs, impl="native")
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, max(threads, 2)):
            torch.set_num_threads(count)
            results.append((run(), *run(out_dtype=torch.int8)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation: expected None or one of gelu, .*, got 'relu'"),
        ({"activation": 3}, "activation: expected None or one of gelu, .*, got 3"),
        ({"gate": torch.ones(19)}, r"gate: expected a shape ending in 20 that .* \[6, 20\], got"),
        ({"gate": torch.ones(5, 20)}, r"gate: expected .* broadcasts to \[6, 20\], got \[5, 20\]"),
        ({"gate": torch.ones(1, 6, 20)}, r"gate: expected .*got \[1, 6, 20\]"),
        ({"gate": torch.tensor(1.0)}, r"gate: expected .*got \[\]"),
        ({"gate": torch.ones(20).double()}, "gate: expected float32, .* got torch.float64"),
        ({"gate": torch.ones(20), "activation": "geglu"}, "gate: expected a shape ending in 10"),
        ({"gate": torch.ones(20, device="meta")}, "gate: expected the device of the activations"),
        ({"residual": torch.ones(20)}, r"residual: expected shape \[6, 20\], got \[20\]"),
        ({"residual": torch.ones(6, 20).int()}, "residual: expected float32, .*got torch.int32"),
        (
            {"residual": torch.ones(6, 20), "activation": "swiglu"},
            r"residual: expected shape \[6, 10\], got \[6, 20\]",
        ),
        ({"out_dtype": torch.uint8}, "out_dtype: expected .*int8, got torch.uint8"),
    ],
)
def test_bad_input_names_the_argument(op, change, message):
    args, _ = operands(op, (6,), 20)
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*args, **change)


def test_what_is_no_tensor_is_named(op):
    args, _ = operands(op, (6,), 20)
    names = ("x", "w", "w_scale") if op == "gemm_w4a16" else ("a", "a_scale", "w", "w_scale")
    for i, name in enumerate(names):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor.*, got float"):
            getattr(ops, op)(*args[:i], 1.0, *args[i + 1 :])
    smooth = [] if op == "gemm_w4a16" else ["smooth"]
    floating, _ = operands(op, (6,), 20, dtype=torch.float32)
    for name in ("bias", "down", "up", "low", "gate", "residual", *smooth):
        with pytest.raises(TypeError, match=f"^{name}: expected a tensor or None, got float"):
            getattr(ops, op)(*floating, **{name: 1.0})


def test_halves_of_an_odd_weight_are_refused(op):
    args, _ = operands(op, (6,), 21)
    with pytest.raises(ValueError, match="w: expected an even N for geglu, got 21"):
        getattr(ops, op)(*args, activation="geglu")
    assert width(21, None) == 21
