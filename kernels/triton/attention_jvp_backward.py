"""attention_jvp_backward in Triton: a kernel for the keys' side and one for the queries' side.

    P   = exp((S - lse) - lse_rest)         tP  = P (tS - mu)
    E0  = dt_o v^T - D0                     E1  = d_o v^T + dt_o t_v^T - D1
    dS0 = P E0                              dS1 = P E1 + tP E0
    dt_q = scale dS0 k                      d_q = scale (dS1 k + dS0 t_k)
    dt_k = scale dS0^T q                    d_k = scale (dS1^T q + dS0^T t_q)
    dt_v = P^T dt_o                         d_v = P^T d_o + tP^T dt_o

S, tS as in attention_jvp. All are products of dual numbers: (S, tS) of (q, t_q) and (k, t_k),
(dt_q, d_q) of (dS0, dS1) and (k, t_k), and so on.

Keys' side: a program owns BLOCK_N keys of one head of k and walks the queries of every head that
reads it; 12 products, four fp32 accumulators. Scores are made transposed, so that P^T and dS^T are
left factors. Queries' side: a program owns BLOCK_M queries and walks the keys; 9 products, two
accumulators. Scores are thus made twice, and in return nothing is added by two programs: one order
of summation, the same bits in every run. Wide heads take several launches, each for some of the
gradients, because all accumulators together don't fit the registers: up to 64 columns one for each
side (12 + 9 products), up to 128 three and one (8 + 3 + 6 and 9; with masks two, 8 + 3), above that
every gradient has its own (8 + 3 + 5 + 2 and 8 + 3).

P, tP, dS0 and dS1 are rounded to the storage type for the second products. What is absent (a
tangent, a cotangent, a gradient nobody needs) is None, and the code for it is not compiled.

q, t_q, d_q, dt_q [B, H, Nq, D], k ... [B, G, Nk, D], v ... [B, G, Nk, Dv], d_o, dt_o
[B, H, Nq, Dv]: any strides with unit stride in the last axis. lse, mu, lse_rest, D0, D1 [B, H, Nq]
contiguous fp32; lse_rest may be None.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._attention import (
    LOG2E,
    Masks,
    TileConfig,
    base_of,
    base_of_mask,
    find_tile,
    hide,
    is_hopper,
    load_rows,
    load_stat,
    mask_strides,
    power,
    safe_scale,
    seed,
    store_rows,
    strides_in_units,
    tile_count,
    visible_keys,
)
from ._common import dot, narrow, pad_head_dim

# By the larger padded head dim; the times are not measured on a GPU yet. One warpgroup: with two on
# 64 rows the tiles of scores go through shared memory, and much is spilled.
KEYS_SM90 = (
    TileConfig(64, 16, 64, 4, 2),
    TileConfig(128, 16, 64, 4, 2),
    TileConfig(256, 32, 64, 4, 1),
)
QUERIES_SM90 = (
    TileConfig(64, 64, 32, 4, 2),
    TileConfig(128, 64, 16, 4, 2),
    TileConfig(256, 64, 32, 4, 1),
)
# Older cards have 99 to 163 KB of shared memory.
CONFIGS = (
    TileConfig(64, 32, 32, 4, 2),
    TileConfig(128, 32, 32, 4, 1),
    TileConfig(256, 16, 16, 4, 1),
)
# Which of (d_k, dt_k, d_v, dt_v) and of (d_q, dt_q) share a launch, by the larger padded head dim.
KEYS_TOGETHER = {64: ((0, 1, 2, 3),), 128: ((0,), (1,), (2, 3)), 256: ((0,), (1,), (2,), (3,))}
QUERIES_TOGETHER = {64: ((0, 1),), 128: ((0, 1),), 256: ((0,), (1,))}
QUERIES_TOGETHER_MASKED = QUERIES_TOGETHER | {128: ((0,), (1,))}


@triton.jit
def _load_lse(ptr, first, offs, n, ADDITIVE: tl.constexpr):
    """Return lse in units of the scores; inf without keys and past the last row: P is 0."""
    lse = tl.load(ptr + first + offs, mask=offs < n, other=-float("inf"))
    if not ADDITIVE:
        lse *= LOG2E
    return tl.where(lse == -float("inf"), float("inf"), lse)


@triton.jit
def _weights(
    x,
    t_x,
    y,
    t_y,
    lse,
    rest,
    mu,
    mask_base,
    t_mask_base,
    masks_strides,
    offs_m,
    offs_n,
    nq,
    nk,
    scale,
    SHAPE: tl.constexpr,
    AXIS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN_N: tl.constexpr,
    ADDITIVE: tl.constexpr,
    NEED_TP: tl.constexpr,
):
    """Return (P, tP) of a tile with queries in rows (AXIS 1) or in columns (AXIS 0).

    x, t_x, y, t_y: factors of S, rows of the tile first. tP is P where it is not needed.
    """
    queries, keys = tl.expand_dims(offs_m, AXIS), tl.expand_dims(offs_n, 1 - AXIS)
    s = seed(mask_base, masks_strides[0], queries, keys, nq, nk, scale, -float("inf"), SHAPE)
    UNIT_OF_SCORES: tl.constexpr = 1.0 if ADDITIVE else LOG2E
    s = dot(x, tl.trans(y), s) * (scale * UNIT_OF_SCORES)
    s = hide(s, queries, keys, nk, CAUSAL, EVEN_N) - tl.expand_dims(lse, AXIS)
    if rest is not None:
        s -= tl.expand_dims(rest if ADDITIVE else rest * LOG2E, AXIS)
    p = power(s, ADDITIVE)
    t_p = p
    if NEED_TP:
        t_s = seed(t_mask_base, masks_strides[1], queries, keys, nq, nk, scale, 0.0, SHAPE)
        if t_x is not None:
            t_s = dot(t_x, tl.trans(y), t_s)
        if t_y is not None:
            t_s = dot(x, tl.trans(t_y), t_s)
        t_s *= scale
        if mu is not None:
            t_s -= tl.expand_dims(mu, AXIS)
        t_p = p * t_s
    return p, t_p


@triton.jit
def _score_gradients(
    p,
    t_p,
    u,
    t_u,
    w,
    t_w,
    delta0,
    delta1,
    SHAPE: tl.constexpr,
    AXIS: tl.constexpr,
    NEED_TP: tl.constexpr,
    NEED_DS0: tl.constexpr,
    NEED_DS1: tl.constexpr,
):
    """Return (dS0, dS1); P where one is not needed.

    u, t_u, w, t_w: factors of E0 and E1 as a dual number, rows of the tile first.
    """
    ds0, ds1 = p, p
    e0 = tl.zeros(SHAPE, tl.float32)
    HAS_D0: tl.constexpr = delta0 is not None
    if NEED_DS0 or (NEED_DS1 and NEED_TP and HAS_D0):
        if u is not None and w is not None:
            e0 = dot(u, tl.trans(w), e0)
        e0 -= tl.expand_dims(delta0, AXIS)
        ds0 = p * e0
    if NEED_DS1:
        e1 = tl.zeros(SHAPE, tl.float32)
        if t_u is not None and w is not None:
            e1 = dot(t_u, tl.trans(w), e1)
        if u is not None and t_w is not None:
            e1 = dot(u, tl.trans(t_w), e1)
        ds1 = p * (e1 - tl.expand_dims(delta1, AXIS))
        if NEED_TP and HAS_D0:
            ds1 += t_p * e0
    return ds0, ds1


@triton.jit
def _attention_jvp_bwd_keys_kernel(
    inputs,
    stats,
    masks,
    sequences,
    gradients,
    strides,
    masks_strides,
    heads,
    group,
    nq,
    nk,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr, d_o_ptr, dt_o_ptr = inputs
    d_k_ptr, dt_k_ptr, d_v_ptr, dt_v_ptr = gradients
    cu_q_ptr, cu_k_ptr, count = sequences
    HAS_D0: tl.constexpr = stats[3] is not None
    HAS_TS: tl.constexpr = t_q_ptr is not None or t_k_ptr is not None or masks[1] is not None
    NEED_DS1: tl.constexpr = d_k_ptr is not None
    NEED_DS0: tl.constexpr = HAS_D0 and (dt_k_ptr is not None or (NEED_DS1 and t_q_ptr is not None))
    NEED_TP: tl.constexpr = HAS_TS and (
        (NEED_DS1 and HAS_D0) or (d_v_ptr is not None and dt_o_ptr is not None)
    )

    groups = heads // group
    tiles = tile_count(cu_k_ptr, count, nk, BLOCK_N)
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, g = head // groups, head % groups
    total_q = nq
    row, begin_k, nk, begin_q, nq = find_tile(
        tl.program_id(0) % tiles, cu_k_ptr, cu_q_ptr, count, nk, nq, BLOCK_N
    )
    offs_n = row + tl.arange(0, BLOCK_N)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    PAD: tl.constexpr = D != D_PAD
    PAD_V: tl.constexpr = DV != DV_PAD

    k_base = base_of(k_ptr, strides[1], 0, b, g, begin_k, UNIT)
    t_k_base = base_of(t_k_ptr, strides[4], 0, b, g, begin_k, UNIT)
    v_base = base_of(v_ptr, strides[2], 0, b, g, begin_k, UNIT)
    t_v_base = base_of(t_v_ptr, strides[5], 0, b, g, begin_k, UNIT)
    k = load_rows(k_base, strides[1][3], offs_n, nk, cols, D, True, PAD, UNIT)
    t_k = load_rows(t_k_base, strides[4][3], offs_n, nk, cols, D, True, PAD, UNIT)
    v = load_rows(v_base, strides[2][3], offs_n, nk, cols_v, DV, True, PAD_V, UNIT)
    t_v = load_rows(t_v_base, strides[5][3], offs_n, nk, cols_v, DV, True, PAD_V, UNIT)

    state = (
        tl.zeros([BLOCK_N, D_PAD], tl.float32),
        tl.zeros([BLOCK_N, D_PAD], tl.float32),
        tl.zeros([BLOCK_N, DV_PAD], tl.float32),
        tl.zeros([BLOCK_N, DV_PAD], tl.float32),
    )
    first = 0
    if CAUSAL:
        first = row // BLOCK_M * BLOCK_M
    end = tl.where(row < nk, nq, 0)
    for j in range(0, group):
        h = g * group + j
        q_base = base_of(q_ptr, strides[0], 0, b, h, begin_q, UNIT)
        t_q_base = base_of(t_q_ptr, strides[3], 0, b, h, begin_q, UNIT)
        d_o_base = base_of(d_o_ptr, strides[6], 0, b, h, begin_q, UNIT)
        dt_o_base = base_of(dt_o_ptr, strides[7], 0, b, h, begin_q, UNIT)
        mask_base = base_of_mask(masks[0], masks_strides[0], 0, b, h)
        t_mask_base = base_of_mask(masks[1], masks_strides[1], 0, b, h)
        first_stat = (b * heads + h) * total_q + begin_q
        first_key, end_key = visible_keys(mask_base, masks_strides[0], nk)
        hidden = (row >= end_key) | (row + BLOCK_N <= first_key)
        for start in range(first, tl.where(hidden, 0, end), BLOCK_M):
            dt_k, d_k, dt_v, d_v = state
            offs_m = start + tl.arange(0, BLOCK_M)
            q = load_rows(q_base, strides[0][3], offs_m, nq, cols, D, True, PAD, UNIT)
            t_q = load_rows(t_q_base, strides[3][3], offs_m, nq, cols, D, True, PAD, UNIT)
            d_o = load_rows(d_o_base, strides[6][3], offs_m, nq, cols_v, DV, True, PAD_V, UNIT)
            dt_o = load_rows(dt_o_base, strides[7][3], offs_m, nq, cols_v, DV, True, PAD_V, UNIT)
            lse = _load_lse(stats[0], first_stat, offs_m, nq, ADDITIVE)
            mu = load_stat(stats[1], first_stat, offs_m, nq)
            rest = load_stat(stats[2], first_stat, offs_m, nq)
            delta0 = load_stat(stats[3], first_stat, offs_m, nq)
            delta1 = load_stat(stats[4], first_stat, offs_m, nq)
            p, t_p = _weights(
                k, t_k, q, t_q, lse, rest, mu, mask_base, t_mask_base, masks_strides, offs_m,
                offs_n, nq, nk, scale,
                [BLOCK_N, BLOCK_M], 0, CAUSAL, True, ADDITIVE, NEED_TP,
            )  # fmt: skip
            if d_v_ptr is not None and d_o_ptr is not None:
                d_v = dot(narrow(p, k.dtype), d_o, d_v)
            if d_v_ptr is not None and dt_o_ptr is not None and NEED_TP:
                d_v = dot(narrow(t_p, k.dtype), dt_o, d_v)
            if dt_v_ptr is not None and dt_o_ptr is not None:
                dt_v = dot(narrow(p, k.dtype), dt_o, dt_v)
            if NEED_DS0 or NEED_DS1:
                ds0, ds1 = _score_gradients(
                    p, t_p, v, t_v, dt_o, d_o, delta0, delta1, [BLOCK_N, BLOCK_M], 0, NEED_TP,
                    NEED_DS0, NEED_DS1,
                )  # fmt: skip
                if dt_k_ptr is not None and NEED_DS0:
                    dt_k = dot(narrow(ds0, k.dtype), q, dt_k)
                if NEED_DS1:
                    if NEED_DS0 and t_q_ptr is not None:
                        d_k = dot(narrow(ds0, k.dtype), t_q, d_k)
                    d_k = dot(narrow(ds1, k.dtype), q, d_k)
            state = (dt_k, d_k, dt_v, d_v)
    dt_k, d_k, dt_v, d_v = state
    store_rows(d_k_ptr, strides[8], b, g, begin_k, offs_n, nk, cols, D, UNIT, d_k * scale)
    store_rows(dt_k_ptr, strides[9], b, g, begin_k, offs_n, nk, cols, D, UNIT, dt_k * scale)
    store_rows(d_v_ptr, strides[10], b, g, begin_k, offs_n, nk, cols_v, DV, UNIT, d_v)
    store_rows(dt_v_ptr, strides[11], b, g, begin_k, offs_n, nk, cols_v, DV, UNIT, dt_v)


@triton.jit
def _attention_jvp_bwd_queries_kernel(
    inputs,
    stats,
    masks,
    sequences,
    gradients,
    strides,
    masks_strides,
    heads,
    group,
    nq,
    nk,
    scale,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    UNIT: tl.constexpr,
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr, d_o_ptr, dt_o_ptr = inputs
    d_q_ptr, dt_q_ptr = gradients
    cu_q_ptr, cu_k_ptr, count = sequences
    HAS_D0: tl.constexpr = stats[3] is not None
    HAS_TS: tl.constexpr = t_q_ptr is not None or t_k_ptr is not None or masks[1] is not None
    NEED_DS1: tl.constexpr = d_q_ptr is not None
    NEED_DS0: tl.constexpr = HAS_D0 and (dt_q_ptr is not None or (NEED_DS1 and t_k_ptr is not None))
    NEED_TP: tl.constexpr = HAS_TS and NEED_DS1 and HAS_D0

    tiles = tile_count(cu_q_ptr, count, nq, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    g = h // group
    first_stat = head * nq
    row, begin_q, nq, begin_k, nk = find_tile(tile, cu_q_ptr, cu_k_ptr, count, nq, nk, BLOCK_M)
    offs_m = row + tl.arange(0, BLOCK_M)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    PAD: tl.constexpr = D != D_PAD
    PAD_V: tl.constexpr = DV != DV_PAD

    q_base = base_of(q_ptr, strides[0], 0, b, h, begin_q, UNIT)
    t_q_base = base_of(t_q_ptr, strides[3], 0, b, h, begin_q, UNIT)
    d_o_base = base_of(d_o_ptr, strides[6], 0, b, h, begin_q, UNIT)
    dt_o_base = base_of(dt_o_ptr, strides[7], 0, b, h, begin_q, UNIT)
    q = load_rows(q_base, strides[0][3], offs_m, nq, cols, D, True, PAD, UNIT)
    t_q = load_rows(t_q_base, strides[3][3], offs_m, nq, cols, D, True, PAD, UNIT)
    d_o = load_rows(d_o_base, strides[6][3], offs_m, nq, cols_v, DV, True, PAD_V, UNIT)
    dt_o = load_rows(dt_o_base, strides[7][3], offs_m, nq, cols_v, DV, True, PAD_V, UNIT)
    first_stat += begin_q
    lse = _load_lse(stats[0], first_stat, offs_m, nq, ADDITIVE)
    mu = load_stat(stats[1], first_stat, offs_m, nq)
    rest = load_stat(stats[2], first_stat, offs_m, nq)
    delta0 = load_stat(stats[3], first_stat, offs_m, nq)
    delta1 = load_stat(stats[4], first_stat, offs_m, nq)
    k_base = base_of(k_ptr, strides[1], 0, b, g, begin_k, UNIT)
    t_k_base = base_of(t_k_ptr, strides[4], 0, b, g, begin_k, UNIT)
    v_base = base_of(v_ptr, strides[2], 0, b, g, begin_k, UNIT)
    t_v_base = base_of(t_v_ptr, strides[5], 0, b, g, begin_k, UNIT)
    mask_base = base_of_mask(masks[0], masks_strides[0], 0, b, h)
    t_mask_base = base_of_mask(masks[1], masks_strides[1], 0, b, h)

    state = (
        tl.zeros([BLOCK_M, D_PAD], tl.float32),
        tl.zeros([BLOCK_M, D_PAD], tl.float32),
    )
    first, end = visible_keys(mask_base, masks_strides[0], nk)
    end = tl.where(row < nq, end, 0)
    if CAUSAL:
        end = tl.minimum(end, row + BLOCK_M)
    for start in range(first // BLOCK_N * BLOCK_N, end, BLOCK_N):
        dt_q, d_q = state
        offs_n = start + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, strides[1][3], offs_n, nk, cols, D, True, PAD, UNIT)
        t_k = load_rows(t_k_base, strides[4][3], offs_n, nk, cols, D, True, PAD, UNIT)
        v = load_rows(v_base, strides[2][3], offs_n, nk, cols_v, DV, True, PAD_V, UNIT)
        t_v = load_rows(t_v_base, strides[5][3], offs_n, nk, cols_v, DV, True, PAD_V, UNIT)
        p, t_p = _weights(
            q, t_q, k, t_k, lse, rest, mu, mask_base, t_mask_base, masks_strides, offs_m, offs_n,
            nq, nk, scale,
            [BLOCK_M, BLOCK_N], 1, CAUSAL, False, ADDITIVE, NEED_TP,
        )  # fmt: skip
        ds0, ds1 = _score_gradients(
            p, t_p, dt_o, d_o, v, t_v, delta0, delta1, [BLOCK_M, BLOCK_N], 1, NEED_TP, NEED_DS0,
            NEED_DS1,
        )  # fmt: skip
        if dt_q_ptr is not None and NEED_DS0:
            dt_q = dot(narrow(ds0, q.dtype), k, dt_q)
        if NEED_DS1:
            if NEED_DS0 and t_k_ptr is not None:
                d_q = dot(narrow(ds0, q.dtype), t_k, d_q)
            d_q = dot(narrow(ds1, q.dtype), k, d_q)
        state = (dt_q, d_q)
    dt_q, d_q = state
    store_rows(d_q_ptr, strides[8], b, h, begin_q, offs_m, nq, cols, D, UNIT, d_q * scale)
    store_rows(dt_q_ptr, strides[9], b, h, begin_q, offs_m, nq, cols, D, UNIT, dt_q * scale)


def launch_attention_jvp_backward(
    cotangents: Sequence[Tensor | None],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    masks: Masks,
    gradients: Sequence[Tensor | None],
    scale: float,
    config: TileConfig | None = None,
) -> None:
    """Fill gradients = (d_q, d_k, d_v, dt_q, dt_k, dt_v), those that are not None.

    cotangents (d_o, dt_o), primals (q, k, v), tangents (t_q, t_k, t_v), stats (lse, mu, lse_rest,
    D0, D1).
    `config` is for tuning.
    """
    d_q, d_k, d_v, dt_q, dt_k, dt_v = gradients
    inputs = (*primals, *tangents, *cotangents)
    padded = max(64, *(pad_head_dim(x.shape[-1]) for x in primals))
    masked = masks.is_causal or masks.attn_mask is not None
    together = QUERIES_TOGETHER_MASKED if masked else QUERIES_TOGETHER
    for kernel, side, groups in (
        (_attention_jvp_bwd_keys_kernel, (d_k, dt_k, d_v, dt_v), KEYS_TOGETHER[padded]),
        (_attention_jvp_bwd_queries_kernel, (d_q, dt_q), together[padded]),
    ):
        for group in groups:
            some = [x if i in group else None for i, x in enumerate(side)]
            if any(x is not None for x in some):
                _launch(kernel, inputs, stats, masks, some, scale, config)


def choose_config(kernel: object, device: torch.device, padded: int) -> TileConfig:
    table = CONFIGS
    if is_hopper(device):
        table = KEYS_SM90 if kernel is _attention_jvp_bwd_keys_kernel else QUERIES_SM90
    return next(config for config in table if padded <= config.head_dim)


def _launch(
    kernel: triton.JITFunction,
    inputs: Sequence[Tensor | None],
    stats: Sequence[Tensor | None],
    masks: Masks,
    gradients: Sequence[Tensor | None],
    scale: float,
    config: TileConfig | None,
) -> None:
    """Compute what is not None of one side: (d_k, dt_k, d_v, dt_v) or (d_q, dt_q)."""
    q, _, v = inputs[:3]
    (b, h, nq, d), (groups, nk, dv) = q.shape, v.shape[1:]
    d_pad, dv_pad = pad_head_dim(d), pad_head_dim(dv)
    config = config or choose_config(kernel, q.device, max(d_pad, dv_pad))
    if len(gradients) == 2:
        rows, heads, block = nq, h, config.block_m
    else:
        rows, heads, block = nk, groups, config.block_n
    if b * heads * rows == 0:
        return
    sequences = masks.sequences
    tiles = rows // block + sequences if sequences else triton.cdiv(rows, block)
    unit, strides = strides_in_units((*inputs, *gradients))
    mask, t_mask = masks.readable
    kernel[(tiles * b * heads,)](
        tuple(inputs),
        tuple(stats),
        (mask, t_mask),
        (masks.cu_seqlens_q, masks.cu_seqlens_k, sequences),
        tuple(gradients),
        strides,
        (mask_strides(mask), mask_strides(t_mask)),
        h,
        h // groups,
        nq,
        nk,
        safe_scale(scale, mask, t_mask),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        D=d,
        DV=dv,
        D_PAD=d_pad,
        DV_PAD=dv_pad,
        UNIT=unit,
        CAUSAL=masks.is_causal,
        ADDITIVE=masks.additive,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
