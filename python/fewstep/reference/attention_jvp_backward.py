"""Oracle of `fewstep.ops.attention_jvp_backward`: gradients through o and t_o, written by hand.

    P  = exp((S - lse) - lse_rest)
    D0 = sum dt_o o - d_mu                  D1 = sum (d_o o + dt_o t_o) - d_lse
    X0 = dt_o v^T                           X1 = d_o v^T + dt_o t_v^T
    tP = P (tS - mu)
    dS0 = P (X0 - D0)                       dS1 = P (X1 - D1) + tP (X0 - D0)
    dt_q = scale dS0 k                      d_q = scale (dS1 k + dS0 t_k)
    dt_k = scale dS0^T q                    d_k = scale (dS1^T q + dS0^T t_q)
    dt_v = P^T dt_o                         d_v = P^T d_o + tP^T dt_o

Shapes as in the op. The backward of attention evaluated on dual numbers, with the cotangent
dt_o + eps d_o: the real parts are the gradients of the tangents, the dual parts those of the
primals. Everything is differentiable by torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_jvp import allowed_pairs, share_heads


def _gather_heads(x: Tensor, groups: int) -> Tensor:
    """Sum [B, H, N, D] over the query heads that share a key head: [B, G, N, D]."""
    return x.unflatten(1, (groups, -1)).sum(2)


def attention_jvp_backward(
    d_o: Tensor | None,
    dt_o: Tensor | None,
    delta0: Tensor | None,
    delta1: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None,
    t_k: Tensor | None,
    t_v: Tensor | None,
    lse: Tensor,
    mu: Tensor | None,
    *,
    lse_rest: Tensor | None = None,
    attn_mask: Tensor | None = None,
    t_attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Return (d_q, d_k, d_v, dt_q, dt_k, dt_v) in the accumulation dtype, all of them.

    [B, H, N, D] tensors and one direction only. `delta0` None: t_o and mu have no cotangent.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads, groups = q.shape[1], k.shape[1]
    allowed = allowed_pairs(
        q, k, is_causal=is_causal, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k
    )

    def wide(x: Tensor | None, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=dtype) if x is None else x.to(dtype)

    q, t_q = wide(q, q), wide(t_q, q)
    k, t_k, v, t_v = (
        share_heads(wide(x, like), heads) for x, like in ((k, k), (t_k, k), (v, v), (t_v, v))
    )
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]))
    d_o, dt_o = wide(d_o, out), wide(dt_o, out)
    lse, delta1 = lse[..., None], delta1[..., None]
    delta0, mu, lse_rest = (wide(x, lse[..., 0])[..., None] for x in (delta0, mu, lse_rest))

    s = scale * q @ k.mT
    t_s = scale * (t_q @ k.mT + q @ t_k.mT)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask if allowed is None else allowed & attn_mask
    elif attn_mask is not None:
        s = s + attn_mask.to(dtype)
    if t_attn_mask is not None:
        t_s = t_s + t_attn_mask.to(dtype)
    if allowed is not None:
        s = s.masked_fill(~allowed, -torch.inf)

    p = ((s - lse.masked_fill(lse == -torch.inf, 0)) - lse_rest).exp()
    t_p = p * (t_s - mu)
    x0 = dt_o @ v.mT - delta0
    x1 = d_o @ v.mT + dt_o @ t_v.mT - delta1
    ds0, ds1 = p * x0, p * x1 + t_p * x0
    d_q, dt_q = scale * (ds1 @ k + ds0 @ t_k), scale * ds0 @ k
    d_k, dt_k = scale * (ds1.mT @ q + ds0.mT @ t_q), scale * ds0.mT @ q
    d_v, dt_v = p.mT @ d_o + t_p.mT @ dt_o, p.mT @ dt_o
    return (
        d_q,
        *(_gather_heads(x, groups) for x in (d_k, d_v)),
        dt_q,
        *(_gather_heads(x, groups) for x in (dt_k, dt_v)),
    )
