"""cache_metric in Triton: one program per (chunk of 16,384 elements, sample), then one per sample.

x, y, previous, residual [B, R, C] with unit stride in C; partials [B, chunks, 2] fp64; metric [B]
or [1]. The second kernel adds the chunks in a fixed order, so two runs agree bitwise.
"""

from __future__ import annotations

from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow

CHUNK = 16384
BLOCK = 1024


@triton.jit
def _cache_metric_kernel(
    x_ptr,
    y_ptr,
    previous_ptr,
    residual_ptr,
    partials_ptr,
    stride_xb,
    stride_xr,
    stride_yb,
    stride_yr,
    stride_pb,
    stride_pr,
    stride_rb,
    stride_rr,
    elements,
    columns,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_PREVIOUS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    # One axis of programs: the others hold 65,535, fewer than a batch may.
    chunks = tl.cdiv(elements, CHUNK)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    b = (tl.program_id(0) // chunks).to(tl.int64)
    change = tl.zeros([BLOCK], tl.float32)
    scale = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CHUNK, BLOCK):
        offs = chunk * CHUNK + start + tl.arange(0, BLOCK)
        mask = offs < elements
        row, col = offs // columns, offs % columns
        x = tl.load(x_ptr + b * stride_xb + row * stride_xr + col, mask=mask, other=0.0)
        y = tl.load(y_ptr + b * stride_yb + row * stride_yr + col, mask=mask, other=0.0)
        x, y = x.to(tl.float32), y.to(tl.float32)
        r = x - y
        if HAS_PREVIOUS:
            p = tl.load(previous_ptr + b * stride_pb + row * stride_pr + col, mask=mask, other=0.0)
            p = p.to(tl.float32)
            change += tl.abs(r - p)
            scale += tl.abs(p)
        else:
            change += tl.abs(r)
            scale += tl.abs(y)
        if HAS_RESIDUAL:
            out = residual_ptr + b * stride_rb + row * stride_rr + col
            tl.store(out, narrow(r, residual_ptr.dtype.element_ty), mask=mask)
    out = partials_ptr + (b * chunks + chunk) * 2
    tl.store(out, tl.sum(change, 0).to(tl.float64))
    tl.store(out + 1, tl.sum(scale, 0).to(tl.float64))


@triton.jit
def _cache_metric_finish_kernel(partials_ptr, metric_ptr, chunks, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    change = tl.zeros([BLOCK], tl.float64)
    scale = tl.zeros([BLOCK], tl.float64)
    for start in range(0, chunks, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < chunks
        base = partials_ptr + (row * chunks + offs) * 2
        change += tl.load(base, mask=mask, other=0.0)
        scale += tl.load(base + 1, mask=mask, other=0.0)
    numerator, denominator = tl.sum(change, 0), tl.sum(scale, 0)
    # 0 / 0 is 0 by contract; the denominator is replaced first so that no NaN is ever formed.
    safe = tl.where(numerator == 0.0, 1.0, denominator)
    tl.store(metric_ptr + row, (numerator / safe).to(tl.float32))


def launch_cache_metric(
    x: Tensor,
    y: Tensor,
    previous: Tensor | None,
    residual: Tensor | None,
    partials: Tensor,
    metric: Tensor,
) -> None:
    """Fill `metric` and, if given, `residual`; shapes as in the module docstring."""
    elements = x.shape[1] * x.shape[2]
    if x.numel():
        p = x if previous is None else previous
        r = x if residual is None else residual
        _cache_metric_kernel[(triton.cdiv(elements, CHUNK) * x.shape[0],)](
            x,
            y,
            p,
            r,
            partials,
            *x.stride()[:2],
            *y.stride()[:2],
            *p.stride()[:2],
            *r.stride()[:2],
            elements,
            x.shape[2],
            CHUNK=CHUNK,
            BLOCK=BLOCK,
            HAS_PREVIOUS=previous is not None,
            HAS_RESIDUAL=residual is not None,
        )
    rows = metric.shape[0]
    if rows:
        chunks = partials.numel() // 2 // rows
        _cache_metric_finish_kernel[(rows,)](partials, metric, chunks, BLOCK=256)
