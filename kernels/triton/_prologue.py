"""What comes before a row is quantised, in Triton: an activation, columns smoothed, blocks rotated.

Smoothing is one division and one product a value, rotation butterflies (a + b, a - b) at distance
1, 2, 4, ... B / 2 and one product, as everywhere: launch with enable_fp_fusion=False, or a product
of the one is contracted with a sum of the other and the bits differ.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import narrow
from ._gemm import activate


@triton.jit
def load_activated(x_ptr, at, columns, mask, ACTIVATION: tl.constexpr):
    """Return activation(x), rounded to x's dtype, in float32; a switch is `columns` behind."""
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
        switch = tl.load(x_ptr + columns + at, mask=mask, other=0.0).to(tl.float32)
        x = narrow(x * activate(switch, ACTIVATION), x_ptr.dtype.element_ty).to(tl.float32)
    elif ACTIVATION is not None:
        x = narrow(activate(x, ACTIVATION), x_ptr.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def smooth_columns(x, smooth_ptr, at, mask):
    """Return x * (1 / smooth), the factors at columns `at`."""
    smooth = tl.load(smooth_ptr + at, mask=mask, other=1.0).to(tl.float32)
    return x * tl.div_rn(tl.full(smooth.shape, 1.0, tl.float32), smooth)


@triton.jit
def _butterflies(x, SIZE: tl.constexpr, D: tl.constexpr):
    """Return a + b and a - b of values a and b that are D apart."""
    a, b = tl.split(tl.permute(x.reshape(SIZE // (2 * D), 2, D), (0, 2, 1)))
    return tl.permute(tl.join(a + b, a - b), (0, 2, 1)).reshape(SIZE)


@triton.jit
def rotate_blocks(x, SIZE: tl.constexpr, B: tl.constexpr):
    """Return SIZE values, in the order of their flat index, with every B of them rotated."""
    x = x.reshape(SIZE)
    for stage in tl.static_range(8):
        if (2 << stage) <= B:
            x = _butterflies(x, SIZE, 1 << stage)
    return x * B**-0.5
