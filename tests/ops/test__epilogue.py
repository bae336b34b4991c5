"""What the low-bit products do after their sums, against float64: activation, gate, residual, int8.

test_gemm_*.py hold the sums themselves. Bounds are those of `ops/_epilogue.py`, on top of the
op's own.
"""

import functools

import pytest
import torch

from fewstep import ops
from fewstep.ops._epilogue import ACTIVATIONS, activate, is_glu, width
from fewstep.ops._register import DerivativeError
from fewstep.reference.gemm_w4a8 import fold_int4
from fewstep.reference.gemm_w4a16 import dequantize_int4
from helpers import padded, relative_error, row_sliced, strided
from product_rules import add_branch, branch_of, within

IMPLS = ["reference", "native", "triton"]
OPS = ["gemm_w8a8", "gemm_w4a8", "gemm_w4a16", "gemm_fp8"]
ISAS = ["portable", "avx2", "avx512"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = 2.0**-24


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=OPS)
def op(request):
    return request.param


def operands(op, rows, N, K=64, dtype=None):
    """Return (args, bias) of outputs of order one; `dtype` is that of floating activations."""
    w, w_scale = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8), torch.rand(N, K // 32) + 0.1
    w_scale = (w_scale * K**-0.5 / 4).bfloat16()
    weight = (w, w_scale)
    if op == "gemm_w8a8":
        weight = fold_int4(*weight)
    if op == "gemm_fp8":
        weight = ops.quantize_fp8(dequantize_int4(*weight).float())
    if op == "gemm_w4a16":
        return (torch.randn(*rows, K).to(dtype or torch.float32), *weight), torch.randn(N)
    if dtype is not None:
        return (torch.randn(*rows, K).to(dtype), None, *weight), torch.randn(N)
    if op == "gemm_fp8":
        return (*ops.quantize_fp8(torch.randn(*rows, K)), *weight), torch.randn(N)
    a = torch.randint(-128, 128, (*rows, K), dtype=torch.int8)
    return (a, (torch.rand(rows) + 0.5) / 64, *weight), torch.randn(N)


def weight_of(op, args):
    """Return W in float64."""
    if op == "gemm_w4a16":
        return dequantize_int4(*args[-2:])
    w, scale = fold_int4(*args[-2:]) if op == "gemm_w4a8" else args[-2:]
    return w.double() * scale.double()[:, None]


def sums(op, args, bias, branch):
    """Return the exact y and the op's bound on it."""
    x, weight = args[0].double(), weight_of(op, args)
    if op != "gemm_w4a16":
        x = x * args[1].double()[..., None]
    product = x @ weight.mT
    y, terms = product + bias.double(), x.abs() @ weight.abs().mT
    before = 3 * UNIT * product.abs()
    if op in ("gemm_w4a16", "gemm_fp8"):
        before = before + (x.shape[-1] + 2) * UNIT * terms
    if op == "gemm_fp8":
        before = before + 2.0**-9 * terms  # tensor cores: test_gemm_fp8.py holds CPUs to less
    before = before + UNIT * y.abs()
    return add_branch(y, before, **branch) if branch else (y, before)


def finished(y, e, activation, gate, residual):
    """Return the exact output and the bound of ops/_epilogue.py."""
    v = activate(y, activation)
    if is_glu(activation):
        (value, switch), (e_value, e_switch) = y.chunk(2, -1), e.chunk(2, -1)
        slope = 1.13 * e_switch + 8 * UNIT * switch.abs()
        act = activate(switch, "gelu" if activation == "geglu" else "silu")
        bound = act.abs() * e_value + (value.abs() + e_value) * slope + UNIT * v.abs()
    else:
        bound = e if activation is None else 1.13 * e + 8 * UNIT * y.abs()
    scaled = v if gate is None else gate.double() * v
    out = scaled if residual is None else residual.double() + scaled
    bound = bound if gate is None else gate.double().abs() * bound
    return out, bound + 2 * UNIT * (scaled.abs() + out.abs())


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
    for activation in (None, "gelu", "geglu"):
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


def test_opcheck(op):
    rows = (2, 6)
    args, bias = operands(op, rows, 20, dtype=torch.float32)
    prologue = [] if op == "gemm_w4a16" else [None, 0]
    dtype = [] if op == "gemm_w4a16" else [torch.float32]
    gate, residual = torch.randn(2, 1, 10), torch.randn(*rows, 10)
    low, up = branch_of(rows, 20, 3).values()
    epilogue = ("geglu", gate, residual)
    call = (*args, bias, *prologue, None, up, low, *epilogue, *dtype, "native")
    # The schema check compares tensors by arithmetic that torch lacks for e4m3.
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    checks = checks if op == "gemm_fp8" else (*checks, "test_schema")
    int8 = getattr(torch.ops.fewstep, op + "_int8").default
    torch.library.opcheck(int8, call, test_utils=checks)
    for x in (args[0], gate, residual, bias):
        x.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fewstep, op).default, call, test_utils=checks)


