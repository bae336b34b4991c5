"""GPU kernels of token_gather and token_scatter, on the host from the ops' own sources.

Copies must have the reference's bits, with whole units of 16 bytes and without; norms its values.
"""

import ctypes

import pytest
import torch

from cuda_emulation import View, compile_once
from fewstep import reference
from helpers import padded, padding_intact, row_sliced

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAD = 48  # of every dtype a multiple of 16 bytes: outputs begin at one
COLUMNS = [1, 77, 96, 1032]  # 1,032: a warp takes more than one round, and the last in part
EPS = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Return the emulated kernels: the functions of tokens_emulated.cpp."""
    library = compile_once("tokens_emulated.cpp", tmp_path_factory)
    library.run_scatter.restype = ctypes.c_char_p
    return library


def call(function, tensors, *options):
    """Call with tensors in the order of the contract, some of them None."""
    views = (View * len(tensors))(*map(View.of, tensors))
    present = (ctypes.c_bool * len(tensors))(*(x is not None for x in tensors))
    error = function(views, present, *options)
    if error:
        raise ValueError(error.decode())


def inputs(C, dtype, B=2, N=9, M=11):
    x, value = (torch.randn(B, rows, C).to(dtype) for rows in (N, M))
    index = torch.randint(0, N, (B, M))
    position = torch.randint(-M, M, (B, N), dtype=torch.int32)
    index[1, 3], index[0, 0], position[1, 2] = N, -1, M  # none of these is there
    return x, index, value, position, torch.randn(B, 3 * C).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", COLUMNS)
def test_gather(C, dtype, kernels):
    x, index, value, _, table = inputs(C, dtype)
    for index_ in (index, index.int()):
        y = padded(torch.zeros_like(value), PAD)
        call(kernels.run, [padded(x, PAD), index_, None, None, y], False, ctypes.c_double(0))
        assert padding_intact(y, PAD)
        assert torch.equal(
            y.float().nan_to_num(99), reference.token_gather(x, index).float().nan_to_num(99)
        )
    for scale, shift in ((table[:, :C], table[:, -C:]), (None, None)):
        call(kernels.run, [row_sliced(x), index, scale, shift, y], True, ctypes.c_double(1e-6))
        assert padding_intact(y, PAD)
        wide = [v if v is None else v.double() for v in (scale, shift)]
        want = reference.token_gather(x.double(), index, scale=wide[0], shift=wide[1], eps=1e-6)
        assert torch.equal(y.isnan(), want.isnan())
        # As in tests/ops/test_token_gather.py, of modulations that are below 5.
        bound = (C**0.5 + 6) * 2.0**-24 * 40 + EPS[dtype] * (want.abs() + 1e-4) + 2.0**-25
        assert ((y.double() - want).abs() <= bound)[~want.isnan()].all()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("C", COLUMNS)
def test_scatter(C, dtype, in_place, kernels):
    base, _, value, position, table = inputs(C, dtype)
    for gate, residual in ((None, False), (None, True), (table[:, C : 2 * C], True)):
        y = padded(base if in_place else torch.zeros_like(base), PAD)
        kept = None if in_place else row_sliced(base) if gate is not None else base
        call(kernels.run_scatter, [padded(value, PAD), position, kept, gate, y], residual)
        assert padding_intact(y, PAD)
        want = reference.token_scatter(value, position, base, gate=gate, residual=residual)
        if gate is None and not residual:
            assert torch.equal(y.float().nan_to_num(99), want.float().nan_to_num(99))
        # A product and a sum of terms below 5, rounded once together or once each.
        bound = 2.0**-23 * 30 + 2 * EPS[dtype] * (want.float().abs() + 1e-5) + 2.0**-24
        assert torch.equal(y.isnan(), want.isnan())
        assert ((y.float() - want.float()).abs() <= bound)[~want.isnan()].all()


def test_bad_views_are_refused(kernels):
    x, index, value, position, _ = inputs(8, torch.float32)
    args = [x.double(), index, None, None, value.double()]
    with pytest.raises(ValueError, match="x: expected float32, float16 or bfloat16, got float64"):
        call(kernels.run, args, False, ctypes.c_double(0))
    with pytest.raises(ValueError, match="base: expected unit stride"):
        call(kernels.run_scatter, [value, position, x.mT.contiguous().mT, None, x], False)
