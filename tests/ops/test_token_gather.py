"""token_gather: every implementation against the fp64 oracle; copies keep their bits."""

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2, 1), (3, 7, 66, 5), (2, 19, 128, 20), (1, 5, 1030, 3)]  # B, N, C, M
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def inputs(shape, dtype, kind=torch.int64, device=None):
    """Return x, an index with duplicates, scale and shift as slices of one table."""
    B, N, C, M = shape
    x = torch.randn(B, N, C).to(device, dtype)
    index = torch.randint(0, N, (B, M)).to(device, kind)
    table = torch.randn(B, 2 * C).to(device, dtype)
    return x, index, *table.chunk(2, -1)


def rows_of(x, index):
    """Return the rows one by one, as Python counts them."""
    each = zip(x, index.tolist(), strict=True)
    return torch.stack([torch.stack([sample[n] for n in chosen]) for sample, chosen in each])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_copies_rows_to_the_bit(shape, dtype, impl, device):
    kind = torch.int32 if dtype == torch.bfloat16 else torch.int64
    x, index, _, _ = inputs(shape, dtype, kind, device)
    x.view(-1)[0] = -0.0
    y = ops.token_gather(x, index, impl=impl)
    assert y.is_contiguous()
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(y.view(bits), rows_of(x.cpu(), index.cpu()).to(x.device).view(bits))


def check_norm(x, index, scale, shift, impl, eps=1e-6):
    y = ops.token_gather(x, index, scale=scale, shift=shift, eps=eps, impl=impl)
    wide = [None if v is None else v.double() for v in (scale, shift)]
    want = reference.token_gather(x.double(), index, scale=wide[0], shift=wide[1], eps=eps)
    # Of C terms added in float32, the mean is within sqrt(C) 2^-24 of a deviation of its own, and
    # the variance of itself; a handful of roundings follow, of terms that may cancel.
    norm = reference.token_gather(x.double(), index, eps=eps).abs() + 1
    size = norm if scale is None else (1 + wide[0]).abs()[:, None] * norm
    size = size if shift is None else size + wide[1].abs()[:, None]
    bound = (x.shape[2] ** 0.5 + 6) * 2.0**-24 * size
    bound += EPS[x.dtype] * (want.abs() + bound) + 2.0**-25  # the last for float16's subnormals
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert ((y.double() - want).abs() <= bound).all()
    return y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_norm_and_modulation_match_the_oracle(shape, dtype, impl, device):
    x, index, scale, shift = inputs(shape, dtype, device=device)
    check_norm(x, index, scale, shift, impl)
    check_norm(x, index, None, shift, impl)
    check_norm(x, index, scale, None, impl)
    check_norm(x, index, None, None, impl, eps=0.1)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set_has_the_bits_of_norm_jvp(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in (*FLOATS, torch.float64):
        x, index, scale, shift = inputs((2, 9, 77, 6), dtype)
        y = ops.token_gather(x, index, scale=scale, shift=shift, eps=1e-6, impl="native")
        rows = rows_of(x, index)
        want, _ = ops.norm_jvp(rows, scale=scale[:, None], shift=shift[:, None], impl="native")
        assert torch.equal(y, want)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-6}], ids=str)
def test_index_outside_is_nan_and_nothing_else_is(options, impl):
    x, _, _, _ = inputs((2, 4, 40, 1), torch.float32)
    index = torch.tensor([[0, 4, 3], [-1, 2, 2**31 - 1]])
    y = ops.token_gather(x, index, **options, impl=impl)
    assert torch.equal(y.isnan().all(-1), (index < 0) | (index > 3))
    assert torch.equal(y.isnan().any(-1), y.isnan().all(-1))
    far = torch.tensor([[2**40, 0], [-(2**40), 1]])
    y = ops.token_gather(x, far, **options, impl=impl)
    assert y[:, 0].isnan().all()
    assert y[:, 1].isfinite().all()


def test_no_tokens_to_choose_from(impl):
    x = torch.randn(2, 0, 8)
    assert ops.token_gather(x, torch.zeros(2, 3).long(), impl=impl).isnan().all()


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    x, index, scale, shift = inputs((3, 19, 70, 8), torch.float32)
    want = ops.token_gather(x, index, impl=impl)
    assert torch.equal(ops.token_gather(layout(x), index, impl=impl), want)
    assert torch.equal(ops.token_gather(layout(x), strided(index), impl=impl), want)
    check_norm(layout(x), index, layout(scale), layout(shift), impl)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(ops.token_gather(swapped, index, impl=impl), want)


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_native_writes_only_its_output(dtype, normed):
    x, index, _, _ = inputs((2, 5, 71, 3), dtype)
    y = padded(torch.zeros(2, 3, 71, dtype=dtype))
    _native.call("token_gather", padded(x), index, None, None, y, normed, 1e-6)
    assert padding_intact(y)
    assert y.isfinite().all()


