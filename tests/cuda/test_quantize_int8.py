"""GPU kernels of quantize_int8, quantize_fp8 and norm_quantize_int8: the reference's bits.

They run on the host, from the ops' own sources over tests/cuda/emulation, and on a GPU where there
is one. Rows are of one thread and of teams of several warps, with whole units of 16 and without.
"""

import ctypes

import pytest
import torch

from cuda_emulation import View, compile_once
from fewstep import ops, reference
from fewstep.ops._epilogue import ACTIVATIONS, width
from helpers import padded, padding_intact, row_sliced, steps_apart

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Columns and rotation: part of a unit; a team of one warp, two, and with a rest; units by elements;
# three units a thread.
ROWS = [(1, 0), (77, 0), (96, 32), (640, 128), (1024, 256), (1040, 16), (8208, 16)]
FORMATS = ["int8", "fp8", "fp8 blocks"]
# On a GPU only: many rows a block, and the widest.
AT_SIZE = [(4096, 3072, 0), (8192, 640, 128), (33, 24576, 256)]


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Return the emulated kernels: the functions of quantize_emulated.cpp."""
    library = compile_once("quantize_emulated.cpp", tmp_path_factory)
    library.run_norm.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["host", pytest.param("device", marks=pytest.mark.gpu)])
def target(request):
    """Return the emulated kernels, or None for those of the GPU."""
    if request.param == "device" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return None if request.param == "device" else request.getfixturevalue("kernels")


def call_on_host(function, tensors, *options):
    """Call with tensors in the order of the contract, some of them None."""
    views = (View * len(tensors))(*map(View.of, tensors))
    present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
    error = function(views, present, *options)
    if error:
        raise ValueError(error.decode())


def quantize(target, form, x, *, smooth=None, rotate=0, down=None, activation=None):
    """Return what the kernel makes of x [R, K], with bytes for q; nothing around is written."""
    block = 128 if form == "fp8 blocks" else None
    if target is None:
        options = {"smooth": smooth, "down": down}
        options = {name: v if v is None else v.cuda() for name, v in options.items()}
        options |= {"rotate": rotate, "activation": activation, "impl": "native"}
        if form == "int8":
            found = ops.quantize_int8(x.cuda(), **options)
        else:
            found = ops.quantize_fp8(x.cuda(), block=block, **options)
        return [v.cpu() for v in found]
    R, K = x.shape[0], width(x.shape[1], activation)
    size = -1 if form == "int8" else block or max(K, 1)
    q = padded(torch.zeros(R, K, dtype=torch.int8 if size < 0 else torch.uint8), 48)
    scale = padded(torch.zeros(R) if size < 0 else torch.zeros(R, -(-K // size)))
    low = None if down is None else padded(torch.zeros(R, down.shape[0], dtype=x.dtype), 48)
    tensors = [x, smooth, down, q, scale, low]
    call_on_host(target.run, tensors, rotate, (activation or "").encode(), size)
    assert padding_intact(q, 48)
    assert padding_intact(scale)
    if size >= 0:
        q = q.view(torch.float8_e4m3fn)
        scale = scale if block else scale[:, 0]
    if low is not None:
        assert padding_intact(low, 48)
    return [q, scale] if low is None else [q, scale, low]


def expected(form, x, **options):
    if form == "int8":
        return reference.quantize_int8(x, **options)
    return reference.quantize_fp8(x, block=128 if form == "fp8 blocks" else None, **options)


def same_bits(got, want):
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_the_reference_s(dtype, form, target):
    for K, rotate in ROWS if dtype == torch.bfloat16 else ROWS[1:4]:
        x, smooth = (torch.randn(3, K) * 3).to(dtype), (torch.rand(K) + 0.1).to(dtype)
        for options in ({}, {"smooth": smooth, "rotate": rotate}):
            got = quantize(target, form, x, **options)
            assert same_bits(got, expected(form, x, **options)), (K, options)


@pytest.mark.parametrize("form", FORMATS)
def test_more_rows_than_blocks(form, target):
    x, smooth = torch.randn(37, 96).bfloat16(), torch.rand(96) + 0.1
    got = quantize(target, form, x, smooth=smooth)
    assert same_bits(got, expected(form, x, smooth=smooth))


@pytest.mark.parametrize("form", FORMATS)
def test_rows_anywhere_in_memory(form, target):
    """Rows that start at no multiple of 16 bytes, in the midst of NaN."""
    x = row_sliced(torch.randn(4, 96).bfloat16())
    assert same_bits(quantize(target, form, x, rotate=32), expected(form, x, rotate=32))
    x = padded(torch.randn(4, 160).bfloat16())
    assert same_bits(quantize(target, form, x), expected(form, x))


@pytest.mark.parametrize("form", FORMATS)
def test_zero_tiny_large_and_non_finite_rows(form, target):
    x = torch.randn(9, 130)
    rows = [0.0, 1e-36, 1e-30, 2.0**-100, 1e30, 1e38]
    x[:6] = x[:6].clamp(-1, 1) * torch.tensor(rows)[:, None]
    x[6, 129], x[7, 3], x[8, 0] = float("inf"), float("nan"), float("-inf")
    assert same_bits(quantize(target, form, x), expected(form, x))


def test_quotients_are_those_of_a_division(target):
    """What e4m3 rounds is made of a reciprocal: next to ties of e4m3 too, at scales of any size."""
    ties = torch.arange(16, 32) / 16 + 1 / 32
    near = torch.cat([torch.nextafter(ties, ties + s) for s in (-1, 0, 1)])
    steps = torch.cat([near * 2.0**e for e in (-9, -6, 0, 7)])
    scales = torch.cat(
        [torch.rand(60) + 1, (torch.rand(20) + 1) * 2.0 ** torch.arange(-110, 90, 10)]
    )
    x = torch.cat([torch.full((80, 1), 448.0), steps.expand(80, -1)], 1) * scales[:, None]
    assert same_bits(quantize(target, "fp8", x), expected("fp8", x))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_come_first(activation, dtype, form, target):
    """Within a step of the reference, which rounds activation(x) to the other side of few ties."""
    x = (torch.randn(3, 192) * 3).to(dtype)
    q, scale = quantize(target, form, x, activation=activation)
    want, want_scale = expected(form, x, activation=activation)
    torch.testing.assert_close(scale, want_scale, rtol=2 * torch.finfo(dtype).eps, atol=0)
    apart = steps_apart(q, want)
    assert (apart <= 1).all()
    assert (apart > 0).float().mean() < 0.02
    assert q.shape == (3, 96 if "glu" in activation else 192)


# Rows (one block, a rest, two), columns, rotation, rank: part of a tile and of its rows, all of it.
LOW = [(5, 96, 32, 4), (17, 256, 256, 64), (20, 48, 16, 33), (2, 1040, 16, 8)]


@pytest.mark.parametrize("activation", [None, "geglu"])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_low_keeps_its_bound_and_changes_no_bit(dtype, form, activation, target):
    for R, K, rotate, rank in LOW:
        x = torch.randn(R, K * (2 if activation else 1)).to(dtype)
        down, smooth = torch.randn(rank, K).to(dtype), torch.rand(K) + 0.1
        options = {"smooth": smooth, "rotate": rotate, "activation": activation}
        q, scale, low = quantize(target, form, x, down=down, **options)
        assert same_bits((q, scale), quantize(target, form, x, **options))
        v = x.double()
        if activation:  # what the kernel made of x: each may be a unit off in a sum of K
            v = reference._prologue.activated(x, activation).double()
        exact, terms = v @ down.double().mT, v.abs() @ down.double().abs().mT
        unit = torch.finfo(dtype).eps / 2
        # The bound of ops/_prologue.py; tensor cores cut where other units round.
        bound = 2 * K * 2.0**-24 * terms + unit * exact.abs()
        bound = bound * (1 + unit) + (0.05 * 2 * unit * terms if activation else 0)
        assert ((low.double() - exact).abs() <= bound).all()


def test_shared_memory_is_counted_alike(kernels):
    """What Python lets through the launch has room for: all ranks, narrow rows and the widest."""
    count = ops.module("quantize_int8").low_shared_bytes
    for is_smoothed in (False, True):
        for rank in range(1, 65):
            for K in (16, 640, *range(4480, 4640, 16), *range(6304, 6464, 16), 24576):
                want = kernels.low_shared_bytes(K, rank, is_smoothed)
                assert count(K, rank, is_smoothed) == want, (K, rank)


def test_what_low_needs_is_asked_for(kernels):
    x, down = torch.randn(3, 96).bfloat16(), torch.randn(4, 96).bfloat16()
    with pytest.raises(ValueError, match="x: expected bfloat16 or float16 with down, got float32"):
        quantize(kernels, "int8", x.float(), down=down.float())
    with pytest.raises(ValueError, match="down: expected a rank from 1 to 64, got 65"):
        quantize(kernels, "int8", x, down=torch.randn(65, 96).bfloat16())
    with pytest.raises(ValueError, match=r"multiples of 16 bytes.*K = 90"):
        quantize(kernels, "int8", x[:, :90].contiguous(), down=down[:, :90].contiguous())


def norm(target, x, *, rotate=0, kind="layer", eps=1e-6, **operands):
    """Return (q, q_scale) of x [B, N, C]; scale and shift broadcast against it."""
    names = ("weight", "bias", "scale", "shift", "smooth")
    given = {name: operands.get(name) for name in names}
    if target is None:
        given = {name: v if v is None else v.cuda() for name, v in given.items()}
        options = {"rotate": rotate, "kind": kind, "eps": eps, "impl": "native"}
        return [v.cpu() for v in ops.norm_quantize_int8(x.cuda(), **given, **options)]
    for name in ("scale", "shift"):
        given[name] = None if given[name] is None else given[name].expand(x.shape)
    q, q_scale = (
        padded(torch.zeros(x.shape, dtype=torch.int8), 48),
        padded(torch.zeros(x.shape[:2])),
    )
    tensors = [x, *given.values(), q, q_scale]
    call_on_host(target.run_norm, tensors, rotate, kind == "layer", ctypes.c_double(eps))
    assert padding_intact(q, 48)
    assert padding_intact(q_scale)
    return q, q_scale


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 96), (1, 2, 1001), (1, 1, 8208)], ids=str)
def test_norm(shape, dtype, kind, target):
    """quantize_int8 of a z within float32's error of the reference's: rounded to either side."""
    b, n, c = shape
    x = (0.5 + 2 * torch.randn(shape)).to(dtype)
    scale, shift = torch.randn(b, 1, c).to(dtype), torch.randn(n, c).to(dtype)
    weight, bias, smooth = torch.randn(c), torch.randn(c), torch.rand(c) + 0.5
    rotate = 32 if c % 32 == 0 else 0
    prepared = {"smooth": smooth, "rotate": rotate}
    for given in (
        {},
        {"scale": scale, "shift": shift},
        {"weight": weight, "bias": bias, **prepared},
    ):
        q, q_scale = norm(target, x, kind=kind, **given)
        want, want_scale = reference.norm_quantize_int8(x, kind=kind, **given)
        # Half a unit of dtype to either side, of the row's largest value or, rotated, of most.
        units = 2 * max(torch.finfo(dtype).eps, 2.0**-20)
        torch.testing.assert_close(q_scale, want_scale, rtol=units, atol=0)
        apart = steps_apart(q, want)
        assert (apart <= 1).all()
        assert (apart > 0).float().mean() < (0.01 if dtype == torch.float32 else 0.1)


def test_norm_of_constant_and_non_finite_rows(target):
    x = torch.randn(1, 4, 96)
    x[0, 1], x[0, 2, 5] = 2.0, float("inf")
    q, q_scale = norm(target, x, scale=torch.randn(96))
    assert not q[0, 1:3].any()
    assert q_scale[0, 1] == 1
    assert q_scale[0, 2].isnan()
    assert (q[0, [0, 3]].abs().amax(-1) == 127).all()


def test_what_does_not_fit_is_refused(kernels):
    x = torch.randn(2, 24592)
    with pytest.raises(ValueError, match="x: expected at most 24576 columns, got 24592"):
        quantize(kernels, "int8", x)
    with pytest.raises(ValueError, match=r"rotate: expected 0 or a power of two.*got 48"):
        quantize(kernels, "int8", x[:, :96], rotate=48)
    with pytest.raises(ValueError, match=r"activation: expected gelu.*got relu"):
        quantize(kernels, "int8", x[:, :96], activation="relu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("size", AT_SIZE, ids=str)
def test_at_size(size, form):
    R, K, rotate = size
    x, smooth = torch.randn(R, K).bfloat16(), torch.rand(K) + 0.1
    got = quantize(None, form, x, smooth=smooth, rotate=rotate)
    assert same_bits(got, expected(form, x, smooth=smooth, rotate=rotate))