def test_compiles_without_graph_break(op):
    args, bias = operands(op, (2, 6), 20, dtype=torch.bfloat16)
    function = getattr(ops, op)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    kwargs = {"bias": bias, "activation": "geglu", "gate": torch.randn(10)}
    assert torch.equal(compiled(*args, **kwargs), function(*args, **kwargs))
    kwargs["out_dtype"] = torch.int8
    for got, want in zip(compiled(*args, **kwargs), function(*args, **kwargs), strict=True):
        assert torch.equal(got, want)


def layer_of(op, impl, activation, outputs=11, K=64):
    """Return a layer of (x, bias, down, up, gate, residual), the same in float64, and inputs.

    The exact layer takes the rounding of x for the identity: its y has the value that the op's y
    has, and the derivatives of the dequantised linear layer.
    """
    N, R, rows = outputs * 2 if is_glu(activation) else outputs, 3, (2, 5)
    args, _ = operands(op, rows, N, K, torch.float32)
    weight, constants = weight_of(op, args), args[1:]
    shapes = [(*rows, K), (N,), (R, K), (N, R), (2, 1, outputs), (*rows, outputs)]
    values = tuple(torch.randn(shape) for shape in shapes)
    function = functools.partial(getattr(ops, op), impl=impl)

    def layer(x, bias, down, up, gate, residual):
        branch, end = {"bias": bias, "down": down, "up": up}, {"gate": gate, "residual": residual}
        return function(x, *constants, **branch, **end, activation=activation)

    x, bias, down, up = values[:4]
    seen = function(x, *constants, bias=bias, down=down, up=up).double()

    def exact(x, bias, down, up, gate, residual):
        y = x @ weight.mT + bias + (x @ down.mT) @ up.mT
        return residual + gate * activate(y + (seen - y.detach()), activation)

    return layer, exact, values


# float32 sums of at most n terms, relative to whole results; activations add a few roundings more.
TOLERANCE = 128 * UNIT
# Sines of derivatives, which reach some hundreds, and what follows from those: a relative error of
# TOLERANCE there is one of some thousand units here. A term that is missing is of order one.
NESTED = 2.0**-11


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_derivatives_are_those_of_the_dequantised_layer(op, activation, impl):
    layer, exact, values = layer_of(op, impl, activation)
    wide = tuple(x.double() for x in values)
    out, pull = torch.func.vjp(exact, *wide)
    d_out = torch.randn(out.shape)
    want = pull(d_out.double())
    leaves = [x.clone().requires_grad_() for x in values]
    gradients = torch.autograd.grad(layer(*leaves), leaves, d_out)
    assert all(relative_error(*pair) <= TOLERANCE for pair in zip(gradients, want, strict=True))
    # Each alone: what is kept for the backward depends on what is asked for.
    for i in range(len(values)):
        alone = [x.clone().requires_grad_(i == j) for j, x in enumerate(values)]
        (got,) = torch.autograd.grad(layer(*alone), alone[i], d_out)
        assert relative_error(got, want[i]) <= TOLERANCE
    tangents = [torch.randn_like(x) for x in values]
    for only in (*range(len(values)), None):
        chosen = tuple(t if only in (i, None) else t * 0 for i, t in enumerate(tangents))
        primal, tangent = torch.func.jvp(layer, values, chosen)
        assert torch.equal(primal, layer(*values))
        _, want = torch.func.jvp(exact, wide, tuple(t.double() for t in chosen))
        assert relative_error(tangent, want) <= TOLERANCE


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_second_derivatives(op, activation):
    layer, exact, values = layer_of(op, "native", activation)

    def gradient_norm(f, inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        first = torch.autograd.grad(f(*inputs).sin().sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), inputs)

    wide = [x.double() for x in values]
    pairs = zip(gradient_norm(layer, values), gradient_norm(exact, wide), strict=True)
    assert all(relative_error(got, want) <= NESTED for got, want in pairs)


