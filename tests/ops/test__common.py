"""What the Triton kernels share: rounding, products, and the sizes and stand-ins of a launch."""

import pytest
import torch
import triton
import triton.language as tl
from fewstep.kernels._common import dot, narrow, pad_head_dim, present, strides_of

from helpers import relative_error

pytestmark = pytest.mark.triton


@triton.jit
def _narrow(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(y_ptr + offs, narrow(x, y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _dot(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    offs = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    c = dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs), tl.load(c_ptr + offs))
    tl.store(c_ptr + offs, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_rounds_to_nearest_even(dtype):
    """Every 16-bit pattern with the bits that a rounding looks at: ties, carries, NaN, infinity."""
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    lower = torch.tensor([0, 1, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (upper[:, None] | lower).flatten().view(torch.float32)
    y = torch.empty(x.shape, dtype=dtype)
    _narrow[(triton.cdiv(len(x), 2**16),)](x, y, len(x), BLOCK=2**16)
    want = x.to(dtype)
    assert torch.equal(y.isnan(), want.isnan())
    # The interpreter's own cast, after the rounding, flushes what is subnormal in bfloat16.
    compared = ~want.isnan() & (want.abs() >= torch.finfo(dtype).tiny)
    assert torch.equal(y[compared], want[compared])
    assert (y - want)[~want.isnan() & ~compared].abs().max() <= torch.finfo(dtype).tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot_adds_the_product_in_float32(dtype):
    a, b = (torch.randn(32, 32).to(dtype) for _ in range(2))
    c = torch.randn(32, 32)
    want = c.double() + a.double() @ b.double()
    _dot[(1,)](a, b, c, SIZE=32)
    # Products of 16-bit values are exact in float32; sums of 33 terms round at most 33 times.
    assert relative_error(c, want) < 33 * 2**-24


def test_head_dims_are_padded_to_what_a_product_takes():
    assert [pad_head_dim(d) for d in (8, 16, 24, 64, 72, 256)] == [16, 16, 32, 64, 128, 256]


def test_absent_tensors_have_a_stand_in_and_no_strides():
    x, y = torch.empty(2, 3, 5), torch.empty(3, 4)
    assert strides_of(2, x, None, y) == [15, 5, 0, 0, 4, 1]
    assert [z is w for z, w in zip(present(x, None, y), (x, y), strict=True)] == [True, True]
