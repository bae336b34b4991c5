"""What the stand-in for the chip holds kernels to, shown on a product of a few lines."""

import ctypes

import pytest
import torch

from cuda_emulation import compile_for_host

FENCE, NOTHING, ONE_THREAD_FENCES, FENCE_AND_STORE = range(4)


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """Return a function that multiplies, or raises what the emulation found."""
    library = compile_for_host("emulation_fences.cpp", tmp_path_factory.mktemp("emulated"))

    def run(between):
        d = torch.full((64, 32), torch.nan)
        error = library.run(ctypes.c_void_p(d.data_ptr()), between)
        if error:
            raise ValueError(error.decode())
        return d

    return run


def test_stores_that_are_fenced_are_multiplied(product):
    rows = torch.arange(96)[:, None] % 8 - torch.arange(16) % 3
    a, b = rows[:64].float(), rows[64:].float()
    assert torch.equal(product(FENCE), a @ b.T)


@pytest.mark.parametrize("between", [NOTHING, ONE_THREAD_FENCES, FENCE_AND_STORE])
def test_stores_that_are_not_fenced_are_an_error(product, between):
    with pytest.raises(ValueError, match="a product reads a store that was not fenced"):
        product(between)
