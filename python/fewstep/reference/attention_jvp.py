"""Oracle of `fewstep.ops.attention_jvp`: the tangent written out by hand.

    S  = scale q k^T                        tS = scale (t_q k^T + q t_k^T)
    P  = softmax(S)                         mu = sum_j P tS,  tP = P (tS - mu)
    o  = P v                                t_o = tP v + P t_v
    lse = log sum_j exp S

q, t_q [..., Nq, D]; k, t_k [..., Nk, D]; v, t_v [..., Nk, Dv]; o, t_o [..., Nq, Dv];
lse, mu [..., Nq]. A tangent that is None is zero. Nothing here is taken from torch's own forward
mode, so it checks that independently. Runs in float64 for float64 inputs, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (o, t_o, lse, mu) in the accumulation dtype."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    s = scale * q @ k.mT
    t_s = torch.zeros_like(s)
    if t_q is not None:
        t_s = t_s + scale * t_q.to(dtype) @ k.mT
    if t_k is not None:
        t_s = t_s + scale * q @ t_k.to(dtype).mT
    p = s.softmax(-1)
    mu = (p * t_s).sum(-1)
    o = p @ v
    t_o = (p * (t_s - mu[..., None])) @ v
    if t_v is not None:
        t_o = t_o + p @ t_v.to(dtype)
    return o, t_o, s.logsumexp(-1), mu
