"""linear_attention_jvp_backward: every implementation against the fp64 oracle, and that itself."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

pytestmark = pytest.mark.usefixtures("one_thread")
KERNELS = ["native", "triton"]
IMPLS = ["reference", *KERNELS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("q", "k", "v", "t_q", "t_k", "t_v")


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


@pytest.fixture(params=KERNELS)
def kernel(request):
    return request.param


def inputs(nq, nk, d, dv=None, dtype=torch.float32, device=None, lead=(1, 2)):
    """d_o, dt_o and q, k, v, t_q, t_k, t_v."""
    dv = dv or d
    shapes = [(nq, dv)] * 2 + [(nq, d), (nk, d), (nk, dv)] * 2
    return [torch.randn(*lead, *shape).to(device, dtype) for shape in shapes]


def double(args):
    return [None if x is None else x.double() for x in args]


def states(args):
    """state and t_state of the forward, in the accumulation dtype."""
    return [x.contiguous() for x in reference.linear_attention_jvp(*args[2:])[2:]]


def oracle(args):
    exact = double(args)
    return reference.linear_attention_jvp_backward(*exact, *states(exact))


def plain_gradients(args):
    """The formula of the forward in the dtype at hand, differentiated by torch."""
    leaves = [torch.zeros_like(args[2 + i % 3]) if x is None else x for i, x in enumerate(args[2:])]
    leaves = [x.clone().requires_grad_() for x in leaves]
    outputs = reference.linear_attention_jvp(*leaves)
    pairs = [(o, c) for o, c in zip(outputs, args[:2], strict=False) if c is not None]
    return torch.autograd.grad(
        [o for o, _ in pairs], leaves, [c for _, c in pairs], materialize_grads=True
    )


def check(args, impl, wanted=NAMES):
    got = ops.linear_attention_jvp_backward(*args, *states(args), wanted=wanted, impl=impl)
    want = oracle(args)
    dtype = args[2].dtype
    eps = torch.finfo(dtype).eps
    plain = want if eps > 1e-4 else plain_gradients(args)
    for i, (name, ours) in enumerate(zip(NAMES, got, strict=True)):
        if name not in wanted:
            assert ours is None
            continue
        assert ours.shape == args[2 + i % 3].shape, name
        assert ours.dtype == dtype, name
        # 16 bits: rounded once, from float32. Otherwise the error of torch's own, and some units
        # for sums in another order.
        bound = 1.1 * eps / 2
        if eps < 1e-4:
            bound = 2 * relative_error(plain[i], want[i]) + 8 * eps
        assert relative_error(ours, want[i]) <= bound, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_reference(dtype, device):
    check(inputs(15, 33, 24, 16, dtype, device), "reference")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("d", [8, 24, 32, 40, 72, 112, 128])
def test_native(d, dtype):
    for nq, nk in ((15, 33), (65, 64)):
        check(inputs(nq, nk, d, dtype=dtype), "native")


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_native_adds_chunks_of_tokens(dtype):
    check(inputs(1030, 1100, 16, 8, dtype), "native")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(15, 33, 24, 40), (270, 70, 32), (3, 5, 128, 112)])
@pytest.mark.triton
def test_triton(shape, dtype, device):
    check(inputs(*shape, dtype=dtype, device=device, lead=(1, 1)), "triton")


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*DTYPES, torch.float64):
        check(inputs(15, 33, 24, 40, dtype), "native")


def test_oracle_is_the_gradient():
    args = inputs(15, 33, 24, 16, torch.float64)
    for got, want in zip(oracle(args), plain_gradients(args), strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("absent", [(0,), (1,), (5,), (6,), (7,), (5, 6, 7), (0, 5, 6)], ids=str)
def test_absent_operands(absent, impl):
    check([None if i in absent else x for i, x in enumerate(inputs(15, 33, 16, 24))], impl)


@pytest.mark.parametrize("wanted", [[name] for name in NAMES] + [["q", "v"]], ids=str)
def test_only_what_is_wanted(wanted, impl):
    check(inputs(15, 33, 16, 24), impl, wanted)


def test_what_relu_removes_gets_no_gradient(impl):
    args = inputs(5, 33, 16)
    args[2][:, :, 2] = 0
    args[3][:, :, 4] = -args[3][:, :, 4].abs()
    got = ops.linear_attention_jvp_backward(*args, *states(args), impl=impl)
    d_q, d_k, _, d_t_q, d_t_k, _ = got
    for gradient, row in ((d_q, 2), (d_t_q, 2), (d_k, 4), (d_t_k, 4)):
        assert not gradient[:, :, row].any()
        assert gradient.any()
    assert all(x.isfinite().all() for x in got)


def test_heads_inside_tokens_stay_inside(impl):
    shapes = [(2, 15, 2, 16)] * 2 + [(2, 15, 2, 24), (2, 33, 2, 24), (2, 33, 2, 16)] * 2
    args = [torch.randn(shape).transpose(1, 2) for shape in shapes]
    for gradient in ops.linear_attention_jvp_backward(*args, *states(args), impl=impl):
        assert gradient.transpose(1, 2).is_contiguous()
    check(args, impl)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    check([layout(x) for x in inputs(15, 33, 24, 16)], impl)


def test_writes_stay_inside(kernel):
    args = inputs(15, 33, 24, 16)
    gradients = [padded(torch.zeros_like(args[2 + i % 3])) for i in range(6)]
    everything = (*args, *states(args), *gradients, 1e-15)
    if kernel == "native":
        _native.call("linear_attention_jvp_backward", *everything)
    else:
        from fewstep.kernels import linear_attention_jvp_backward as module

        module.launch_linear_attention_jvp_backward(*everything)
    assert all(padding_intact(x) for x in gradients)
    assert all(relative_error(a, b) < 1e-5 for a, b in zip(gradients, oracle(args), strict=True))


def test_empty(impl):
    for lead, nq, nk in (((0, 2), 5, 6), ((2, 0), 5, 6), ((1, 2), 0, 6), ((1, 2), 5, 0)):
        args = inputs(nq, nk, 16, 24, lead=lead)
        got = ops.linear_attention_jvp_backward(*args, *states(args), impl=impl)
        for i, gradient in enumerate(got):
            assert gradient.shape == args[2 + i % 3].shape
        if nq == 0:  # nothing depends on the keys
            assert not any(gradient.any() for gradient in got)


def test_nan_stays_in_its_head(kernel):
    args = inputs(70, 5, 8, 24, lead=(1, 2))
    args[2][0, 0, 3, 4] = float("nan")
    got = ops.linear_attention_jvp_backward(*args, *states(args), impl=kernel)
    for gradient in got:
        assert gradient[0, 0].isnan().any()
        assert not gradient[0, 1].isnan().any()
    assert not got[0][0, 0, 4:].isnan().any()  # nor does it reach other queries


def test_threads_do_not_change_a_bit():
    args = inputs(600, 1100, 16)
    call = (*args, *states(args))
    one = ops.linear_attention_jvp_backward(*call, impl="native")
    torch.set_num_threads(4)
    many = ops.linear_attention_jvp_backward(*call, impl="native")
    assert all(torch.equal(a, b) for a, b in zip(one, many, strict=True))


def test_opcheck():
    args = inputs(3, 5, 8, 16)
    op = torch.ops.fewstep.linear_attention_jvp_backward.default
    for wanted in (0b111111, 0b000101):
        torch.library.opcheck(op, (*args, *states(args), 1e-15, wanted, "native"))


def test_a_tangent_is_refused():
    d_o, *rest = inputs(3, 5, 8)
    rest = (*rest, *states([d_o, *rest]))

    def f(d_o):
        return ops.linear_attention_jvp_backward(d_o, *rest)

    with pytest.raises(DerivativeError, match="linear_attention_jvp_backward has no forward-mode"):
        torch.func.jvp(f, (d_o,), (d_o,))


def test_bad_input_names_the_argument():
    args = inputs(5, 6, 16, 24)
    state, t_state = states(args)

    def call(position=None, value=None, **options):
        changed = [value if i == position else x for i, x in enumerate((*args, state, t_state))]
        return ops.linear_attention_jvp_backward(*changed, **options)

    with pytest.raises(ValueError, match=r"d_o: expected torch\.float32 \[1, 2, 5, 24\], got"):
        call(0, args[0][..., :8])
    with pytest.raises(ValueError, match=r"dt_o: expected torch\.float32 .*, got torch\.float16"):
        call(1, args[1].half())
    with pytest.raises(ValueError, match=r"k: expected the head dim of q, 16, got 8"):
        call(3, args[3][..., :8])
    with pytest.raises(ValueError, match=r"state: expected torch\.float32 \[1, 2, 16, 25\], got"):
        call(8, state[..., :24])
    with pytest.raises(
        ValueError, match=r"t_state: expected torch\.float32 .*, got torch\.float64"
    ):
        call(9, t_state.double())
    with pytest.raises(ValueError, match=r"wanted: expected names among q, k, .*, got 'o'"):
        call(wanted=["o"])
