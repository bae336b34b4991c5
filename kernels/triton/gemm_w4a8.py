"""gemm_w4a8 in Triton: gemm_w8a8 whose weight is folded from 4 to 8 bits on its way to the dots.

a [M, K] int8 with unit stride in K, w [N, K / 2] uint8 and w_scale [N, K / G] 16-bit contiguous,
a_scale [M] fp32, bias [N] floating or none, low [M, R] and up [N, R] contiguous or both none, gate
[G, N'] and residual [M, N'] with unit stride in N' or none, out [M, N'] contiguous.

Up to MANY rows the weight is folded in registers: a program computes a BLOCK_M x BLOCK_N tile of
out transposed, in steps of one group, and finds its rows' largest scales before. Transposed,
because Hopper's tensor cores take their left operand from registers and the right one only from
shared memory. Even and odd columns of a byte are interleaved, which moves bytes within a thread;
two dots instead, over the even and the odd columns of a, would read a with a stride of two bytes.

Folding takes some four instructions a weight and tile: on sm_90 they occupy the schedulers as long
as 128 rows do the tensor cores, and all else comes on top. So for more rows than MANY the weight is
folded once, to N x K int8 that live as long as the call, and gemm_w8a8's kernel does the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._gemm import GROUP, branch_block, end_steps, find_tile, finish_tile, weight_columns
from .gemm_w8a8 import launch_gemm_w8a8

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer, ties to even
SCALES = tl.constexpr(32)  # of a row that are looked at together for their maximum
MANY = 512


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
def _factors(s, top):
    """Return f in int32; 0 where the row has no largest scale, or an infinite one."""
    used = (top > 0.0) & (top < float("inf"))
    # div_rn: the plain division is approximate on GPUs, and every implementation has the same f.
    f = (4096.0 * tl.div_rn(s, tl.where(used, top, 1.0)) + ROUND) - ROUND
    return tl.where(used, f, 0.0).to(tl.int32)


@triton.jit
def _fold(packed, f):
    """Return w8 of bytes [..., G / 2], columns in order, as int8 [..., G / 2, 2].

    With q + 8, which is the four bits with the top one flipped, nothing needs its sign extended.
    """
    offset = 128 - 8 * f
    bits = packed.to(tl.int32)
    even = (((bits & 15) ^ 8) * f + offset) >> 8
    odd = (((bits >> 4) ^ 8) * f + offset) >> 8
    return tl.join(even.to(tl.int8), odd.to(tl.int8))


@triton.jit
def _fold_int4_kernel(
    w_ptr,
    w_scale_ptr,
    w8_ptr,
    top_ptr,
    N,
    groups,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write w8 [N, K] and the scale of each of its rows; a program takes BLOCK_N of them."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_n, N - 1).to(tl.int64)
    top = _largest_scale(w_scale_ptr + rows * groups, groups, BLOCK_N)
    tl.store(top_ptr + offs_n, top * 0.0625, mask=offs_n < N)
    offs, offs_k = tl.arange(0, G // 2), tl.arange(0, STEP * G)
    for start in range(0, groups, STEP):
        group = start + tl.arange(0, STEP)
        inside = (group < groups)[None, :]
        at = rows[:, None] * groups + group[None, :]
        f = _factors(tl.load(w_scale_ptr + at, mask=inside, other=0.0).to(tl.float32), top[:, None])
        ptrs = w_ptr + at[:, :, None] * (G // 2) + offs[None, None, :]
        packed = tl.load(ptrs, mask=inside[:, :, None], other=0)
        w8 = _fold(packed, f[:, :, None]).reshape(BLOCK_N, STEP * G)
        k = start * G + offs_k
        mask = (offs_n < N)[:, None] & (k < groups * G)[None, :]
        tl.store(w8_ptr + rows[:, None] * (groups * G) + k[None, :], w8, mask=mask)


@triton.jit
def _gemm_w4a8_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    gate_ptr,
    residual_ptr,
    steps,
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
    ACTIVATION: tl.constexpr,
):
    offs_m, offs_n = find_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = weight_columns(offs_n, N, ACTIVATION, 8)
    groups = K // G
    s_ptrs = w_scale_ptr + columns * groups
    top = _largest_scale(s_ptrs, groups, BLOCK_N)
    a_ptrs = a_ptr + rows[None, :] * stride_am + tl.arange(0, G)[:, None]
    w_ptrs = w_ptr + columns[:, None] * (groups * (G // 2)) + tl.arange(0, G // 2)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for _ in range(0, groups):
        f = _factors(tl.load(s_ptrs).to(tl.float32), top)
        w = _fold(tl.load(w_ptrs), f[:, None]).reshape(BLOCK_N, G)
        acc = tl.dot(w, tl.load(a_ptrs), acc, out_dtype=tl.int32)
        s_ptrs += 1
        a_ptrs += G
        w_ptrs += G // 2
    a_scale = tl.load(a_scale_ptr + rows)
    out = acc.to(tl.float32) * a_scale[None, :] * (top * 0.0625)[:, None]
    finish_tile(
        out,
        (offs_m, offs_n),
        columns,
        bias_ptr,
        (low_ptr, up_ptr),
        R,
        (M, N),
        gate_ptr,
        residual_ptr,
        steps,
        out_ptr,
        BLOCK_R,
        ACTIVATION,
        True,
    )


def launch_gemm_w4a8(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out`; shapes as in the module docstring, none of M and N zero."""
    (M, K), N = a.shape, w.shape[0]
    G = K // w_scale.shape[1] if K else 32
    if M > MANY:
        w8, top = w.new_empty((N, K), dtype=torch.int8), w.new_empty(N, dtype=torch.float32)
        _fold_int4_kernel[(triton.cdiv(N, 8),)](
            w, w_scale, w8, top, N, w_scale.shape[1], G=G, BLOCK_N=8, STEP=1024 // G, num_warps=4
        )
        end = (activation, gate, residual, out)
        launch_gemm_w8a8(a, a_scale, w8, top, bias, low, up, *end)
        return
    block_m, block_n = (16 if M <= 16 else 64 if M <= 64 else 128), 64
    _gemm_w4a8_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        a,
        a_scale,
        w,
        w_scale,
        bias,
        low,
        up,
        *end_steps(gate, residual, M),
        out,
        M,
        N,
        K,
        0 if up is None else up.shape[1],
        a.stride(0),
        G=G,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=branch_block(low, up),
        GROUP=GROUP,
        ACTIVATION=activation,
        num_warps=4,
        num_stages=4,
    )
