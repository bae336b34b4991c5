"""What the kernels share: conversions that Triton's CPU interpreter gets wrong, and sizes.

Seen on Triton 3.9's interpreter: a cast from float32 to bfloat16 truncates instead of rounding, and
`tl.dot` on bfloat16 operands returns garbage. `narrow` and `dot` compile to the plain operation on
a GPU.
"""

from __future__ import annotations

import os

from torch import Tensor

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 x to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x != x, bits | 0x400000, rounded) & -65536  # NaN stays NaN
        x = kept.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in float32, on operands of one 16-bit or 32-bit floating dtype."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


def pad_head_dim(x: int) -> int:
    """Return how many columns hold x of them: a power of two, and at least the 16 of a product."""
    return max(16, triton.next_power_of_2(x))


def strides_of(axes: int, *tensors: Tensor | None) -> list[int]:
    """Return the first `axes` strides of each tensor; zeros, unused, for what is absent."""
    return [s for x in tensors for s in ((0,) * axes if x is None else x.stride()[:axes])]


def present(default: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Return the tensors, with some tensor in the place of absent ones: kernels take no None."""
    return [default if x is None else x for x in tensors]
