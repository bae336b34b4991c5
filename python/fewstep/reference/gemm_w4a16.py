"""Oracle of `fewstep.ops.gemm_w4a16`.

y_mn = sum_k x_mk q_nk s_ng(k) + bias_n + sum_r low_mr up_nr
out  = residual + gate * activation(y)                rounded once to x's dtype
"""

from __future__ import annotations

from torch import Tensor

from ._epilogue import finish
from .quantize_int4 import unpack_nibbles


def dequantize_int4(w: Tensor, w_scale: Tensor) -> Tensor:
    """Return the weight [N, K] in float64: exact, q has 4 bits and s at most 11."""
    q = unpack_nibbles(w).double()
    if w_scale.shape[1] == 0:
        return q
    return (q.unflatten(1, (w_scale.shape[1], -1)) * w_scale.double()[..., None]).flatten(1)


def gemm_w4a16(
    x: Tensor,
    w: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    down: Tensor | None = None,
    up: Tensor | None = None,
    low: Tensor | None = None,
    activation: str | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return the product with the dequantised weight; float64 throughout."""
    if down is not None:
        low = (x.double() @ down.double().mT).to(x.dtype)
    out = x.double() @ dequantize_int4(w, w_scale).mT
    if bias is not None:
        out = out + bias.double()
    if up is not None and low is not None:
        out = out + low.double() @ up.double().mT
    return finish(out, activation, gate, residual).to(x.dtype)
