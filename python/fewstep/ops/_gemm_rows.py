"""8-bit rows for the products on GPUs, and 8-bit outputs of them: which kernel makes them.

    int8    quantize_int8(x, smooth, rotate, down)
    e4m3    quantize_fp8(x, block, smooth, rotate, down)

It is the CUDA kernel where `auto` may take it for these rows: then low comes from the same reading
of x. Else Triton's, and low is torch's own product. The op's table is asked at every call, so what
lets a kernel into the op lets it into the products and layers.
"""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ._layout import FLOATS
from ._select import Implementation, refuse_triton, serves

_OPS = {
    dtype: (op, import_module(f".{op}", __package__))
    for dtype, op in ((torch.int8, "quantize_int8"), (torch.float8_e4m3fn, "quantize_fp8"))
}


def quantising(dtype: torch.dtype, x: Tensor) -> Implementation:
    """Return the implementation that makes rows of `dtype` from x."""
    op, module = _OPS[dtype]
    ways = {way.name: way for way in module.IMPLEMENTATIONS}
    # Products run by Triton's interpreter on a CPU keep to it.
    takes_cuda = x.device.type == "cuda" and serves(op, ways["native"], x)
    return ways["native" if takes_cuda else "triton"]


def refuse_quantising(dtype: torch.dtype, x: Tensor) -> str | None:
    """Return why no kernel makes rows of `dtype` from x, or None."""
    return None if quantising(dtype, x).name == "native" else refuse_triton([x], FLOATS)


def quantise_rows(
    dtype: torch.dtype,
    x: Tensor,
    block: int | None = None,
    smooth: Tensor | None = None,
    rotate: int = 0,
    down: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return (q, scale) of the rows of x, with `down` (q, scale, low)."""
    blocks = () if dtype == torch.int8 else (block,)
    return quantising(dtype, x).run(x, *blocks, smooth, rotate, down)
