"""gemm_w4a8 in Triton: gemm_w8a8 whose weight is folded from 4 to 8 bits on its way to the dots.

a [M, K] int8 with unit stride in K, w [N, K / 2] uint8 and w_scale [N, K / G] 16-bit contiguous,
a_scale [M] fp32, bias [N] floating or none, low [M, R] and up [N, R] contiguous or both none, out
[M, N] contiguous. A program computes a BLOCK_M x BLOCK_N tile of out transposed, in steps of one
group of K, and finds its rows' largest scales before.

Transposed, because Hopper's tensor cores take their left operand from registers, where the folded
weight is made, and the right one only from shared memory. Both columns of a byte pass through one
multiplication, as q + 8 in the halves of a word:

    (q + 8) f + (128 - 8 f) + 2^15 = (q f + 128) + 2^15              in [0, 2^16)

so the halves never carry into each other; the upper byte of each, its top bit flipped, is w8. Even
and odd columns are then interleaved, which moves bytes within a thread: two dots instead, over the
even and the odd columns of a, would read a with a stride of two bytes.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present
from ._gemm import GROUP, add_branch, branch_block, find_tile

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
SCALES = tl.constexpr(32)  # of a row that are looked at together for their maximum


@triton.jit
def _largest_scale(ptrs, groups, BLOCK_N: tl.constexpr):
    """Return each row's largest scale, NaN where it has a NaN."""
    offs = tl.arange(0, SCALES)
    top = tl.zeros([BLOCK_N], tl.float32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for start in range(0, groups, SCALES):
        inside = (start + offs < groups)[None, :]
        s = tl.load(ptrs[:, None] + start + offs[None, :], mask=inside, other=0.0).to(tl.float32)
        bad |= tl.max((s != s).to(tl.int32), 1)  # maxima may drop a NaN
        top = tl.maximum(top, tl.max(tl.where(s == s, s, 0.0), 1))
    return tl.where(bad == 0, top, float("nan"))


@triton.jit
def _gemm_w4a8_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    K,
    R,
    stride_am,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    offs_m, offs_n = find_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = tl.minimum(offs_n, N - 1).to(tl.int64)
    groups = K // G
    s_ptrs = w_scale_ptr + columns * groups
    top = _largest_scale(s_ptrs, groups, BLOCK_N)
    used = (top > 0.0) & (top < float("inf"))  # elsewhere f is 0
    divisor = tl.where(used, top, 1.0)
    a_ptrs = a_ptr + rows[None, :] * stride_am + tl.arange(0, G)[:, None]
    w_ptrs = w_ptr + columns[:, None] * (K // 2) + tl.arange(0, G // 2)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for _ in range(0, groups):
        s = tl.load(s_ptrs).to(tl.float32)
        # div_rn: the plain division is approximate on GPUs, and every implementation has the same f.
        f = (4096.0 * tl.div_rn(s, divisor) + ROUND) - ROUND
        f = tl.where(used, f, 0.0).to(tl.int32)
        pairs = tl.load(w_ptrs).to(tl.int32)
        pairs = ((pairs * 0x1001) & 0x000F000F) ^ 0x00080008
        pairs = pairs * f[:, None] + ((32768 + 128 - 8 * f) * 0x10001)[:, None]
        pairs ^= -0x7FFF8000
        w = tl.join((pairs >> 8).to(tl.int8), (pairs >> 24).to(tl.int8)).reshape(BLOCK_N, G)
        acc = tl.dot(w, tl.load(a_ptrs), acc, out_dtype=tl.int32)
        s_ptrs += 1
        a_ptrs += G
        w_ptrs += G // 2
    a_scale = tl.load(a_scale_ptr + rows)
    out = acc.to(tl.float32) * a_scale[None, :] * (top * 0.0625)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns).to(tl.float32)[:, None]
    if BLOCK_R > 0:
        out = add_branch(out, up_ptr, columns, low_ptr, rows, R, BLOCK_R)
    ptrs = out_ptr + offs_m[None, :].to(tl.int64) * N + offs_n[:, None]
    mask = (offs_m < M)[None, :] & (offs_n < N)[:, None]
    tl.store(ptrs, narrow(out, out_ptr.dtype.element_ty), mask=mask)


def launch_gemm_w4a8(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`; shapes as in the module docstring, none of M and N zero."""
    (M, K), N = a.shape, w.shape[0]
    block_m, block_n, warps = (16, 64, 4) if M <= 16 else (64, 64, 4) if M <= 64 else (128, 128, 8)
    _gemm_w4a8_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        a,
        a_scale,
        w,
        w_scale,
        *present(a_scale, bias, low, up),
        out,
        M,
        N,
        K,
        0 if up is None else up.shape[1],
        a.stride(0),
        G=K // w_scale.shape[1] if K else 32,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=branch_block(low, up),
        GROUP=GROUP,
        HAS_BIAS=bias is not None,
        num_warps=warps,
        num_stages=4,
    )
