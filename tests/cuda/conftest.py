"""The Hopper products of 8-bit rows, compiled once for all tests of them."""

import pytest

from cuda_emulation import compile_once, targets


@pytest.fixture(scope="session")
def gemm8_on_host(tmp_path_factory):
    """Return the emulated kernel: the functions of gemm8_sm90_emulated.cpp."""
    return compile_once("gemm8_sm90_emulated.cpp", tmp_path_factory)


@pytest.fixture(params=targets())
def gemm8(request):
    """Return the emulated kernel, and for the real one None."""
    return None if request.param == "device" else request.getfixturevalue("gemm8_on_host")


@pytest.fixture(scope="session")
def gemm4_on_host(tmp_path_factory):
    """Return the emulated kernel: the functions of gemm4_sm90_emulated.cpp."""
    return compile_once("gemm4_sm90_emulated.cpp", tmp_path_factory)


@pytest.fixture(params=targets())
def gemm4(request):
    """Return the emulated kernel, and for the real one None."""
    return None if request.param == "device" else request.getfixturevalue("gemm4_on_host")
