"""Which device a test of a kernel runs on, with and without a GPU."""

import pytest

from helpers import place


@pytest.mark.parametrize(
    ("op", "kernel_of_a_test", "asked", "with_gpu", "without"),
    [
        ("quantize_int8", "triton", None, "cuda", "cpu"),
        ("quantize_int8", "triton", "cpu", None, "cpu"),
        ("quantize_int8", "triton", "cuda", "cuda", None),
        ("quantize_int8", "native", None, "cpu", "cpu"),
        ("quantize_int4", "native", "cuda", None, None),  # it has no CUDA C++ kernel
        ("cache_metric", "native", "cuda", "cuda", "cuda"),
        ("cache_metric", "reference", "cuda", "cuda", "cuda"),
        ("quantize_int8", None, None, "cpu", "cpu"),
    ],
)
def test_place(op, kernel_of_a_test, asked, with_gpu, without):
    assert place(op, kernel_of_a_test, asked, has_cuda=True) == with_gpu
    assert place(op, kernel_of_a_test, asked, has_cuda=False) == without
