"""attention_jvp in Triton: a program for BLOCK_M queries of one head and CHUNK directions.

    S  = scale q k^T + M                  tS = scale (t_q k^T + q t_k^T) + tM
    m' = max(m, rowmax S)                 alpha = exp(m - m')
    P  = exp(S - m')                      l' = alpha l + rowsum P
    c' = c + rowsum P (tS - c) / l'       H  = P (tS - c')
    T  = alpha (T - (c' - c) O) + P t_v + H v
    O  = alpha O + P v
    o  = O / l    mu = c    t_o = T / l    lse = m + log l    lse_rest = log l - (lse - m)

for each tile of BLOCK_N keys; c is the mean of tS under P over the keys so far, so that what the
keys of a tile have in common in their tangent never enters H, and nothing is left to subtract at
the end but the rounding of c, far below that of H. P and H are rounded to v's dtype for the second
products. fp32 accumulators of [BLOCK_M, BLOCK_DV], O and a T for each direction: two of 256 columns
don't fit the registers, so wide values are split over programs, which repeat the scores.

The directions of a chunk share S, P, l, m and O, 2 + 4 CHUNK products. Every chunk repeats them: T
can't move on to a new c without O beside it. R directions are R // chunk programs with as many as
the table says, and one with those that are left. Head dims over 64 have no room for a second T.

One loop takes the ragged last tile and the first one too. Peeling them, and branching there, was
tried: the compiler then spills (72 to 720 bytes a thread for head dims over 64). Only
narrow causal heads have a second loop, for the tiles on the diagonal.

q [B, H, Nq, D], k [B, G, Nk, D], v [B, G, Nk, Dv], o [B, H, Nq, Dv]; tangents and t_o with R in
front: any strides with unit stride in the last axis. lse, lse_rest [B, H, Nq] and mu [R, B, H, Nq]
contiguous fp32, lse_rest beside an additive mask only. Head dims are padded to the next power of
two in registers only: loads and stores are masked.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import triton
import triton.language as tl

from ._attention import (
    LN2,
    LOG2E,
    Masks,
    TileConfig,
    base_of,
    base_of_mask,
    bases_of,
    bases_of_mask,
    find_tile,
    hide,
    is_hopper,
    load_rows,
    mask_strides,
    power,
    safe_scale,
    seed,
    strides_in_units,
    tile_count,
    visible_keys,
)
from ._common import dot, narrow, pad_head_dim

MAX_BLOCK_DV = 128


# By the larger padded head dim. Compiled with Triton 3.9 for sm_90 they fit the registers without
# spilling (but for 256 columns with an additive mask: some tens of bytes) and 229,376 bytes of
# shared memory; the times are not measured on a GPU yet. Chunks are as large as they may be without
# a change of the tiles: each direction then has the bits that it has alone.
CONFIGS_SM90 = (
    TileConfig(32, 128, 64, 8, 3, chunk=3),
    TileConfig(64, 128, 64, 8, 3, chunk=2),
    TileConfig(128, 128, 64, 8, 2),
    TileConfig(256, 128, 32, 8, 2),
)
# Causal, or head dims that are no power of two: comparisons take registers.
COMPARING_SM90 = (
    TileConfig(32, 128, 64, 8, 3, chunk=3),
    TileConfig(64, 128, 64, 8, 3, chunk=2),
    TileConfig(128, 128, 32, 8, 2),
    TileConfig(256, 128, 16, 8, 2),
)
# Masks that differ between queries: so do their addresses.
MASKED_SM90 = (
    TileConfig(32, 128, 32, 8, 2, chunk=3),
    TileConfig(64, 128, 32, 8, 2),
    TileConfig(128, 128, 16, 8, 2),
    TileConfig(256, 128, 16, 8, 2),
)
# Older cards have 99 to 163 KB of shared memory, and keep q and t_q in registers: with a second
# direction they spill.
CONFIGS = (
    TileConfig(64, 128, 64, 8, 2),
    TileConfig(128, 128, 32, 8, 2),
    TileConfig(256, 64, 32, 8, 2),
)


def choose_config(q: Tensor, v: Tensor, masks: Masks) -> TileConfig:
    """Return the configuration for these head dims and masks."""
    padded = max(pad_head_dim(q.shape[-1]), pad_head_dim(v.shape[-1]))
    table = CONFIGS
    if is_hopper(q.device):
        loaded = [x for x in (masks.attn_mask, masks.t_attn_mask) if x is not None]
        if any(x.stride(-2) != 0 for x in loaded):
            table = MASKED_SM90
        elif masks.is_causal or {q.shape[-1], v.shape[-1]} != {padded}:
            table = COMPARING_SM90
        else:
            table = CONFIGS_SM90
    return next(config for config in table if padded <= config.head_dim)


@triton.jit
def _attend_keys(
    state,
    q,
    t_q,
    offs_m,
    k_base,
    v_base,
    t_k_bases,
    t_v_bases,
    strides,
    mask_base,
    t_mask_bases,
    masks_strides,
    start,
    nq,
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
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Take one tile of keys into the row statistics and accumulators; m in their units."""
    m_i, l_i, c, o, t_o = state
    offs_n = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, D_PAD)
    cols_v = first_dv + tl.arange(0, BLOCK_DV)
    SHAPE: tl.constexpr = [BLOCK_M, BLOCK_N]
    UNIT_OF_SCORES: tl.constexpr = 1.0 if ADDITIVE else LOG2E
    PAD_V: tl.constexpr = DV % BLOCK_DV != 0
    rows, columns = offs_m[:, None], offs_n[None, :]

    # S is finished before tS is begun: fewer registers are live than with both at once.
    k = load_rows(k_base, strides[0], offs_n, nk, cols, D, not EVEN_N, D != D_PAD, UNIT)
    s = seed(mask_base, masks_strides[0], rows, columns, nq, nk, scale, -float("inf"), SHAPE)
    s = dot(q, tl.trans(k), s) * (scale * UNIT_OF_SCORES)
    s = hide(s, rows, columns, nk, CAUSAL, EVEN_N)
    m_new = tl.maximum(m_i, tl.max(s, 1))
    origin = m_new
    if mask_base is not None:
        # A row that met no key so far: P must come out 0, not NaN.
        origin = tl.where(m_new == -float("inf"), 0.0, m_new)
    alpha = power(m_i - origin, ADDITIVE)
    p = power(s - origin[:, None], ADDITIVE)
    l_i = l_i * alpha + tl.sum(p, 1)
    o = o * alpha[:, None]
    v = load_rows(v_base, strides[1], offs_n, nk, cols_v, DV, not EVEN_N, PAD_V, UNIT)
    c_after, t_after = (), ()
    for i in tl.static_range(CHUNK):
        c_i, t_i = c[i], t_o[i] * alpha[:, None]
        if t_q is not None or t_k_bases is not None or t_mask_bases is not None:
            t_mask_base = None if t_mask_bases is None else t_mask_bases[i]
            t_s = seed(t_mask_base, masks_strides[1], rows, columns, nq, nk, scale, 0.0, SHAPE)
            if t_q is not None:
                t_s = dot(t_q[i], tl.trans(k), t_s)
            if t_k_bases is not None:
                t_k = load_rows(
                    t_k_bases[i], strides[2], offs_n, nk, cols, D, not EVEN_N, D != D_PAD, UNIT
                )
                t_s = dot(q, tl.trans(t_k), t_s)
            t_s *= scale
            weight = l_i
            if mask_base is not None:
                weight = tl.where(l_i == 0.0, 1.0, l_i)
            c_new = c_i + tl.sum(p * (t_s - c_i[:, None]), 1) / weight
            # What O is here comes from the tiles before.
            t_i = t_i - (c_new - c_i)[:, None] * o
            t_i = dot(narrow(p * (t_s - c_new[:, None]), v.dtype), v, t_i)
            c_i = c_new
        c_after += (c_i,)
        t_after += (t_i,)
    # Rounded only now: across tS, P is live once, not twice.
    p_low = narrow(p, v.dtype)
    if t_v_bases is not None:
        t_o = t_after
        t_after = ()
        for i in tl.static_range(CHUNK):
            t_v = load_rows(
                t_v_bases[i], strides[3], offs_n, nk, cols_v, DV, not EVEN_N, PAD_V, UNIT
            )
            t_after += (dot(p_low, t_v, t_o[i]),)
    o = dot(p_low, v, o)
    return m_new, l_i, c_after, o, t_after


