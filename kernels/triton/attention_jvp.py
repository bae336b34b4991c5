"""attention_jvp in Triton: one program per tile of BLOCK_M queries of one head.

    S  = scale q k^T                      tS = scale (t_q k^T + q t_k^T)
    m' = max(m, rowmax S)                 alpha = exp(m - m')
    P  = exp(S - m')                      H = P (tS - c)
    l  = alpha l + rowsum P               r = alpha r + rowsum H
    O  = alpha O + P v                    T = alpha T + P t_v + H v
    o  = O / l    mu = c + r / l    t_o = T / l - (r / l) o    lse = m + log l

for each tile of BLOCK_N keys; c is the mean of tS under P over the first tile, so that a tangent
component common to all keys never enters H. Two fp32 accumulators, [BLOCK_M, BLOCK_DV] each: two
of 256 columns don't fit the registers, so wide values are split over programs, which repeat the
scores.
P and H are rounded to v's dtype for the second pair of products. Exponentials are to base 2.

One loop takes the ragged last tile and the first one too. Peeling them, and branching there, was
tried: the compiler then spills (72 to 720 bytes a thread for head dims over 64).

q, t_q [B, H, Nq, D], k, t_k [B, H, Nk, D], v, t_v [B, H, Nk, Dv], o, t_o [B, H, Nq, Dv]: any
strides with unit stride in the last axis; lse, mu [B, H, Nq] contiguous fp32. Head dims are padded
to the next power of two in registers only: loads and stores are masked. Strides are passed in units
of UNIT elements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import dot, narrow

MAX_BLOCK_DV = 128
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@dataclass(frozen=True)
class TileConfig:
    """Tile sizes and launch options for head dims up to `head_dim`."""

    head_dim: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# By the larger padded head dim. Compiled with Triton 3.9 for sm_90 they need at most 254 registers
# without spilling and 229,376 bytes of shared memory; the times are not measured on a GPU yet.
CONFIGS_SM90 = (
    TileConfig(64, 128, 64, 8, 3),
    TileConfig(128, 128, 64, 8, 2),
    TileConfig(256, 128, 32, 8, 2),
)
# Older cards have 99 to 163 KB of shared memory, and keep q and t_q in registers.
CONFIGS = (
    TileConfig(64, 128, 64, 8, 2),
    TileConfig(128, 128, 32, 8, 2),
    TileConfig(256, 64, 32, 8, 2),
)


def choose_config(device: torch.device, padded: int) -> TileConfig:
    """Return the configuration for a head dim of `padded` (a power of two)."""
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    table = CONFIGS_SM90 if hopper else CONFIGS
    return next(config for config in table if padded <= config.head_dim)


@triton.jit
def _load_rows(
    base,
    stride,
    offs,
    n,
    cols,
    d: tl.constexpr,
    MASK_N: tl.constexpr,
    MASK_D: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Return rows `offs` and columns `cols` of a [n, d] matrix; zero outside of it."""
    pointers = base + offs[:, None].to(tl.int64) * stride * UNIT + cols[None, :]
    if MASK_N and MASK_D:
        return tl.load(pointers, mask=(offs[:, None] < n) & (cols[None, :] < d), other=0.0)
    if MASK_N:
        return tl.load(pointers, mask=offs[:, None] < n, other=0.0)
    if MASK_D:
        return tl.load(pointers, mask=cols[None, :] < d, other=0.0)
    return tl.load(pointers)


@triton.jit
def _attend_keys(
    state,
    queries,
    k_base,
    v_base,
    t_k_base,
    t_v_base,
    stride_kn,
    stride_vn,
    stride_tkn,
    stride_tvn,
    start,
    nk,
    scale,
    first_dv,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
):
    """Take one tile of keys into the row statistics and accumulators; m is in units of log 2."""
    m_i, l_i, r_i, c_i, o, t_o = state
    q, t_q = queries
    offs_n = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, D_PAD)
    cols_v = first_dv + tl.arange(0, BLOCK_DV)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)

    k = _load_rows(k_base, stride_kn, offs_n, nk, cols, D, not EVEN_N, D != D_PAD, UNIT)
    s = dot(q, tl.trans(k), zeros) * (scale * LOG2E)
    t_s = zeros
    if HAS_TQ:
        t_s = dot(t_q, tl.trans(k), t_s)
    if HAS_TK:
        t_k = _load_rows(t_k_base, stride_tkn, offs_n, nk, cols, D, not EVEN_N, D != D_PAD, UNIT)
        t_s = dot(q, tl.trans(t_k), t_s)
    t_s *= scale
    # Masks and biases act here: on S and tS, before the statistics are taken.
    if not EVEN_N:
        s = tl.where(offs_n[None, :] < nk, s, -float("inf"))

    m_new = tl.maximum(m_i, tl.max(s, 1))
    alpha = tl.exp2(m_i - m_new)
    p = tl.exp2(s - m_new[:, None])
    l_i = l_i * alpha + tl.sum(p, 1)
    o = o * alpha[:, None]
    v = _load_rows(v_base, stride_vn, offs_n, nk, cols_v, DV, not EVEN_N, DV % BLOCK_DV != 0, UNIT)
    p_low = narrow(p, v.dtype)
    o = dot(p_low, v, o)
    if HAS_TQ or HAS_TK or HAS_TV:
        t_o = t_o * alpha[:, None]
    if HAS_TV:
        t_v = _load_rows(
            t_v_base, stride_tvn, offs_n, nk, cols_v, DV, not EVEN_N, DV % BLOCK_DV != 0, UNIT
        )
        t_o = dot(p_low, t_v, t_o)
    if HAS_TQ or HAS_TK:
        # Set in the first tile, by a select rather than a branch, which would break the pipeline.
        c_i = tl.where(start == 0, tl.sum(p * t_s, 1) / l_i, c_i)
        h = p * (t_s - c_i[:, None])
        r_i = r_i * alpha + tl.sum(h, 1)
        t_o = dot(narrow(h, v.dtype), v, t_o)
    return m_new, l_i, r_i, c_i, o, t_o


