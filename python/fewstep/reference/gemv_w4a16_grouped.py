"""Oracle of `fewstep.ops.gemv_w4a16_grouped`.

out_g = x_g W_g^T + bias_g                  for each problem g; rounded once to x's dtype
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .gemm_w4a16 import gemm_w4a16


def gemv_w4a16_grouped(
    x: Sequence[Tensor],
    w: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None],
) -> list[Tensor]:
    """Return the products with the dequantised weights; float64 throughout."""
    inputs = [*x] * len(w) if len(x) == 1 else x
    return [
        gemm_w4a16(x, w, w_scale, bias=bias)
        for x, w, w_scale, bias in zip(inputs, w, w_scale, bias, strict=True)
    ]
