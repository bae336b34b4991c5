"""The norm of a tile of whole rows, for kernels that hold rows in registers."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def normalise(x, mask, eps, C: tl.constexpr, CENTRED: tl.constexpr):
    """Return (mean, rstd, n) of float32 rows that are zero outside of the mask, as n is."""
    mean = tl.zeros([x.shape[0]], tl.float32)
    if CENTRED:
        mean = tl.sum(x, 1) / C
        x = tl.where(mask, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    return mean, rstd, x * rstd[:, None]