@triton.jit
def _attention_jvp_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    t_q_ptr,
    t_k_ptr,
    t_v_ptr,
    o_ptr,
    t_o_ptr,
    lse_ptr,
    mu_ptr,
    stride_qb,
    stride_qh,
    stride_qm,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_tqb,
    stride_tqh,
    stride_tqm,
    stride_tkb,
    stride_tkh,
    stride_tkn,
    stride_tvb,
    stride_tvh,
    stride_tvn,
    stride_ob,
    stride_oh,
    stride_om,
    stride_tob,
    stride_toh,
    stride_tom,
    heads,
    nq,
    nk,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    EVEN_N: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
):
    # Tiles of one head are neighbours, so that its keys and values stay in the L2 cache.
    tiles = tl.cdiv(nq, BLOCK_M)
    first_dv = tl.program_id(1) * BLOCK_DV
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, D_PAD)

    q_base = q_ptr + (b * stride_qb + h * stride_qh) * UNIT
    q = _load_rows(q_base, stride_qm, offs_m, nq, cols, D, True, D != D_PAD, UNIT)
    t_q = q
    if HAS_TQ:
        t_q_base = t_q_ptr + (b * stride_tqb + h * stride_tqh) * UNIT
        t_q = _load_rows(t_q_base, stride_tqm, offs_m, nq, cols, D, True, D != D_PAD, UNIT)
    queries = (q, t_q)
    k_base = k_ptr + (b * stride_kb + h * stride_kh) * UNIT
    v_base = v_ptr + (b * stride_vb + h * stride_vh) * UNIT
    t_k_base = t_k_ptr + (b * stride_tkb + h * stride_tkh) * UNIT
    t_v_base = t_v_ptr + (b * stride_tvb + h * stride_tvh) * UNIT

    state = (
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
    )
    for start in range(0, nk, BLOCK_N):
        state = _attend_keys(
            state, queries, k_base, v_base, t_k_base, t_v_base,
            stride_kn, stride_vn, stride_tkn, stride_tvn, start, nk, scale, first_dv,
            BLOCK_M, BLOCK_N, BLOCK_DV, D, DV, D_PAD, UNIT, EVEN_N, HAS_TQ, HAS_TK, HAS_TV,
        )  # fmt: skip
    m_i, l_i, r_i, c_i, o, t_o = state

    mask_m = offs_m < nq
    stats = head * nq + offs_m
    ratio = r_i / l_i
    if first_dv == 0:
        tl.store(lse_ptr + stats, m_i * LN2 + tl.log(l_i), mask=mask_m)
        tl.store(mu_ptr + stats, c_i + ratio, mask=mask_m)
    o = o / l_i[:, None]
    t_o = t_o / l_i[:, None] - ratio[:, None] * o
    cols_v = first_dv + tl.arange(0, BLOCK_DV)
    mask = mask_m[:, None] & (cols_v[None, :] < DV)
    rows = offs_m[:, None].to(tl.int64) * UNIT
    o_base = o_ptr + (b * stride_ob + h * stride_oh) * UNIT
    t_o_base = t_o_ptr + (b * stride_tob + h * stride_toh) * UNIT
    dtype = o_ptr.dtype.element_ty
    tl.store(o_base + rows * stride_om + cols_v[None, :], narrow(o, dtype), mask=mask)
    tl.store(t_o_base + rows * stride_tom + cols_v[None, :], narrow(t_o, dtype), mask=mask)


def launch_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    o: Tensor,
    t_o: Tensor,
    lse: Tensor,
    mu: Tensor,
    scale: float,
    config: TileConfig | None = None,
) -> None:
    """Fill o, t_o, lse and mu; shapes as in the module docstring. `config` is for tuning."""
    b, h, nq, d = q.shape
    nk, dv = v.shape[2:]
    if nk == 0:
        for out, value in ((o, 0.0), (t_o, 0.0), (lse, -float("inf")), (mu, 0.0)):
            out.fill_(value)
        return
    if b * h * nq == 0:
        return
    # tl.dot takes at least 16 columns.
    d_pad, dv_pad = (max(16, triton.next_power_of_2(x)) for x in (d, dv))
    config = config or choose_config(q.device, max(d_pad, dv_pad))
    block_dv = min(dv_pad, MAX_BLOCK_DV)
    grid = (triton.cdiv(nq, config.block_m) * b * h, triton.cdiv(dv, block_dv))
    inputs = (q, k, v, *(x if x is not None else y for x, y in ((t_q, q), (t_k, k), (t_v, v))))
    strides = [stride for x in (*inputs, o, t_o) for stride in x.stride()[:3]]
    # The compiler only learns of divisibility by 16; head dims like 72 need to be known as 9 * 8
    # for 16-byte accesses.
    unit = 8 if all(stride % 8 == 0 for stride in strides) else 1
    strides = [stride // unit for stride in strides]
    _attention_jvp_fwd_kernel[grid](
        *inputs,
        o,
        t_o,
        lse,
        mu,
        *strides,
        h,
        nq,
        nk,
        scale,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_DV=block_dv,
        D=d,
        DV=dv,
        D_PAD=d_pad,
        UNIT=unit,
        EVEN_N=nk % config.block_n == 0,
        HAS_TQ=t_q is not None,
        HAS_TK=t_k is not None,
        HAS_TV=t_v is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
