"""Oracle of `fewstep.ops.attention_jvp`: the tangent written out by hand.

    S  = scale q k^T + M                    tS = scale (t_q k^T + q t_k^T) + tM
    P  = softmax(S)                         mu = sum_j P tS,  tP = P (tS - mu)
    o  = P v                                t_o = tP v + P t_v
    lse = log sum_j exp S                   lse_rest = log l - (lse - m)

with m = max_j S and l = sum_j exp(S - m): lse_rest is what rounding m + log l took from lse. In a
row where a mask leaves nothing but -1e9 that is all of log l.

q [B, H, Nq, D]; k [B, G, Nk, D], v [B, G, Nk, Dv] with G dividing H: query head h reads head
h // (H / G). Tangents have the shape of their primal, or one axis more in front, [R, ...], for R
directions. Masked pairs have P = tP = 0, and a row without any key o = t_o = mu = 0, lse = -inf.
o [B, H, Nq, Dv]; lse [B, H, Nq]; t_o and mu the same, with R in front if the tangents have it.

With a score dtype the operands of S and tS are rounded to 8 bits first (`_scores8.py`).

A tangent that is None is zero. Nothing here is taken from torch's own forward mode, so it checks
that independently; everything is differentiable to any order by torch. Runs in float64 for float64
inputs, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._scores8 import rounded_scores


def allowed_pairs(
    q: Tensor,
    k: Tensor,
    *,
    is_causal: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor | None:
    """Return which (query, key) pairs meet, [Nq, Nk] bool; None if all do.

    Causal: key j is seen by query i if j <= i, both counted from the start of their sequence.
    """
    if not is_causal and cu_seqlens_q is None:
        return None
    row = torch.arange(q.shape[-2], device=q.device)
    column = torch.arange(k.shape[-2], device=q.device)
    allowed = torch.ones(len(row), len(column), dtype=torch.bool, device=q.device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        row_sequence = torch.searchsorted(cu_seqlens_q[1:].contiguous(), row, right=True)
        column_sequence = torch.searchsorted(cu_seqlens_k[1:].contiguous(), column, right=True)
        allowed = row_sequence[:, None] == column_sequence
        row = row - cu_seqlens_q[row_sequence]
        column = column - cu_seqlens_k[column_sequence]
    if is_causal:
        allowed = allowed & (column <= row[:, None])
    return allowed


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of the G heads [..., G, N, D] for the query heads that read it."""
    if x.dim() < 3 or x.shape[-3] == heads:
        return x
    return x.repeat_interleave(heads // x.shape[-3], dim=-3)


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    score_dtype: torch.dtype | None = None,
    return_rest: bool = False,
) -> tuple[Tensor, ...]:
    """Return (o, t_o, lse, mu) in the accumulation dtype; lse_rest too if asked."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = q.shape[-3] if q.dim() > 2 else 1
    allowed = allowed_pairs(
        q, k, is_causal=is_causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )
    operands = tuple(None if x is None else x.to(dtype) for x in (q, k, t_q, t_k))
    q = operands[0]
    k, v = (share_heads(x.to(dtype), heads) for x in (k, v))

    s = scale * q @ k.mT
    t_s = torch.zeros_like(s)
    if t_q is not None:
        t_s = t_s + scale * t_q.to(dtype) @ k.mT
    if t_k is not None:
        t_s = t_s + scale * q @ share_heads(t_k.to(dtype), heads).mT
    if score_dtype is not None:
        s, t_s = rounded_scores(s, t_s, operands, scale, score_dtype)
    if t_attn_mask is not None:
        t_s = t_s + t_attn_mask.to(dtype)

    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(dtype)
        # So that autograd finds zeros, not NaN, in a row whose pairs are all masked by -inf.
        meets = attn_mask != -torch.inf
        allowed = meets if allowed is None else allowed & meets
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)

    m = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros((*s.shape[:-1], 1))
    m = m.masked_fill(m == -torch.inf, 0)
    p = (s - m).exp()
    total = p.sum(-1, keepdim=True)
    empty = total == 0
    log_l = total.masked_fill(empty, 1).log()
    lse = m + log_l
    lse_rest = (log_l - (lse - m))[..., 0]
    lse = lse.masked_fill(empty, -torch.inf)[..., 0]
    p = p / total.masked_fill(empty, 1)
    mu = (p * t_s).sum(-1)
    o = p @ v
    t_o = (p * (t_s - mu[..., None])) @ v
    if t_v is not None:
        t_o = t_o + p @ share_heads(t_v.to(dtype), heads)
    return (o, t_o, lse, mu, lse_rest) if return_rest else (o, t_o, lse, mu)