def test_float64_native():
    x, index, scale, shift = inputs((2, 9, 70, 4), torch.float64)
    y = ops.token_gather(x, index, scale=scale, shift=shift, eps=1e-6, impl="native")
    want = reference.token_gather(x, index, scale=scale, shift=shift, eps=1e-6)
    torch.testing.assert_close(y, want, rtol=1e-13, atol=1e-13)


def test_sample_does_not_see_its_batch_mates(impl):
    x, index, scale, shift = inputs((3, 9, 50, 6), torch.float32)
    whole = ops.token_gather(x, index, scale=scale, shift=shift, eps=1e-6, impl=impl)
    own = [v[1:2] for v in (x, index, scale, shift)]
    alone = ops.token_gather(*own[:2], scale=own[2], shift=own[3], eps=1e-6, impl=impl)
    assert torch.equal(whole[1:2], alone)


def test_threads_do_not_change_a_bit():
    x, index, scale, shift = inputs((2, 300, 70, 200), torch.bfloat16)
    threads = torch.get_num_threads()
    options = {"scale": scale, "shift": shift, "eps": 1e-6, "impl": "native"}
    try:
        torch.set_num_threads(1)
        one = ops.token_gather(x, index, **options)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.token_gather(x, index, **options))


@pytest.mark.parametrize("shape", [(0, 4, 8, 2), (2, 3, 8, 0), (2, 3, 0, 2)], ids=str)
def test_empty(shape, impl):
    x, index, _, _ = inputs(shape, torch.float32)
    assert ops.token_gather(x, index, impl=impl).shape == (shape[0], shape[3], shape[2])


def test_opcheck_and_compile():
    x, index, scale, shift = inputs((2, 5, 64, 3), torch.float32)
    args = (x, index, scale, shift, 1e-6, "native")
    torch.library.opcheck(torch.ops.fewstep.token_gather.default, args)
    torch.library.opcheck(
        torch.ops.fewstep.token_gather.default, (x, index, None, None, None, "native")
    )
    compiled = torch.compile(ops.token_gather, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, index), ops.token_gather(x, index))


def test_tangents_and_gradients_are_refused():
    x, index, scale, _ = inputs((2, 5, 8, 3), torch.float32)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda v: ops.token_gather(v, index), (x,), (x,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.token_gather(x, index, scale=scale.clone().requires_grad_(), eps=1e-6)


X, INDEX, ROW = torch.randn(2, 5, 8), torch.zeros(2, 3).long(), torch.zeros(2, 8)
BAD = [
    ((X[0], INDEX), {}, r"x: expected \[B, N, C\], got \[5, 8\]"),
    ((X.int(), INDEX), {}, "x: expected a floating dtype, got torch.int32"),
    ((X, INDEX.float()), {}, "index: expected int32 or int64 on cpu, got torch.float32"),
    ((X, INDEX[:1]), {}, r"index: expected \[2, M\], got \[1, 3\]"),
    ((X, INDEX[0]), {}, r"index: expected \[2, M\], got \[3\]"),
    ((X, INDEX), {"scale": ROW[:1], "eps": 0.1}, r"scale: expected a row a sample, \[2, 8\]"),
    ((X, INDEX), {"shift": ROW.half(), "eps": 0.1}, "shift: expected torch.float32 on cpu"),
    ((X, INDEX), {"scale": ROW}, "scale: expected None without eps"),
    ((X, INDEX), {"eps": -1.0}, "eps: expected at least 0, got -1.0"),
    ((X, INDEX), {"eps": float("nan")}, "eps: expected at least 0, got nan"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), BAD)
def test_bad_input_names_the_argument(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        ops.token_gather(*args, **kwargs)


def test_wrong_kinds_and_unknown_implementations():
    with pytest.raises(TypeError, match="index: expected a tensor, got list"):
        ops.token_gather(X, [[0]])
    with pytest.raises(TypeError, match="eps: expected a number, got a tensor"):
        ops.token_gather(X, INDEX, eps=torch.tensor(0.1))
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        ops.token_gather(X.double(), INDEX, impl="triton")
    with pytest.raises(ops.UnsupportedError, match="at most 16384 columns"):
        ops.token_gather(torch.zeros(1, 1, 16385), INDEX[:1], impl="triton")


NATIVE = (X, INDEX, ROW, ROW, torch.empty(2, 3, 8), True, 1e-6)


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, X[0], "x: expected 3 axes"),
        (0, X.mT, "x: expected unit stride"),
        (1, INDEX.float(), "index: expected int32"),
        (1, INDEX[:, ::2], "index: expected unit stride"),
        (2, ROW[:, :4], "scale: expected size 8"),
        (3, ROW.half(), "shift: expected float32"),
        (4, torch.empty(2, 2, 8), "y: expected size 3"),
        (5, False, "scale, shift: expected none without the norm"),
    ],
)
def test_native_call_checks_for_itself(at, value, message):
    args = [value if i == at else old for i, old in enumerate(NATIVE)]
    with pytest.raises(ValueError, match=message):
        _native.call("token_gather", *args)
