"""linear_attention_jvp: every implementation against the fp64 oracle, and what it must obey."""

import os
import subprocess
import sys

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


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def inputs(nq, nk, d, dv=None, dtype=torch.float32, device=None, lead=(1, 2)):
    """q, k, v, t_q, t_k, t_v."""
    shapes = [(*lead, nq, d), (*lead, nk, d), (*lead, nk, dv or d)] * 2
    return [torch.randn(shape).to(device, dtype) for shape in shapes]


def double(args):
    return [None if x is None else x.double() for x in args]


def sana(q, k, v):
    """Linear attention as diffusers' SanaLinearAttnProcessor2_0 writes it, for [B, H, N, D]."""
    dtype = q.dtype
    query, key, value = (x.mT for x in (F.relu(q), F.relu(k), v))
    key = key.mT
    if dtype != torch.float64:
        query, key, value = query.float(), key.float(), value.float()
    value = F.pad(value, (0, 0, 0, 1), mode="constant", value=1.0)
    hidden = torch.matmul(torch.matmul(value, key), query)
    hidden = hidden[:, :, :-1] / (hidden[:, :, -1:] + 1e-15)
    return hidden.mT.to(dtype)


def torch_jvp(args):
    """What users have today: forward mode through that, op by op, in the dtype of `args`."""
    tangents = [
        torch.zeros_like(x) if t is None else t for x, t in zip(args[:3], args[3:], strict=True)
    ]
    return torch.func.jvp(sana, tuple(args[:3]), tuple(tangents))


