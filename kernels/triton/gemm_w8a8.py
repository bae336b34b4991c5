"""gemm_w8a8 in Triton: one program per BLOCK_M x BLOCK_N tile of out, int8 dots into int32.

The same kernel is gemm_fp8's, on the bits of e4m3 operands with float32 sums.

a [M, K] int8 with unit stride in K, w [N, K] int8 with any strides, a_scale [M] and w_scale [N]
fp32, bias [N] floating or none, out [M, N] contiguous. low [M, R] and up [N, R], contiguous or both
none: the branch is added to the scaled sums in their registers, by tensor cores if both have one
16-bit dtype.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present
from ._gemm import GROUP, add_branch, branch_block, dot_e4m3, find_tile


@triton.jit
def _gemm_w8a8_kernel(
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
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
):
    offs_m, offs_n = find_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = tl.minimum(offs_n, N - 1).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * stride_am + offs_k[None, :]
    w_ptrs = w_ptr + columns[None, :] * stride_wn + offs_k[:, None].to(tl.int64) * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if E4M3 else tl.int32)
    for start in range(0, K, BLOCK_K):
        if EVEN_K:
            a = tl.load(a_ptrs)
            w = tl.load(w_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(start + offs_k < K)[None, :], other=0)
            w = tl.load(w_ptrs, mask=(start + offs_k < K)[:, None], other=0)
        acc = dot_e4m3(a, w, acc, NATIVE) if E4M3 else tl.dot(a, w, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    a_scale = tl.load(a_scale_ptr + rows)
    w_scale = tl.load(w_scale_ptr + columns)
    out = acc.to(tl.float32) * a_scale[:, None] * w_scale[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + columns).to(tl.float32)[None, :]
    if BLOCK_R > 0:
        out = add_branch(out, low_ptr, rows, up_ptr, columns, R, BLOCK_R)
    ptrs = out_ptr + offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(ptrs, narrow(out, out_ptr.dtype.element_ty), mask=mask)


def launch_gemm_w8a8(
    a: Tensor,
    a_scale: Tensor,
    w: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    out: Tensor,
    *,
    e4m3: bool = False,
    native: bool = False,
) -> None:
    """Fill `out`; shapes as in the module docstring, none of M and N zero.

    With `e4m3` a and w are uint8, and `native` says whether the machine multiplies such operands.
    """
    (M, K), N = a.shape, w.shape[0]
    block_m = 16 if M <= 16 else 64 if M <= 64 else 128
    block_n, block_k = (64, 128) if M <= 64 else (128, 128)
    _gemm_w8a8_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
        a,
        a_scale,
        w,
        w_scale,
        *present(w_scale, bias, low, up),
        out,
        M,
        N,
        K,
        0 if up is None else up.shape[1],
        a.stride(0),
        *w.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=branch_block(low, up),
        GROUP=GROUP,
        EVEN_K=K % block_k == 0,
        HAS_BIAS=bias is not None,
        E4M3=e4m3,
        NATIVE=native,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3,
    )