def test_gradients_of_a_tangent(op):
    """As a training loss over forward mode takes them."""
    layer, exact, values = layer_of(op, "native", "geglu")

    def gradients(f, inputs):
        tangents = [torch.ones_like(x) for x in inputs]

        def loss(*inputs):
            return torch.func.jvp(f, inputs, tuple(tangents))[1].sin().sum()

        return torch.func.grad(loss, tuple(range(len(inputs))))(*inputs)

    wide = [x.double() for x in values]
    pairs = zip(gradients(layer, values), gradients(exact, wide), strict=True)
    assert all(relative_error(got, want) <= NESTED for got, want in pairs)


def test_gradients_through_a_compiled_layer(op):
    layer, _, values = layer_of(op, "native", "swiglu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def gradients(layer):
        leaves = [x.clone().requires_grad_() for x in values]
        return torch.autograd.grad(layer(*leaves).square().sum(), leaves)

    for got, want in zip(gradients(compiled), gradients(layer), strict=True):
        assert relative_error(got, want) <= TOLERANCE


def test_a_frozen_layer_does_not_keep_its_input(op):
    """Only an activation, or a gate that learns, needs x again."""
    for activation, kept in ((None, False), ("silu", True)):
        args, _ = operands(op, (3,), 20, dtype=torch.float32)
        x, gate = args[0].requires_grad_(), torch.randn(20)
        out = getattr(ops, op)(*args, gate=gate, activation=activation)
        assert any(saved is x for saved in out.grad_fn.saved_tensors) == kept
        gate.requires_grad_()
        out = getattr(ops, op)(x.detach(), *args[1:], gate=gate, activation=activation)
        (gradient,) = torch.autograd.grad(out.sum(), gate)
        y = getattr(ops, op)(x.detach(), *args[1:])
        assert relative_error(gradient, activate(y, activation).sum(0)) <= TOLERANCE


def test_int8_outputs_have_no_derivative(op):
    args, _ = operands(op, (3,), 20, dtype=torch.float32)
    with pytest.raises(DerivativeError, match=f"{op}_int8 has no backward"):
        getattr(ops, op)(args[0].requires_grad_(), *args[1:], out_dtype=torch.int8)


def test_vmap(op):
    """A batch of rows, gates or residuals: the bits of one call for each."""
    args, _ = operands(op, (4, 3, 5), 20, dtype=torch.float32)
    function = functools.partial(getattr(ops, op), activation="gelu")
    for shape in ((20,), (3, 1, 20), (3, 5, 20)):
        gate, residual = torch.randn(4, *shape), torch.randn(4, 3, 5, 20)
        want = torch.stack(
            [function(x, *args[1:], gate=g, residual=r)
             for x, g, r in zip(args[0], gate, residual, strict=True)]
        )  # fmt: skip

        def layer(x, gate, residual):
            return function(x, *args[1:], gate=gate, residual=residual)

        assert torch.equal(torch.vmap(layer)(args[0], gate, residual), want)
        turned = torch.vmap(layer, (1, -1, 0))(args[0].movedim(0, 1), gate.movedim(0, -1), residual)
        assert torch.equal(turned, want)
        fixed = torch.vmap(layer, (0, None, None))(args[0], gate[1], residual[1])
        each = [layer(x, gate[1], residual[1]) for x in args[0]]
        assert torch.equal(fixed, torch.stack(each))
        only = torch.vmap(layer, (None, 0, None))(args[0][1], gate, residual[1])
        each = [layer(args[0][1], g, residual[1]) for g in gate]
        assert torch.equal(only, torch.stack(each))


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


def test_halves_of_an_odd_weight_are_refused(op):
    args, _ = operands(op, (6,), 21)
    with pytest.raises(ValueError, match="w: expected an even N for geglu, got 21"):
        getattr(ops, op)(*args, activation="geglu")
    assert width(21, None) == 21


def test_a_residual_may_be_written_to_before_the_backward():
    """Its gradient needs no values, as in x + residual."""
    (_, _, *weight), _ = operands("gemm_w8a8", (4,), 20, 32, torch.float32)
    x, residual = torch.randn(4, 32, requires_grad=True), torch.randn(4, 20)
    out = ops.gemm_w8a8(x, None, *weight, residual=residual)
    residual.add_(1)
    out.sum().backward()
    assert x.grad.isfinite().all()
