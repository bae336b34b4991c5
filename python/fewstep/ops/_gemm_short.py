"""The short way of a product from its public function to the native CPU kernel.

A product of a small layer takes 1 ms and sweeps the caches meanwhile, so what stands before the
next one is met cold, at 5 to 20 us for each function of torch and a microsecond for a few lines of
Python: 0.2 ms for the checks, the choice and the dispatch of an op, a sixth of a layer of 640
inputs (docs/ops/gemm_w8a8.md). All of it is there for calls of other kinds. A call from plain CPU
tensors, that nobody traces, differentiates or watches, needs an output and the kernel.

The kernel checks shapes, dtypes and strides itself. What it refuses, and what is asked for here,
goes the long way, which serves it or says in its own words what is wrong: nothing is refused here.
Nothing is kept between calls either, so nothing can go stale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from ._layout import FLOATS, matrix
from ._register import is_plain
from .quantize_int8 import run_native as quantize_native

_GLU = ("geglu", "swiglu")


def run_short(
    op: str,
    a: Tensor,
    a_scale: Tensor | None,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor | None,
    up: Tensor | None,
    activation: str | None,
    out_dtype: torch.dtype | None,
) -> Tensor | None:
    """Return what the native CPU kernel `op` makes of these, or None for the long way."""
    if torch.compiler.is_compiling():
        return None
    kernel = _native.cpu_kernel(op)
    # The kernel takes float64 here and 0 for False, and "" says that there is no activation.
    if (
        kernel is None
        or a is None
        or w is None
        or w_scale is None
        or not is_plain((a, w, w_scale, a_scale, bias, smooth, down, up), cpu=True)
        or type(rotate) is not int
        or not (activation is None or (type(activation) is str and activation))
        or not (a_scale is None or a_scale.shape == a.shape[:-1])  # the kernel sees a flat one
        or not (bias is None or bias.dtype in FLOATS)
        or not (smooth is None or smooth.dtype in FLOATS)
    ):
        return None
    if out_dtype is None:
        out_dtype = a.dtype if a_scale is None else torch.float32
    if out_dtype not in FLOATS or w.dim() != 2 or a.dim() == 0:
        return None
    if (down is not None or up is not None) and (
        down is None
        or up is None
        or a_scale is not None
        or down.dtype != a.dtype
        or up.dtype not in FLOATS
        or down.dim() != 2
        or up.dim() != 2
    ):
        return None
    N = w.shape[0]
    if activation in _GLU:
        N //= 2
    out = a.new_empty((*a.shape[:-1], N), dtype=out_dtype)
    if not out.numel():  # the kernel has nothing to check then
        return None
    low = None
    try:
        if down is not None:  # low beside the rows, while they are in cache
            a, a_scale, low = quantize_native(a, smooth, rotate, down)
            low, smooth, rotate = matrix(low), None, 0
        # Behind activation: gate, residual, the scale of int8 rows.
        kernel(
            *(a, a_scale, w, w_scale, bias, low, up, smooth, rotate),
            *(activation or "", None, None, None, out),
        )
    except (TypeError, ValueError):
        return None
    return out
