"""gemm_w8a8 in Triton: one program per BLOCK_M x BLOCK_N tile of out, int8 dots into int32.

The same kernel is gemm_fp8's, on the bits of e4m3 operands with float32 sums, which may have scales
for each 128 k: a step of the loop, whose products are then scaled as they are added.

a [M, K] int8 with unit stride in K, w [N, K] int8 with any strides, a_scale [M] and w_scale [N]
fp32, bias [N] floating or none. low [M, R] and up [N, R], contiguous or both none: the branch is
added to the scaled sums in their registers, by tensor cores if both have one 16-bit dtype. Gate
[G, N'] and residual [M, N'] with unit stride in N', or none; out [M, N'] contiguous: `_gemm.py` has
the end.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._gemm import (
    GROUP,
    branch_block,
    dot_e4m3,
    end_steps,
    find_tile,
    finish_tile,
    weight_columns,
)


@triton.jit
def _gemm_w8a8_kernel(
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
    stride_wn,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    E4M3: tl.constexpr,
    NATIVE: tl.constexpr,
    BLOCKS: tl.constexpr,
    SQUARES: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    offs_m, offs_n = find_tile(M, N, BLOCK_M, BLOCK_N, GROUP)
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = weight_columns(offs_n, N, ACTIVATION, 1)
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
        if BLOCKS:
            part = dot_e4m3(a, w, tl.zeros([BLOCK_M, BLOCK_N], tl.float32), NATIVE)
            block, blocks = start // BLOCK_K, tl.cdiv(K, BLOCK_K)
            part *= tl.load(a_scale_ptr + rows * blocks + block)[:, None]
            if SQUARES:
                part *= tl.load(w_scale_ptr + columns // BLOCK_K * blocks + block)[None, :]
            acc += part
        elif E4M3:
            acc = dot_e4m3(a, w, acc, NATIVE)
        else:
            acc = tl.dot(a, w, acc, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    out = acc.to(tl.float32)
    if not BLOCKS:
        out *= tl.load(a_scale_ptr + rows)[:, None]
    if not SQUARES:
        out *= tl.load(w_scale_ptr + columns)[None, :]
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
        False,
    )


def launch_gemm_w8a8(
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
    # Without more than a bias two programs share a multiprocessor, if neither takes more registers.
    bare = block_m == 128 and not e4m3 and all(x is None for x in (up, activation, gate, residual))
    shared = {"maxnreg": 128} if bare else {}
    _gemm_w8a8_kernel[(triton.cdiv(M, block_m) * triton.cdiv(N, block_n),)](
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
        *w.stride(),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        BLOCK_R=branch_block(low, up),
        GROUP=GROUP,
        EVEN_K=K % block_k == 0,
        E4M3=e4m3,
        NATIVE=native,
        BLOCKS=a_scale.dim() == 2,
        SQUARES=w_scale.dim() == 2,
        ACTIVATION=activation,
        num_warps=8 if block_m == 128 else 4,
        **shared,
        num_stages=3,
    )
