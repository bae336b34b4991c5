"""cache_metric: every implementation against the fp64 oracle, at odd sizes and layouts."""

import functools
import importlib

import pytest
import torch

from fewstep import _native, ops, reference
from fewstep.ops._register import DerivativeError
from helpers import DEVICES, padded, padding_intact, relative_error, row_sliced, strided

IMPLS = ["reference", "native", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (2, 3), (1, 1, 1), (3, 33, 65), (2, 17, 3, 31), (1, 129, 257), (2, 40_001)]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def inputs(shape, dtype, device=None):
    return [torch.randn(shape).to(device, dtype) for _ in range(3)]


def check(args, previous, impl, per_sample):
    x, y = args
    metric, residual = ops.cache_metric(
        x, y, previous=previous, return_residual=True, per_sample=per_sample, impl=impl
    )
    want, _ = reference.cache_metric(
        x.double(),
        y.double(),
        previous=None if previous is None else previous.double(),
        per_sample=per_sample,
    )
    # A chunk of n <= 16,384 terms is summed in fp32 over at least 4 lanes: n / 4 roundings of 2^-24
    # at the most; of random sign they add up as the root, sqrt(n / 4) * 2^-24 = 3.8e-6.
    assert metric.shape == want.shape
    assert metric.device == x.device
    assert relative_error(metric, want) < 3.8e-6
    assert residual.dtype == x.dtype
    assert torch.equal(residual.double(), (x.float() - y.float()).to(x.dtype).double())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("with_previous", [False, True])
def test_matches_oracle(shape, dtype, with_previous, impl, device):
    x, y, p = inputs(shape, dtype, device)
    check((x, y), p if with_previous else None, impl, per_sample=False)
    check((x, y), p if with_previous else None, impl, per_sample=True)


def test_float64_native():
    x, y, p = inputs((2, 50, 70), torch.float64)
    metric, residual = ops.cache_metric(x, y, previous=p, return_residual=True, impl="native")
    want, want_residual = reference.cache_metric(x, y, previous=p)
    assert metric.dtype == torch.float64
    assert relative_error(metric, want) < 1e-14
    assert torch.equal(residual, want_residual)


@pytest.mark.parametrize("layout", [padded, strided, row_sliced])
def test_layouts_do_not_read_padding(layout, impl):
    x, y, p = (layout(t) for t in inputs((3, 19, 70), torch.float32))
    check((x, y), p, impl, per_sample=True)


