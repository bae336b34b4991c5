"""gemm_w4a16 in Triton: one pass over the weight without dots for a row or two, else tiles of dots.

x [M, K] with unit stride in K, w [N, K / 2] uint8 and w_scale [N, K / G] 16-bit contiguous, bias
[N] floating or none, low [M, R] and up [N, R] contiguous or both none, gate [G, N'] and residual
[M, N'] with unit stride in N' or none, out [M, N'] contiguous.

Without dots: a program takes BLOCK_N columns of out over all of K, PARTS x 16 bytes of each row of
the weight at a time. A thread multiplies the 16 bytes of one load by their 32 x, which lie in one
group, in float32 and scales the sum; threads meet once, at the end. The order of the sums is fixed.

With dots: out transposed, [BLOCK_N, BLOCK_M], in steps of one group. q is exact in x's dtype, so
the tensor cores multiply q by x; each group's sums are scaled in float32 as they are added up. To
round q s to x's dtype would cost accuracy, and float16 its range.

Compiled for sm_90 the first kernel takes 6 instructions a weight for one row, 8 for two and 29 for
eight; the second takes 10 for up to 16 rows. float32 has no tensor cores at this accuracy, so there
the first serves up to 8 rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import dot
from ._gemm import (
    GROUP,
    activate,
    branch_block,
    end_steps,
    find_tile,
    finish_tile,
    store_end,
    weight_columns,
)

PARTS = 32  # of 16 bytes, that a program takes of a row at a time
GEMV_WARPS = 4


def gemv_columns(M: int) -> int:
    """Return how many columns of out a program takes without dots: as many as registers hold."""
    return 16 if M == 1 else 8 if M == 2 else 4


@triton.jit
def _nibbles(packed):
    """Return q of the even column of each byte and 16 q of the odd one, as float32.

    From the bits of 2^23 + (q + 8) and 2^23 + 16 (q + 8): conversions run at half the rate.
    """
    bits = packed.to(tl.int32)
    even = ((bits & 0x0F) ^ 0x4B000008).to(tl.float32, bitcast=True)
    odd = ((bits & 0xF0) ^ 0x4B000080).to(tl.float32, bitcast=True)
    return even - 8388616.0, odd - 8388736.0


@triton.jit
def gemv_sums(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    columns,
    K,
    stride_xm,
    M: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Return sum_k x_mk q_nk s_ng for the columns n: a vector for each of M rows."""
    parts = tl.arange(0, PARTS)  # of 32 columns of the weight
    count = K // 32
    w_ptrs = w_ptr + columns[:, None, None] * (count * 16) + tl.arange(0, 16)[None, None, :]
    s_ptrs = w_scale_ptr + columns[:, None] * (K // G)
    sums = ()
    for _ in tl.static_range(M):
        sums += (tl.zeros([BLOCK_N, PARTS], tl.float32),)
    for start in range(0, count, PARTS):
        part = start + parts
        inside = part < count
        packed = tl.load(w_ptrs + part[None, :, None] * 16, mask=inside[None, :, None], other=0)
        s = tl.load(s_ptrs + (part // (G // 32))[None, :], mask=inside[None, :], other=0.0)
        even, odd = _nibbles(packed)
        added = ()
        for m in tl.static_range(M):
            x_ptrs = x_ptr + m * stride_xm + part[:, None] * 32 + 2 * tl.arange(0, 16)[None, :]
            x_even = tl.load(x_ptrs, mask=inside[:, None], other=0.0).to(tl.float32)
            x_odd = tl.load(x_ptrs + 1, mask=inside[:, None], other=0.0).to(tl.float32)
            products = even * x_even[None, :, :] + odd * (x_odd * 0.0625)[None, :, :]
            added += (sums[m] + tl.sum(products, 2) * s.to(tl.float32),)
        sums = added
    outs = ()
    for m in tl.static_range(M):
        outs += (tl.sum(sums[m], 1),)
    return outs


@triton.jit
def _gemv_w4a16_kernel(
    x_ptr,
    w_ptr,
    w_scale_ptr,
    bias_ptr,
    low_ptr,
    up_ptr,
    gate_ptr,
    residual_ptr,
    steps,
    out_ptr,
    N,
    K,
    R,
    stride_xm,
    M: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = weight_columns(offs_n, N, ACTIVATION, 1)  # past the end: computed and not stored
    sums = gemv_sums(x_ptr, w_ptr, w_scale_ptr, columns, K, stride_xm, M, G, BLOCK_N, PARTS)
    for m in tl.static_range(M):
        out = sums[m]
        if bias_ptr is not None:
            out += tl.load(bias_ptr + columns).to(tl.float32)
        if BLOCK_R > 0:
            offs = tl.arange(0, BLOCK_R)
            for start in range(0, R, BLOCK_R):
                r = start + offs
                low = tl.load(low_ptr + m * R + r, mask=r < R, other=0.0).to(tl.float32)
                up_ptrs = up_ptr + columns[:, None] * R + r[None, :]
                up = tl.load(up_ptrs, mask=(r < R)[None, :], other=0.0).to(tl.float32)
                out += tl.sum(up * low[None, :], 1)
        n = offs_n
        if ACTIVATION == "geglu" or ACTIVATION == "swiglu":
            value, switch = tl.split(out.reshape(BLOCK_N // 2, 2))
            out = value * activate(switch, ACTIVATION)
            n = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        elif ACTIVATION is not None:
            out = activate(out, ACTIVATION)
        row = tl.full([1], m, tl.int32)
        store_end(out, row, n, M, N, gate_ptr, residual_ptr, steps, out_ptr, ACTIVATION)


@triton.jit
def _gemm_w4a16_kernel(
    x_ptr,
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
    stride_xm,
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
    x_ptrs = x_ptr + rows[None, :] * stride_xm + tl.arange(0, G)[:, None]
    w_ptrs = w_ptr + columns[:, None] * (groups * (G // 2)) + tl.arange(0, G // 2)[None, :]
    out = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for _ in range(0, groups):
        even, odd = _nibbles(tl.load(w_ptrs))
        q = tl.join(even, odd * 0.0625).reshape(BLOCK_N, G).to(x_ptr.dtype.element_ty)  # exact
        sums = dot(q, tl.load(x_ptrs), tl.zeros([BLOCK_N, BLOCK_M], tl.float32))
        out += sums * tl.load(s_ptrs).to(tl.float32)[:, None]
        s_ptrs += 1
        x_ptrs += G
        w_ptrs += G // 2
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


def launch_gemm_w4a16(
    x: Tensor,
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
    (M, K), N = x.shape, w.shape[0]
    tensors = (x, w, w_scale, bias, low, up, *end_steps(gate, residual, M), out)
    sizes = (N, K, 0 if up is None else up.shape[1], x.stride(0))
    G, block_r = K // w_scale.shape[1] if K else 32, branch_block(low, up)
    few = 8 if x.dtype == torch.float32 else 2
    if few >= M:
        block_n = gemv_columns(M)
        _gemv_w4a16_kernel[(triton.cdiv(N, block_n),)](
            *tensors,
            *sizes,
            M=M,
            G=G,
            BLOCK_N=block_n,
            PARTS=PARTS,
            BLOCK_R=block_r,
            ACTIVATION=activation,
            num_warps=GEMV_WARPS,
        )
        return
    if x.dtype == torch.float32:  # without tensor cores: a product is unrolled in registers
        block_m, block_n, warps = 16, 32, 4
    elif M <= 64:
        block_m, block_n, warps = (16 if M <= 16 else 64), 64, 4
    else:
        block_m, block_n, warps = 128, 128, 8
    _gemm_w4a16_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        *tensors,
        M,
        *sizes,
        G=G,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        GROUP=GROUP,
        ACTIVATION=activation,
        num_warps=warps,
        num_stages=3,
    )
