"""gemv_w4a16_grouped in Triton: the programs of all problems in one launch.

x [X, M, K] with unit stride in K, X 1 or the number of problems; of each problem w [N, K / 2] uint8
from a multiple of 16 bytes on, w_scale [N, K / G] 16-bit, all of one dtype, bias [N] floating or
none, all contiguous; out [M * sum of N], problem after problem.

A program takes BLOCK_N columns of one problem, as gemm_w4a16's programs without dots do, by the
same function and in the same sizes, so its bits are theirs. It finds its problem by counting those
that begin at or before it, and reads where that one's tensors lie from a table of 64-bit numbers on
the device. The table is kept by the very numbers in it, so it can't be stale; a new one is made by
a copy from the host, which a CUDA graph can't hold: call once before the capture.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow
from .gemm_w4a16 import GEMV_WARPS, PARTS, gemv_columns, gemv_sums

_WORDS = tl.constexpr(6)  # of the table's rows: see _table


@triton.jit
def _gemv_w4a16_grouped_kernel(
    x_ptr,
    table_ptr,
    out_ptr,
    problems,
    K,
    stride_xg,
    stride_xm,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    offs_g = tl.arange(0, BLOCK_G)
    pid = tl.program_id(0)
    begins = tl.load(table_ptr + offs_g * _WORDS, mask=offs_g < problems, other=1 << 31)
    problem = tl.sum((begins <= pid).to(tl.int32), 0) - 1
    row = table_ptr + problem * _WORDS
    first = (pid - tl.load(row).to(tl.int32)) * BLOCK_N
    N = tl.load(row + 1).to(tl.int32)
    offset = tl.load(row + 2)
    w_ptr = tl.multiple_of(tl.load(row + 3).to(tl.pointer_type(tl.uint8)), 16)
    w_scale_ptr = tl.load(row + 4).to(tl.pointer_type(SCALE))
    bias_address = tl.load(row + 5)
    offs_n = first + tl.arange(0, BLOCK_N)
    columns = tl.minimum(offs_n, N - 1)  # past the end: computed and not stored
    sums = gemv_sums(
        x_ptr + problem.to(tl.int64) * stride_xg,
        w_ptr,
        w_scale_ptr,
        columns,
        K,
        stride_xm,
        M,
        G,
        BLOCK_N,
        PARTS,
    )
    if BIAS is not None:
        bias_ptrs = bias_address.to(tl.pointer_type(BIAS)) + columns
        here = columns >= tl.where(bias_address != 0, 0, N)
        bias = tl.load(bias_ptrs, mask=here, other=0.0).to(tl.float32)
    for m in tl.static_range(M):
        out = sums[m]
        if BIAS is not None:
            # Adding zero would turn -0 into 0.
            out = tl.where(here, out + bias, out)
        value = narrow(out, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offset + m * N + offs_n, value, mask=offs_n < N)


@functools.lru_cache(maxsize=64)
def _table(
    device: torch.device, M: int, widths: tuple[int, ...], memory: tuple[int, ...]
) -> Tensor:
    """Return a row per problem: its first program, N, where its outputs begin, w, w_scale, bias."""
    count = len(widths)
    programs = itertools.accumulate((triton.cdiv(N, gemv_columns(M)) for N in widths), initial=0)
    offsets = itertools.accumulate((M * N for N in widths), initial=0)
    parts = [memory[i * count : (i + 1) * count] for i in range(3)]
    rows = list(zip(programs, widths, offsets, *parts, strict=False))
    return torch.tensor(rows, dtype=torch.int64).to(device)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch_gemv_w4a16_grouped(
    x: Tensor,
    w: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    memory: Sequence[int],
    out: Tensor,
) -> None:
    """Fill `out`; shapes as in the module docstring, M not zero, bias all of one dtype.

    `memory` are the addresses of all w, all w_scale and all bias, 0 for none.
    """
    X, M, K = x.shape
    widths = tuple(t.shape[0] for t in w)
    table = _table(x.device, M, widths, tuple(memory))
    biased = [t.dtype for t in bias if t is not None]
    block_n = gemv_columns(M)
    _gemv_w4a16_grouped_kernel[(sum(triton.cdiv(N, block_n) for N in widths),)](
        x,
        table,
        out,
        len(w),
        K,
        x.stride(0) if X > 1 else 0,
        x.stride(1),
        SCALE=_DTYPES[w_scale[0].dtype],
        BIAS=_DTYPES[biased[0]] if biased else None,
        M=M,
        G=K // w_scale[0].shape[1] if K else 32,
        BLOCK_N=block_n,
        PARTS=PARTS,
        BLOCK_G=triton.next_power_of_2(len(w)),
        num_warps=GEMV_WARPS,
    )