def launcher(impl):
    if impl == "native":
        return functools.partial(_native.call, "cache_metric")
    return importlib.import_module("fewstep.kernels.cache_metric").launch_cache_metric


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "triton"])
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 3, 67), (1, 2, 8_201)], ids=str)
def test_writes_only_its_outputs(shape, impl, device):
    x, y, p = inputs(shape, torch.float32, device)
    chunks = -(-shape[1] * shape[2] // ops.module("cache_metric").CHUNK)
    residual = padded(torch.zeros_like(x))
    partials = padded(torch.zeros(shape[0], chunks, 2, dtype=torch.float64, device=device))
    metric = padded(torch.zeros(shape[0], device=device))
    launcher(impl)(x, y, p, residual, partials, metric)
    for out in (residual, partials, metric):
        assert padding_intact(out)
    assert torch.equal(residual, x - y)
    want, _ = reference.cache_metric(x.double(), y.double(), previous=p.double(), per_sample=True)
    assert relative_error(metric, want) < 3.8e-6


def test_zero_over_zero_is_zero_and_division_by_zero_is_inf(impl):
    zero = torch.zeros(2, 3, 4)
    one = torch.ones(2, 3, 4)
    assert ops.cache_metric(zero, zero, impl=impl) == 0
    assert ops.cache_metric(one, zero, impl=impl) == float("inf")


@pytest.mark.parametrize("shape", [(0, 4, 8), (0,), (0, 5), (0, 2, 3, 4)], ids=str)
def test_empty_batch(shape, impl):
    x = torch.randn(shape)
    metric, residual = ops.cache_metric(x, x, return_residual=True, per_sample=True, impl=impl)
    assert metric.shape == (0,)
    assert residual.shape == x.shape
    assert ops.cache_metric(x, x, impl=impl) == 0


def test_large_offset(impl):
    # A common offset of 1e4 leaves 1e-3 of resolution in the difference; x - y is still exact.
    x, y, _ = inputs((2, 64, 64), torch.float32)
    check((x + 1e4, y + 1e4), None, impl, per_sample=False)


def test_sample_does_not_see_its_batch_mates(impl):
    x, y, p = inputs((3, 40, 50), torch.float32)
    whole = ops.cache_metric(x, y, previous=p, per_sample=True, impl=impl)
    alone = ops.cache_metric(x[1:2], y[1:2], previous=p[1:2], per_sample=True, impl=impl)
    assert torch.equal(whole[1:2], alone)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CPU_ISA", isa)
    for dtype in DTYPES:
        x, y, p = inputs((2, 31, 67), dtype)
        check((x, y), p, "native", per_sample=True)


@pytest.mark.parametrize("shape", [(3, 0), (2, 0, 4), (2, 3, 0)], ids=str)
def test_empty_samples(shape, impl):
    x = torch.randn(shape)
    metric = ops.cache_metric(x, x, per_sample=True, impl=impl)
    assert torch.equal(metric, torch.zeros(shape[0]))


def test_residual_is_contiguous_as_the_fake_says(impl):
    # A compiled graph reads the output by the fake's strides.
    x, y, _ = (t.mT for t in inputs((2, 5, 7), torch.float32))
    _, residual = ops.cache_metric(x, y, return_residual=True, impl=impl)
    assert residual.is_contiguous()
    assert torch.equal(residual, x - y)


def test_threads_do_not_change_a_bit():
    x, y, _ = inputs((1, 500, 300), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.cache_metric(x, y, impl="native")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, ops.cache_metric(x, y, impl="native"))


def test_opcheck():
    x, y, p = inputs((2, 8, 16), torch.float32)
    torch.library.opcheck(torch.ops.fewstep.cache_metric.default, (x, y, p, True, True, "native"))


def test_compiles_without_graph_break():
    x, y, _ = inputs((2, 8, 16), torch.float32)
    compiled = torch.compile(ops.cache_metric, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, y), ops.cache_metric(x, y))


def test_tangents_and_gradients_are_refused():
    x, y, _ = inputs((2, 8, 16), torch.float32)
    with pytest.raises(DerivativeError, match="tangent"):
        torch.func.jvp(lambda a: ops.cache_metric(a, y), (x,), (x,))
    with pytest.raises(DerivativeError, match="gradient"):
        ops.cache_metric(x.clone().requires_grad_(), y)
    with pytest.raises(DerivativeError):
        torch.func.grad(lambda a: ops.cache_metric(a, y))(x)


def test_bad_input_names_the_argument():
    x, y, _ = inputs((2, 8, 16), torch.float32)
    with pytest.raises(ValueError, match=r"y: expected the shape of x.*got torch.Size\(\[2, 8\]\)"):
        ops.cache_metric(x, y[..., 0])
    with pytest.raises(ValueError, match="previous: expected the dtype"):
        ops.cache_metric(x, y, previous=y.half())
    with pytest.raises(ValueError, match="x: expected a floating dtype"):
        ops.cache_metric(x.int(), y.int())
    with pytest.raises(ValueError, match="impl: expected one of"):
        ops.cache_metric(x, y, impl="cuda")
    with pytest.raises(ops.UnsupportedError, match="expected one of float32"):
        ops.cache_metric(x.double(), y.double(), impl="triton")


def test_float16_subnormals_survive_flushing():
    # A process may flush float32 subnormals; half-precision ones are not among them.
    tiny = torch.tensor([[[2.0**-24, 3 * 2.0**-24, -(2.0**-20), 2.0**-14]]], dtype=torch.float16)
    torch.set_flush_denormal(True)
    try:
        _, residual = ops.cache_metric(
            tiny, torch.zeros_like(tiny), return_residual=True, impl="native"
        )
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(residual, tiny)