def check(args, impl):
    """Compare with the oracle; the budget is the error of torch's own in the same precision."""
    got = ops.linear_attention_jvp(*args, return_state=True, impl=impl)
    want = reference.linear_attention_jvp(*double(args))
    plain = torch_jvp(args)
    q, v = args[0], args[2]
    eps = torch.finfo(q.dtype).eps
    for name, ours, theirs, exact in zip(("o", "t_o"), got, plain, want, strict=False):
        assert ours.shape == (*q.shape[:-1], v.shape[-1]), name
        assert ours.dtype == q.dtype, name
        # Both accumulate in float32 and round once; sums in another order, where few terms may
        # come out exact in one and be rounded in the other.
        slack = 4 * eps if eps < 1e-4 else 1e-6
        assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + slack, name
        if eps > 1e-4:  # rounded once, from float32: no element is off by more than half a unit
            assert relative_error(ours, exact) <= eps / 2 + 1e-6, name
    # Sums of at most 1,100 products in float32: sqrt(1100) 2^-24 = 2e-6 of their size.
    bound = 1e-14 if q.dtype == torch.float64 else 5e-6
    for name, ours, exact in zip(("state", "t_state"), got[2:], want[2:], strict=True):
        assert ours.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32), name
        assert relative_error(ours, exact) <= bound, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, device):
    check(inputs(15, 33, 24, 16, dtype, device), "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("d", [8, 24, 32, 40, 72, 112, 128])
def test_native(d, dtype):
    for nq, nk in ((1, 1), (15, 33), (65, 64)):
        check(inputs(nq, nk, d, dtype=dtype), "native")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_native_adds_chunks_of_tokens(dtype):
    check(inputs(1030, 1100, 16, 8, dtype), "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8), (15, 33, 24, 40), (70, 300, 32), (3, 5, 128, 112)])
@pytest.mark.triton
def test_triton(shape, dtype, device):
    check(inputs(*shape, dtype=dtype, device=device, lead=(1, 1)), "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        args = inputs(15, 33, 24, 40, dtype)
        check(args, "native")
        check([*args[:4], None, None], "native")


def test_oracle_is_the_derivative():
    args = inputs(15, 33, 24, 16, torch.float64)
    for got, want in zip(reference.linear_attention_jvp(*args), torch_jvp(args), strict=False):
        assert relative_error(got, want) < 1e-13


@pytest.mark.parametrize("absent", range(8))
def test_absent_tangents_are_zero(absent, impl):
    args = inputs(15, 33, 16, 24)
    zeros = list(args)
    for i in range(3):
        if absent >> i & 1:
            args[3 + i] = None
            zeros[3 + i] = torch.zeros_like(zeros[i])
    check(args, impl)
    got, want = (ops.linear_attention_jvp(*a, return_state=True, impl=impl) for a in (args, zeros))
    for ours, theirs in zip(got, want, strict=True):
        assert relative_error(ours, theirs) < 1e-6
    if absent == 7:
        assert not got[1].any()


def test_zero_tangents_give_exactly_zero(impl):
    q, k, v, *tangents = inputs(15, 33, 16)
    zeros = map(torch.zeros_like, tangents)
    _, t_o, _, t_state = ops.linear_attention_jvp(q, k, v, *zeros, return_state=True, impl=impl)
    assert not t_o.any()
    assert not t_state.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tangents_do_not_change_a_bit_of_the_primal(dtype, impl):
    args = inputs(15, 33, 24, 16, dtype)
    alone = ops.linear_attention_jvp(*args[:3], return_state=True, impl=impl)
    for keep in ((3, 4, 5), (3,), (4,), (5,)):
        some = [x if i < 3 or i in keep else None for i, x in enumerate(args)]
        o, _, state, _ = ops.linear_attention_jvp(*some, return_state=True, impl=impl)
        assert torch.equal(o, alone[0])
        assert torch.equal(state, alone[2])


def test_linear_in_the_tangents():
    primals = inputs(15, 33, 24, 16, torch.float64)[:3]
    u, w = (inputs(15, 33, 24, 16, torch.float64)[3:] for _ in range(2))
    mixed = [2 * a - 3 * b for a, b in zip(u, w, strict=True)]
    t_u, t_w, t_mixed = (
        ops.linear_attention_jvp(*primals, *t, impl="native")[1] for t in (u, w, mixed)
    )
    assert relative_error(2 * t_u - 3 * t_w, t_mixed) < 1e-14


def test_order_of_the_keys_does_not_matter():
    args = inputs(15, 33, 24, 16, torch.float64)
    order = torch.randperm(33)
    moved = [x if i in (0, 3) else x[..., order, :] for i, x in enumerate(args)]
    got, want = (ops.linear_attention_jvp(*a, impl="native") for a in (moved, args))
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(got, want, strict=True))


def test_what_relu_removes_has_no_derivative(impl):
    """No positive element in a query: o, t_o and eps alone in the denominator, all exactly zero."""
    args = inputs(5, 33, 16)
    args[0][:, :, 2] = -args[0][:, :, 2].abs()
    args[0][:, :, 3] = 0
    for out in ops.linear_attention_jvp(*args, impl=impl):
        assert not out[:, :, 2:4].any()
        assert out[:, :, [0, 1, 4]].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heads_inside_tokens_are_read_in_place(dtype, impl, monkeypatch):
    def refuse(self):
        raise AssertionError("copied")

    shapes = [(2, 15, 2, 24), (2, 33, 2, 24), (2, 33, 2, 16)] * 2
    args = [torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes]
    if impl != "reference":
        monkeypatch.setattr(torch.Tensor, "contiguous", refuse)
    outputs = ops.linear_attention_jvp(*args, impl=impl)
    monkeypatch.undo()
    for out in outputs:
        assert out.transpose(1, 2).is_contiguous()
    check(args, impl)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    check([layout(x) for x in inputs(15, 33, 24, 16)], impl)


def test_writes_stay_inside(kernel):
    args = inputs(15, 33, 24, 16)
    shapes = [(1, 2, 15, 16)] * 2 + [(1, 2, 24, 17)] * 2
    outputs = [padded(torch.zeros(shape)) for shape in shapes]
    if kernel == "native":
        _native.call("linear_attention_jvp", *args, *outputs, 1e-15)
    else:
        from fewstep.kernels.linear_attention_jvp import launch_linear_attention_jvp

        launch_linear_attention_jvp(*args, *outputs, 1e-15)
    assert all(padding_intact(x) for x in outputs)
    want = reference.linear_attention_jvp(*double(args))
    assert all(relative_error(a, b) < 2e-6 for a, b in zip(outputs, want, strict=True))


def test_empty(impl):
    for lead, nq, nk in (((0, 2), 5, 6), ((2, 0), 5, 6), ((1, 2), 0, 6), ((1, 2), 5, 0)):
        args = inputs(nq, nk, 16, 24, lead=lead)
        o, t_o, state, _ = ops.linear_attention_jvp(*args, return_state=True, impl=impl)
        assert o.shape == t_o.shape == (*lead, nq, 24)
        assert state.shape == (*lead, 16, 25)
        if nk == 0:  # sums over nothing
            assert not torch.cat([o.flatten(), t_o.flatten(), state.flatten()]).any()


def test_nan_stays_in_its_head(kernel):
    args = inputs(5, 70, 8, 24, lead=(1, 3))
    args[1][0, 1, 3, 4] = float("nan")
    args[2][0, 0, 69, 2] = float("nan")
    want = reference.linear_attention_jvp(*args)
    got = ops.linear_attention_jvp(*args, impl=kernel)
    for ours, theirs in zip(got, want, strict=False):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert not ours[0, 2].isnan().any()


def test_threads_do_not_change_a_bit():
    args = inputs(600, 1100, 16)
    one = ops.linear_attention_jvp(*args, return_state=True, impl="native")
    torch.set_num_threads(4)
    many = ops.linear_attention_jvp(*args, return_state=True, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def differentiable_inputs(dtype=torch.float64):
    # Nothing within 0.1 of relu's kink, across which a difference quotient means nothing.
    args = inputs(3, 2, 8, dtype=dtype, lead=(1, 1))
    return [(x + 0.1 * x.sign()).requires_grad_() for x in args]


def native(*args):
    return ops.linear_attention_jvp(*args, return_state=True, impl="native")


def test_gradients():
    args = differentiable_inputs()
    assert torch.autograd.gradcheck(native, args)
    # The gradient of the states on the way is one of this.
    assert torch.autograd.gradgradcheck(lambda *args: native(*args)[:2], args)


def test_gradients_of_some():
    args = differentiable_inputs()
    for wanted in ([0], [1, 5], [2], [3], [4]):
        leaves = [x if i in wanted else x.detach() for i, x in enumerate(args)]
        found = []
        for f in (native, reference.linear_attention_jvp):
            o, t_o, *_ = f(*leaves)
            loss = (o.sin() + t_o.cos()).sum()
            found.append(torch.autograd.grad(loss, [leaves[i] for i in wanted]))
        torch.testing.assert_close(*found)
    o, _ = ops.linear_attention_jvp(*args[:3], impl="native")
    o.sum().backward()  # a cotangent for o alone, no tangents


def test_func_transforms():
    args = [x.detach() for x in differentiable_inputs()]

    def loss(f):
        return lambda *args: sum(out.sin().sum() for out in f(*args)[:2])

    fs = (native, reference.linear_attention_jvp)
    torch.testing.assert_close(*(torch.func.grad(loss(f), tuple(range(6)))(*args) for f in fs))
    t_many = torch.randn(3, *args[3].shape, dtype=torch.float64)
    dims = (None, None, None, 0, None, None)
    torch.testing.assert_close(*(torch.vmap(f, dims)(*args[:3], t_many, *args[4:]) for f in fs))


def test_compiles_with_gradients():
    args = differentiable_inputs(torch.float32)

    def step(*args):
        o, t_o, *_ = native(*args)
        return (o.sin() + t_o.cos()).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(f(*args), args) for f in (compiled, step))
    torch.testing.assert_close(got, want)


def test_opcheck():
    args = inputs(3, 5, 8, 16)
    op = torch.ops.fewstep.linear_attention_jvp.default
    torch.library.opcheck(op, (*args, 1e-15, "native"))
    # Heads inside tokens: the fake must foresee that the outputs follow.
    inside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in args[:3]]
    torch.library.opcheck(op, (*inside, None, None, None, 1e-15, "native"))


def test_a_tangent_is_refused():
    q, k, v, *_ = inputs(3, 5, 8)
    with pytest.raises(DerivativeError, match="linear_attention_jvp has no forward-mode rule"):
        torch.func.jvp(lambda q: ops.linear_attention_jvp(q, k, v)[0], (q,), (q,))


# Triton compiles without a GPU, but not in a process that has imported it as an interpreter.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fewstep.kernels import linear_attention_jvp as forward
from fewstep.kernels import linear_attention_jvp_backward as backward

d, dtype = int(sys.argv[1]), sys.argv[2]
for module in (forward, backward):
    for name, kernel in vars(module).items():
        if not name.endswith("_kernel"):
            continue
        options = module.tiles(d, d, getattr(module, "BLOCK", 64))
        constants = {n: value for n, value in options.items() if n in kernel.arg_names}
        options = {n: options[n] for n in ("num_warps", "num_stages")}
        constants |= {n: True for n in kernel.arg_names if n.startswith("HAS_")}
        wide = ("state_ptr", "t_state_ptr", "partials_ptr", "d_states_ptr")
        signature, attributes = {}, {}
        for i, n in enumerate(kernel.arg_names):
            if n in constants:
                signature[n] = "constexpr"
            elif n.endswith("_ptr"):
                signature[n] = "*fp32" if n in wide else "*" + dtype
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[n] = "fp32" if n == "eps" else "i32"
        source = ASTSource(
            kernel,
            signature,
            constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
            attrs=attributes,
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        shared = compiled.metadata.shared
        assert shared <= 227 * 1024, f"{name}: {shared} bytes shared"
        assert "mma" in compiled.asm["ptx"], f"{name}: no tensor core instructions"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("d", "dtype"), [(32, "bf16"), (64, "fp32")])
@pytest.mark.triton
def test_triton_compiles_for_hopper(d, dtype):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run(
        [sys.executable, "-c", COMPILE, str(d), dtype],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-2000:]


def test_bad_input_names_the_argument():
    q, k, v, t_q, t_k, t_v = inputs(5, 6, 16, 24)
    call = ops.linear_attention_jvp
    with pytest.raises(ValueError, match=r"q: expected a head dim that is a multiple of 8.*got 12"):
        call(q[..., :12], k[..., :12], v)
    with pytest.raises(ValueError, match=r"v: expected a head dim.*from 8 to 128, got 136"):
        call(q, k, torch.randn(1, 2, 6, 136))
    with pytest.raises(ValueError, match="k: expected the head dim of q, 16, got 8"):
        call(q, k[..., :8], v)
    with pytest.raises(ValueError, match="v: expected as many rows as k, 6, got 5"):
        call(q, k, v[..., :5, :])
    with pytest.raises(
        ValueError, match=r"k: expected the batch and heads of q, \[1, 2\], and two"
    ):
        call(q, k[:, :1], v)
    with pytest.raises(ValueError, match=r"t_k: expected the shape of k, \[1, 2, 6, 16\], got"):
        call(q, k, v, t_q, t_k[..., :5, :], t_v)
    with pytest.raises(ValueError, match=r"t_v: expected the dtype of q, torch\.float32, got"):
        call(q, k, v, t_q, t_k, t_v.half())
    with pytest.raises(ValueError, match=r"q: expected \[B, H, N, D\], got shape \[2, 5, 16\]"):
        call(q[0], k[0], v[0])
    with pytest.raises(ValueError, match="q: expected a floating dtype"):
        call(q.int(), k.int(), v.int())
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        call(q.double(), k.double(), v.double(), impl="triton")
