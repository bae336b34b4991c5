"""What the Hopper kernels of products with 8-bit rows take (csrc/include/fewstep/cuda/gemm8_*.cuh,
with a 4-bit weight gemm4_*.cuh, whose scales of groups their op has checked).

The copy engine reads rows that start at multiples of 16 bytes: of a, w, and of low and up, which
are multiplied in their one 16-bit dtype and copied where their rank is no multiple of 8. Floating
rows and int8 outputs without limits are quantised by another kernel (`_gemm_rows.py`); for outputs,
which are not there yet, it has to be Triton's that can.
What is refused here is known from shapes, strides and offsets, which a trace has too; memory that
starts elsewhere all the same is copied at the launch (`_native.aligned`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from ._gemm_rows import refuse_quantising
from ._layout import FLOATS, refuse_rows
from ._select import refuse_triton

_CHUNK = 8  # 16-bit values


def refuse_hopper(
    *,
    a: Tensor,
    a_scale: Tensor | None = None,
    w: Tensor | None = None,
    w_scale: Tensor | None = None,
    up: Tensor | None = None,
    low: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    limit: Tensor | None = None,
    **others: Any,
) -> str | None:
    """Return why the kernel can't take a product of these operands, by their names, or None."""
    K = a.shape[-1] if a.dim() else 0
    reason = None
    if K == 0 or K % 16:
        reason = f"expected K above 0 and a multiple of 16, got {K}"
    elif a_scale is not None and a_scale.dim() == a.dim():
        reason = "a_scale: expected one scale per row, got scales of blocks"
    elif w is not None and w.dtype != torch.uint8 and w_scale is not None and w_scale.dim() != 1:
        reason = "w_scale: expected one scale per column, got scales of blocks"
    elif a.is_floating_point() and a_scale is None:
        form = w.dtype if w is not None and w.is_floating_point() else torch.int8
        reason = refuse_quantising(form, a)
    elif a.dim() > 1:
        reason = refuse_rows("a", a)
    if reason is None and out_dtype == torch.int8 and limit is None:
        reason = refuse_triton([a], (a.dtype,))  # may have to quantise the output
    if reason is None and w is not None:
        reason = refuse_rows("w", w)
    if reason is None and up is not None:
        reason = _refuse_branch(a if low is None else low, up)
    return reason and f"the Hopper kernel: {reason}"


def _refuse_branch(low: Tensor, up: Tensor) -> str | None:
    if low.dtype not in FLOATS[1:] or up.dtype != low.dtype:
        return f"low, up: expected bfloat16 or float16, both the same, got {low.dtype}, {up.dtype}"
    return None if up.shape[-1] else "up: expected a rank above 0, got 0"


def loadable(x: Tensor | None) -> Tensor | None:
    """Return low or up, contiguous, as the copy engine can read it: a rank of no whole chunks of 16
    bytes is copied to rows that are longer; what lies behind the rank there is not read.
    """
    if x is None or x.shape[1] % _CHUNK == 0:
        return _native.aligned(x)
    rows, R = x.shape
    return x.new_empty(rows, R + -R % _CHUNK)[:, :R].copy_(x)
