"""linear_attention_jvp_backward in Triton: a program per TOKENS queries of a head, then per keys.

    S = [dt_o, -b_o] / den                  b_o = dt_o . o
    R = [d_o - (t_den / den) dt_o, -(d_o . o + dt_o . t_o - (t_den / den) b_o)] / den
    d_tA = f(q)^T S                         d_A = f(q)^T R + t_f(q)^T S
    d_t_q = [q > 0] S A^T                   d_q = [q > 0] (R A^T + S tA^T)
    d_t_k = [k > 0] [v, 1] d_tA^T           d_k = [k > 0] ([v, 1] d_A^T + [t_v, 0] d_tA^T)
    d_t_v = f(k) d_tA                       d_v = f(k) d_A + t_f(k) d_tA    (first Dv columns)

The parts of d_A and d_tA are added by torch in between, in a fixed order. Shapes as in
`linear_attention_jvp.py`; all products are of fp32 operands, made of TF32 ones on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl

from ._common import present, strides_of
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

BLOCK = 16


@triton.jit
def _linear_attention_jvp_backward_queries_kernel(
    d_o_ptr,
    dt_o_ptr,
    q_ptr,
    t_q_ptr,
    state_ptr,
    t_state_ptr,
    d_q_ptr,
    d_t_q_ptr,
    partials_ptr,
    stride_dob,
    stride_doh,
    stride_don,
    stride_dtob,
    stride_dtoh,
    stride_dton,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_tqb,
    stride_tqh,
    stride_tqn,
    stride_dqb,
    stride_dqh,
    stride_dqn,
    stride_dtqb,
    stride_dtqh,
    stride_dtqn,
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
    HAS_DO: tl.constexpr,
    HAS_DTO: tl.constexpr,
    HAS_TQ: tl.constexpr,
    HAS_DQ: tl.constexpr,
    HAS_DTQ: tl.constexpr,
):
    head, chunk, b, h = find_chunk(batch, heads)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    size: tl.constexpr = D * (DV + 1)
    matrix, vector = load_state(state_ptr + head * size, D, DV, D_PAD, DV_PAD)
    t_matrix, t_vector = load_state(t_state_ptr + head * size, D, DV, D_PAD, DV_PAD)
    d_matrix = tl.zeros([D_PAD, DV_PAD], tl.float32)
    d_t_matrix = tl.zeros([D_PAD, DV_PAD], tl.float32)
    d_vector = tl.zeros([D_PAD], tl.float32)
    d_t_vector = tl.zeros([D_PAD], tl.float32)
    count = tl.minimum(nq - chunk * TOKENS, TOKENS)
    for start in range(0, count, BLOCK):
        offs = chunk * TOKENS + start + tl.arange(0, BLOCK)
        q = load_rows(q_ptr + b * stride_qb + h * stride_qh, stride_qn, offs, nq, cols, D)
        q = q.to(tl.float32)
        f = features(q, q)
        t_f = tl.zeros([BLOCK, D_PAD], tl.float32)
        if HAS_TQ:
            t_q_base = t_q_ptr + b * stride_tqb + h * stride_tqh
            t_q = load_rows(t_q_base, stride_tqn, offs, nq, cols, D)
            t_f = features(q, t_q)
        zeros = tl.zeros([BLOCK, DV_PAD], tl.float32)
        d_o, dt_o = zeros, zeros
        if HAS_DO:
            d_o_base = d_o_ptr + b * stride_dob + h * stride_doh
            d_o = load_rows(d_o_base, stride_don, offs, nq, cols_v, DV).to(tl.float32)
        if HAS_DTO:
            dt_o_base = dt_o_ptr + b * stride_dtob + h * stride_dtoh
            dt_o = load_rows(dt_o_base, stride_dton, offs, nq, cols_v, DV).to(tl.float32)

        den = (tl.sum(f * vector[None, :], 1) + eps)[:, None]
        t_den = tl.sum(f * t_vector[None, :] + t_f * vector[None, :], 1)[:, None]
        ratio = t_den / den
        o = product(f, matrix, zeros) / den
        t_o = product(t_f, matrix, product(f, t_matrix, zeros)) / den - ratio * o
        b_o = tl.sum(dt_o * o, 1)[:, None]
        last = tl.sum(d_o * o + dt_o * t_o, 1)[:, None] - ratio * b_o
        # Rows past the end have cotangents 0, and den = eps: their parts vanish.
        s, s_last = dt_o / den, -b_o / den
        r, r_last = (d_o - ratio * dt_o) / den, -last / den

        d_t_matrix = product(tl.trans(f), s, d_t_matrix)
        d_matrix = product(tl.trans(f), r, d_matrix)
        d_matrix = product(tl.trans(t_f), s, d_matrix)
        d_t_vector += tl.sum(f * s_last, 0)
        d_vector += tl.sum(f * r_last + t_f * s_last, 0)
        if HAS_DTQ:
            d_t_q = product(s, tl.trans(matrix), s_last * vector[None, :])
            d_t_q = features(q, d_t_q)
            d_t_q_base = d_t_q_ptr + b * stride_dtqb + h * stride_dtqh
            store_rows(d_t_q_base, stride_dtqn, offs, nq, cols, D, d_t_q)
        if HAS_DQ:
            d_q = r_last * vector[None, :] + s_last * t_vector[None, :]
            d_q = product(s, tl.trans(t_matrix), product(r, tl.trans(matrix), d_q))
            d_q = features(q, d_q)
            d_q_base = d_q_ptr + b * stride_dqb + h * stride_dqh
            store_rows(d_q_base, stride_dqn, offs, nq, cols, D, d_q)
    out = partials_ptr + (chunk * 2 * batch * heads + head) * size
    store_state(out, d_matrix, d_vector, D, DV, D_PAD, DV_PAD)
    store_state(out + batch * heads * size, d_t_matrix, d_t_vector, D, DV, D_PAD, DV_PAD)


@triton.jit
def _linear_attention_jvp_backward_keys_kernel(
    k_ptr,
    v_ptr,
    t_k_ptr,
    t_v_ptr,
    d_states_ptr,
    d_k_ptr,
    d_v_ptr,
    d_t_k_ptr,
    d_t_v_ptr,
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
    stride_dkb,
    stride_dkh,
    stride_dkn,
    stride_dvb,
    stride_dvh,
    stride_dvn,
    stride_dtkb,
    stride_dtkh,
    stride_dtkn,
    stride_dtvb,
    stride_dtvh,
    stride_dtvn,
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
    HAS_DK: tl.constexpr,
    HAS_DV: tl.constexpr,
    HAS_DTK: tl.constexpr,
    HAS_DTV: tl.constexpr,
):
    head, chunk, b, h = find_chunk(batch, heads)
    cols, cols_v = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    size: tl.constexpr = D * (DV + 1)
    d_ptr = d_states_ptr + head * size
    d_matrix, d_vector = load_state(d_ptr, D, DV, D_PAD, DV_PAD)
    d_ptr += batch * heads * size
    d_t_matrix, d_t_vector = load_state(d_ptr, D, DV, D_PAD, DV_PAD)
    count = tl.minimum(nk - chunk * TOKENS, TOKENS)
    for start in range(0, count, BLOCK):
        offs = chunk * TOKENS + start + tl.arange(0, BLOCK)
        k = load_rows(k_ptr + b * stride_kb + h * stride_kh, stride_kn, offs, nk, cols, D)
        k = k.to(tl.float32)
        v = load_rows(v_ptr + b * stride_vb + h * stride_vh, stride_vn, offs, nk, cols_v, DV)
        v = v.to(tl.float32)
        zeros = tl.zeros([BLOCK, D_PAD], tl.float32)
        if HAS_DTK:
            d_t_k = product(v, tl.trans(d_t_matrix), zeros + d_t_vector[None, :])
            d_t_k = features(k, d_t_k)
            d_t_k_base = d_t_k_ptr + b * stride_dtkb + h * stride_dtkh
            store_rows(d_t_k_base, stride_dtkn, offs, nk, cols, D, d_t_k)
        if HAS_DK:
            d_k = product(v, tl.trans(d_matrix), zeros + d_vector[None, :])
            if HAS_TV:
                t_v_base = t_v_ptr + b * stride_tvb + h * stride_tvh
                t_v = load_rows(t_v_base, stride_tvn, offs, nk, cols_v, DV).to(tl.float32)
                d_k = product(t_v, tl.trans(d_t_matrix), d_k)
            d_k = features(k, d_k)
            d_k_base = d_k_ptr + b * stride_dkb + h * stride_dkh
            store_rows(d_k_base, stride_dkn, offs, nk, cols, D, d_k)
        f = features(k, k)
        zeros_v = tl.zeros([BLOCK, DV_PAD], tl.float32)
        if HAS_DTV:
            d_t_v_base = d_t_v_ptr + b * stride_dtvb + h * stride_dtvh
            d_t_v = product(f, d_t_matrix, zeros_v)
            store_rows(d_t_v_base, stride_dtvn, offs, nk, cols_v, DV, d_t_v)
        if HAS_DV:
            d_v = product(f, d_matrix, zeros_v)
            if HAS_TK:
                t_k_base = t_k_ptr + b * stride_tkb + h * stride_tkh
                t_k = load_rows(t_k_base, stride_tkn, offs, nk, cols, D)
                d_v = product(features(k, t_k), d_t_matrix, d_v)
            d_v_base = d_v_ptr + b * stride_dvb + h * stride_dvh
            store_rows(d_v_base, stride_dvn, offs, nk, cols_v, DV, d_v)


def launch_linear_attention_jvp_backward(
    d_o: Tensor | None,
    dt_o: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    state: Tensor,
    t_state: Tensor,
    d_q: Tensor | None,
    d_k: Tensor | None,
    d_v: Tensor | None,
    d_t_q: Tensor | None,
    d_t_k: Tensor | None,
    d_t_v: Tensor | None,
    eps: float,
) -> None:
    """Fill the gradients that are given; shapes as in `linear_attention_jvp.py`."""
    batch, heads, nq, d = q.shape
    nk, dv = v.shape[2:]
    if batch * heads == 0:
        return
    options = tiles(d, dv, BLOCK)
    partials = new_partials(q, v, nq)

    if nq:
        _linear_attention_jvp_backward_queries_kernel[(batch * heads * partials.shape[0],)](
            *present(q, d_o, dt_o, q, t_q, state, t_state, d_q, d_t_q),
            partials,
            *strides_of(3, d_o, dt_o, q, t_q, d_q, d_t_q),
            batch,
            heads,
            nq,
            eps,
            **options,
            HAS_DO=d_o is not None,
            HAS_DTO=dt_o is not None,
            HAS_TQ=t_q is not None,
            HAS_DQ=d_q is not None,
            HAS_DTQ=d_t_q is not None,
        )
    gradients = (d_k, d_v, d_t_k, d_t_v)
    if nk == 0 or all(x is None for x in gradients):
        return
    d_states = torch.sum(partials, 0)
    _linear_attention_jvp_backward_keys_kernel[(batch * heads * triton.cdiv(nk, TOKENS),)](
        *present(q, k, v, t_k, t_v, d_states, *gradients),
        *strides_of(3, k, v, t_k, t_v, *gradients),
        batch,
        heads,
        nk,
        **options,
        HAS_TK=t_k is not None,
        HAS_TV=t_v is not None,
        HAS_DK=d_k is not None,
        HAS_DV=d_v is not None,
        HAS_DTK=d_t_k is not None,
        HAS_DTV=d_t_v is not None,
    )
