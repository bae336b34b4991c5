"""What the kernels share: conversions that Triton's CPU interpreter gets wrong on bfloat16.

Seen on Triton 3.9's interpreter: a cast from float32 to bfloat16 truncates instead of rounding, and
`tl.dot` on bfloat16 operands returns garbage. Both helpers compile to the plain operation on a GPU.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round float32 x to `dtype`, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        kept = tl.where(x != x, bits, rounded) & -65536
        x = kept.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """Return acc + a @ b in float32, on operands of one 16-bit or 32-bit floating dtype."""
    if INTERPRETED:
        return acc + tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
