"""quantize_int4 in Triton: a program takes BLOCK groups of the weight, each read once.

w [N, K] with unit stride in K, q [N, K / 2] uint8 and scale [N, K / G] bf16 contiguous. A group of
G values stays in registers between its maximum and its rounding; then pairs of neighbours are
split apart and each becomes a byte. A rotation takes neighbouring groups, which a program has
together.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow
from ._prologue import rotate_blocks

TINY = tl.constexpr(2.0**-126)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
BLOCK = 32


@triton.jit
def _quantize_int4_kernel(
    w_ptr,
    q_ptr,
    scale_ptr,
    stride_wn,
    groups,
    total,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    B: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # groups, over all rows
    inside = i < total
    starts = w_ptr + (i // groups) * stride_wn + (i % groups) * G
    w = tl.load(starts[:, None] + tl.arange(0, G)[None, :], mask=inside[:, None], other=0.0)
    w = w.to(tl.float32)
    if B > 0:
        w = rotate_blocks(w, BLOCK * G, B).reshape(BLOCK, G)
    # NaN compares false, so it counts with the infinities; maxima may drop it.
    finite = tl.abs(w) < float("inf")
    ok = tl.min(finite.to(tl.int32), 1) == 1
    w = tl.where(finite, w, 0.0)
    amax = tl.max(tl.abs(w), 1)
    # div_rn: the plain division is approximate on GPUs, and all implementations agree to the bit.
    scale = narrow(tl.div_rn(amax, tl.full([BLOCK], 7.0, tl.float32)), tl.bfloat16)
    used = ok & (scale.to(tl.float32) >= TINY)
    divisor = tl.where(used, scale.to(tl.float32), 1.0)
    kept = tl.where(ok, tl.where(used, divisor, TINY), float("nan"))
    tl.store(scale_ptr + i, narrow(kept, tl.bfloat16), mask=inside)
    w = tl.where(used[:, None], w, 0.0)
    steps = (tl.div_rn(w, tl.broadcast_to(divisor[:, None], [BLOCK, G])) + ROUND) - ROUND
    q = tl.minimum(tl.maximum(steps, -8.0), 7.0).to(tl.int32)
    low, high = tl.split(q.reshape(BLOCK, G // 2, 2))
    packed = ((low & 15) | ((high & 15) << 4)).to(tl.uint8)
    ptrs = q_ptr + i[:, None] * (G // 2) + tl.arange(0, G // 2)[None, :]
    tl.store(ptrs, packed, mask=inside[:, None])


def launch_quantize_int4(w: Tensor, rotate: int, q: Tensor, scale: Tensor) -> None:
    """Fill `q` and `scale`; shapes as in the module docstring, at least one group."""
    total, groups = scale.numel(), scale.shape[1]
    _quantize_int4_kernel[(triton.cdiv(total, BLOCK),)](
        *(w, q, scale, w.stride(0), groups, total),
        G=w.shape[1] // groups,
        BLOCK=BLOCK,
        B=rotate,
    )