@triton.jit
def _attention_jvp_fwd_kernel(
    inputs,
    masks,
    sequences,
    outputs,
    strides,
    masks_strides,
    heads,
    group,
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
    CAUSAL: tl.constexpr,
    ADDITIVE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    q_ptr, k_ptr, v_ptr, t_q_ptr, t_k_ptr, t_v_ptr = inputs
    o_ptr, t_o_ptr, lse_ptr, mu_ptr, lse_rest_ptr = outputs
    cu_q_ptr, cu_k_ptr, count = sequences
    # Tiles of one head are neighbours, so that its keys and values stay in the L2 cache.
    tiles = tile_count(cu_q_ptr, count, nq, BLOCK_M)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    head = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    first_dv = tl.program_id(1) * BLOCK_DV
    r = tl.program_id(2).to(tl.int64) * CHUNK
    stats = head * nq
    total_q = nq
    row, begin_q, nq, begin_k, nk = find_tile(tile, cu_q_ptr, cu_k_ptr, count, nq, nk, BLOCK_M)
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < nq
    cols = tl.arange(0, D_PAD)

    PAD: tl.constexpr = D != D_PAD
    q_base = base_of(q_ptr, strides[0], 0, b, h, begin_q, UNIT)
    t_q_bases = bases_of(t_q_ptr, strides[3], r, b, h, begin_q, UNIT, CHUNK)
    q = load_rows(q_base, strides[0][3], offs_m, nq, cols, D, True, PAD, UNIT)
    t_q = t_q_bases
    if t_q_bases is not None:
        t_q = ()
        for i in tl.static_range(CHUNK):
            rows = load_rows(t_q_bases[i], strides[3][3], offs_m, nq, cols, D, True, PAD, UNIT)
            t_q += (rows,)
    g = h // group
    k_base = base_of(k_ptr, strides[1], 0, b, g, begin_k, UNIT)
    v_base = base_of(v_ptr, strides[2], 0, b, g, begin_k, UNIT)
    t_k_bases = bases_of(t_k_ptr, strides[4], r, b, g, begin_k, UNIT, CHUNK)
    t_v_bases = bases_of(t_v_ptr, strides[5], r, b, g, begin_k, UNIT, CHUNK)
    row_strides = (strides[1][3], strides[2][3], strides[4][3], strides[5][3])
    mask_base = base_of_mask(masks[0], masks_strides[0], 0, b, h)
    t_mask_bases = bases_of_mask(masks[1], masks_strides[1], r, b, h, CHUNK)

    c, t_o = (), ()
    for _ in tl.static_range(CHUNK):
        c += (tl.zeros([BLOCK_M], tl.float32),)
        t_o += (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),)
    state = (
        tl.full([BLOCK_M], -float("inf"), tl.float32),
        tl.zeros([BLOCK_M], tl.float32),
        c,
        tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),
        t_o,
    )
    first, end = visible_keys(mask_base, masks_strides[0], nk)
    end = tl.where(row < nq, end, 0)
    first_masked = first // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.minimum(end, row + BLOCK_M)
    # Two loops need more registers than wide heads and large chunks leave.
    if CAUSAL and D_PAD <= 64 and (1 + CHUNK) * BLOCK_DV <= 128:
        first_masked = tl.minimum(end, row + 1) // BLOCK_N * BLOCK_N
        for start in range(0, first_masked, BLOCK_N):
            state = _attend_keys(
                state, q, t_q, offs_m, k_base, v_base, t_k_bases, t_v_bases, row_strides,
                mask_base, t_mask_bases, masks_strides, start, nq, nk, scale, first_dv, BLOCK_M,
                BLOCK_N, BLOCK_DV, D, DV, D_PAD, UNIT, True, False, ADDITIVE, CHUNK,
            )  # fmt: skip
    for start in range(first_masked, end, BLOCK_N):
        state = _attend_keys(
            state, q, t_q, offs_m, k_base, v_base, t_k_bases, t_v_bases, row_strides, mask_base,
            t_mask_bases, masks_strides, start, nq, nk, scale, first_dv, BLOCK_M, BLOCK_N,
            BLOCK_DV, D, DV, D_PAD, UNIT, EVEN_N, CAUSAL, ADDITIVE, CHUNK,
        )  # fmt: skip
    m_i, l_i, c, o, t_o = state

    # Rows without keys: zeros, and lse = -inf.
    l_safe = tl.where(l_i == 0.0, 1.0, l_i)
    cols_v = first_dv + tl.arange(0, BLOCK_DV)
    mask = mask_m[:, None] & (cols_v[None, :] < DV)
    rows = offs_m[:, None].to(tl.int64) * UNIT
    dtype = q_ptr.dtype.element_ty
    if o_ptr is not None:
        o_ptrs = base_of(o_ptr, strides[6], 0, b, h, begin_q, UNIT) + rows * strides[6][3]
        o_ptrs += cols_v[None, :]
        if r == 0:
            tl.store(o_ptrs, narrow(o / l_safe[:, None], dtype), mask=mask)
            if first_dv == 0:
                log_l = tl.log(l_safe)
                lse = m_i + log_l if ADDITIVE else m_i * LN2 + log_l
                rows_of_stats = stats + begin_q + offs_m
                lse_of_rows = tl.where(l_i == 0.0, -float("inf"), lse)
                tl.store(lse_ptr + rows_of_stats, lse_of_rows, mask=mask_m)
                if ADDITIVE:
                    rest = tl.where(l_i == 0.0, 0.0, log_l - (lse - m_i))
                    tl.store(lse_rest_ptr + rows_of_stats, rest, mask=mask_m)
    if t_o_ptr is not None:
        t_o_bases = bases_of(t_o_ptr, strides[7], r, b, h, begin_q, UNIT, CHUNK)
        for i in tl.static_range(CHUNK):
            if first_dv == 0:
                t_stats = ((r + i) * (tl.num_programs(0) // tiles) + head) * total_q
                tl.store(mu_ptr + t_stats + begin_q + offs_m, c[i], mask=mask_m)
            t_o_ptrs = t_o_bases[i] + rows * strides[7][3] + cols_v[None, :]
            tl.store(t_o_ptrs, narrow(t_o[i] / l_safe[:, None], dtype), mask=mask)


def split_directions(directions: int, chunk: int) -> list[tuple[int, int, int]]:
    """Return (first direction, directions a program, programs) of each launch."""
    whole = directions // chunk
    launches = [(0, chunk, whole), (whole * chunk, directions % chunk, 1)]
    return [x for x in launches if x[1] * x[2]]


def launch_attention_jvp(
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    masks: Masks,
    outputs: Sequence[Tensor],
    scale: float,
    config: TileConfig | None = None,
) -> None:
    """Fill outputs = (o, t_o, lse, mu, lse_rest) from (q, k, v) and (t_q, t_k, t_v), as above.

    lse_rest may be None without an additive mask. `config` is for tuning.
    """
    q, k, v = primals
    b, h, nq, d = q.shape
    nk, dv = v.shape[2:]
    if b * h * nq == 0:
        return
    mask, t_mask = masks.readable
    o, t_o, lse, mu, lse_rest = outputs
    directed = (
        None if x is None or x.shape[0] == 0 else x for x in (*tangents, t_mask, t_o, mu)
    )  # fmt: skip
    *tangents, t_mask, t_o, mu = directed
    d_pad, dv_pad = pad_head_dim(d), pad_head_dim(dv)
    config = config or choose_config(q, v, masks)
    block_dv = min(dv_pad, MAX_BLOCK_DV)
    unit, strides = strides_in_units((*primals, *tangents, o, t_o))
    sequences = masks.sequences
    tiles = nq // config.block_m + sequences if sequences else triton.cdiv(nq, config.block_m)
    launches = split_directions(1 if t_o is None else t_o.shape[0], config.chunk)
    for first, chunk, programs in launches:
        some = (*tangents, t_mask, t_o, mu)
        if len(launches) > 1:
            last = first + chunk * programs
            some = (None if x is None else x[first:last] for x in some)
        *some_tangents, some_t_mask, some_t_o, some_mu = some
        _attention_jvp_fwd_kernel[tiles * b * h, triton.cdiv(dv, block_dv), programs](
            (*primals, *some_tangents),
            (mask, some_t_mask),
            (masks.cu_seqlens_q, masks.cu_seqlens_k, sequences),
            (None if first else o, some_t_o, lse, some_mu, lse_rest),
            strides,
            (mask_strides(mask), mask_strides(t_mask)),
            h,
            h // k.shape[1],
            nq,
            nk,
            safe_scale(scale, mask, t_mask),
            BLOCK_M=config.block_m,
            BLOCK_N=config.block_n,
            BLOCK_DV=block_dv,
            D=d,
            DV=dv,
            D_PAD=d_pad,
            UNIT=unit,
            EVEN_N=nk % config.block_n == 0 and not sequences,
            CAUSAL=masks.is_causal,
            ADDITIVE=masks.additive,
            CHUNK=chunk,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
