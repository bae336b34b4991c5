"""linear_attention_jvp in Triton: a program per TOKENS keys of a head, then one per TOKENS queries.

    A  = sum_j f(k_j)^T [v_j, 1]            tA = sum_j t_f(k_j)^T [v_j, 1] + f(k_j)^T [t_v_j, 0]
    [num, den] = f(q) A                     [t_num, t_den] = t_f(q) A + f(q) tA
    o = num / (den + eps)                   t_o = (t_num - o t_den) / (den + eps)

The states of a head's chunks are added by torch in between, in a fixed order. Products with keys
and values are exact in their dtype; those with the state, which is fp32, are made of TF32 ones.

q, t_q [B, H, Nq, D], k, t_k [B, H, Nk, D], v, t_v [B, H, Nk, Dv], o, t_o [B, H, Nq, Dv]: any
strides with unit stride in the last axis; state, t_state [B, H, D, Dv + 1] contiguous fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import narrow, present, strides_of
from ._linear_attention import (
    TOKENS,
    features,
    find_chunk,
    load_rows,
    load_state,
    new_partials,
    product,
    store_rows,
    store_state,
    tiles,
)


@triton.jit
def _linear_attention_jvp_state_kernel(
    k_ptr,
    v_ptr,
    t_k_ptr,
    t_v_ptr,
    partials_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_tkb,
    stride_tkh,
    stride_tkn,
    stride_tvb,
    stride_tvh,
    stride_tvn,
    batch,
    heads,
    nk,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr,
):
    head, chunk, b, h = find_chunk(batch, heads)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    matrix = tl.zeros([D_PAD, DV_PAD], tl.float32)
    t_matrix = tl.zeros([D_PAD, DV_PAD], tl.float32)
    vector = tl.zeros([D_PAD], tl.float32)
    t_vector = tl.zeros([D_PAD], tl.float32)
    count = tl.minimum(nk - chunk * TOKENS, TOKENS)
    for start in range(0, count, BLOCK):
        offs = chunk * TOKENS + start + tl.arange(0, BLOCK)
        k = load_rows(k_ptr + b * stride_kb + h * stride_kh, stride_kn, offs, nk, cols, D)
        v = load_rows(v_ptr + b * stride_vb + h * stride_vh, stride_vn, offs, nk, cols_v, DV)
        f = features(k, k)
        vector += tl.sum(f, 0)
        f = narrow(f, v.dtype)
        matrix = product(tl.trans(f), v, matrix)
        if HAS_TK:
            t_k_base = t_k_ptr + b * stride_tkb + h * stride_tkh
            t_k = load_rows(t_k_base, stride_tkn, offs, nk, cols, D)
            t_f = features(k, t_k)
            t_vector += tl.sum(t_f, 0)
            t_matrix = product(tl.trans(narrow(t_f, v.dtype)), v, t_matrix)
        if HAS_TV:
            t_v_base = t_v_ptr + b * stride_tvb + h * stride_tvh
            t_v = load_rows(t_v_base, stride_tvn, offs, nk, cols_v, DV)
            t_matrix = product(tl.trans(f), t_v, t_matrix)
    size: tl.constexpr = D * (DV + 1)
    out = partials_ptr + (chunk * 2 * batch * heads + head) * size
    store_state(out, matrix, vector, D, DV, D_PAD, DV_PAD)
    store_state(out + batch * heads * size, t_matrix, t_vector, D, DV, D_PAD, DV_PAD)


@triton.jit
def _linear_attention_jvp_kernel(
    q_ptr,
    t_q_ptr,
    state_ptr,
    t_state_ptr,
    o_ptr,
    t_o_ptr,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_tqb,
    stride_tqh,
    stride_tqn,
    stride_ob,
    stride_oh,
    stride_on,
    stride_tob,
    stride_toh,
    stride_ton,
    batch,
    heads,
    nq,
    eps,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    D_PAD: tl.constexpr,
    DV_PAD: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_TSTATE: tl.constexpr,
):
    head, chunk, b, h = find_chunk(batch, heads)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    size: tl.constexpr = D * (DV + 1)
    matrix, vector = load_state(state_ptr + head * size, D, DV, D_PAD, DV_PAD)
    if HAS_TSTATE:
        t_matrix, t_vector = load_state(t_state_ptr + head * size, D, DV, D_PAD, DV_PAD)
    count = tl.minimum(nq - chunk * TOKENS, TOKENS)
    for start in range(0, count, BLOCK):
        offs = chunk * TOKENS + start + tl.arange(0, BLOCK)
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qn, offs, nq, cols, D)
        f = features(q, q)
        zeros = tl.zeros([BLOCK, DV_PAD], tl.float32)
        den = (tl.sum(f * vector[None, :], 1) + eps)[:, None]
        o = product(f, matrix, zeros) / den
        o_base = o_ptr + b * stride_ob + h * stride_oh
        store_rows(o_base, stride_on, offs, nq, cols_v, DV, o)
        t_num = zeros
        t_den = tl.zeros([BLOCK], tl.float32)
        if HAS_TQ:
            t_q_base = t_q_ptr + b * stride_tqb + h * stride_tqh
            t_q = load_rows(t_q_base, stride_tqn, offs, nq, cols, D)
            t_f = features(q, t_q)
            t_num = product(t_f, matrix, t_num)
            t_den += tl.sum(t_f * vector[None, :], 1)
        if HAS_TSTATE:
            t_num = product(f, t_matrix, t_num)
            t_den += tl.sum(f * t_vector[None, :], 1)
        t_o = (t_num - o * t_den[:, None]) / den
        t_o_base = t_o_ptr + b * stride_tob + h * stride_toh
        store_rows(t_o_base, stride_ton, offs, nq, cols_v, DV, t_o)


def launch_linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    o: Tensor,
    t_o: Tensor,
    state: Tensor,
    t_state: Tensor,
    eps: float,
) -> None:
    """Fill o, t_o, state and t_state; shapes as in the module docstring."""
    batch, heads, nq, d = q.shape
    nk, dv = v.shape[2:]
    if batch * heads == 0:
        return
    options = tiles(d, dv)
    partials = new_partials(q, v, nk)
    if nk:
        _linear_attention_jvp_state_kernel[(batch * heads * partials.shape[0],)](
            *present(k, k, v, t_k, t_v),
            partials,
            *strides_of(3, k, v, t_k, t_v),
            batch,
            heads,
            nk,
            **options,
            HAS_TK=t_k is not None,
            HAS_TV=t_v is not None,
        )
    torch.sum(partials[:, 0], 0, out=state)
    torch.sum(partials[:, 1], 0, out=t_state)
    if nq == 0:
        return
    _linear_attention_jvp_kernel[(batch * heads * triton.cdiv(nq, TOKENS),)](
        *present(q, q, t_q, state, t_state, o, t_o),
        *strides_of(3, q, t_q, o, t_o),
        batch,
        heads,
        nq,
        eps,
        **options,
        HAS_TQ=t_q is not None,
        HAS_TSTATE=t_k is not None or t_v is not None,
    )
