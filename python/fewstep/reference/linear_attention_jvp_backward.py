"""Oracle of `fewstep.ops.linear_attention_jvp_backward`: every gradient written out by hand.

With d_o, dt_o the cotangents of o, t_o (None is zero), names as in
`reference.linear_attention_jvp`, den including eps, and b_o = dt_o . o (over Dv):

    S = [dt_o, -b_o] / den                                  cotangent of [t_num, t_den]
    R = [d_o - (t_den / den) dt_o,                          cotangent of [num, den]
         -(d_o . o + dt_o . t_o - (t_den / den) b_o)] / den
    d_tA = f(q)^T S                         d_A = f(q)^T R + t_f(q)^T S
    d_t_q = [q > 0] S A^T                   d_q = [q > 0] (R A^T + S tA^T)
    d_t_k = [k > 0] [v, 1] d_tA^T           d_k = [k > 0] ([v, 1] d_A^T + [t_v, 0] d_tA^T)
    d_t_v = f(k) d_tA                       d_v = f(k) d_A + t_f(k) d_tA    (first Dv columns)

Returns the six in the order of the inputs, in the accumulation dtype. The derivation is in
docs/ops/linear_attention_jvp_backward.md.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_jvp_backward(
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
    *,
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return (d_q, d_k, d_v, d_t_q, d_t_k, d_t_v); state, t_state as `linear_attention_jvp`'s."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v, state, t_state = (x.to(dtype) for x in (q, k, v, state, t_state))
    t_q, t_k, t_v = (
        torch.zeros_like(x) if t is None else t.to(dtype) for x, t in ((q, t_q), (k, t_k), (v, t_v))
    )
    zeros = torch.zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype, device=q.device)
    d_o, dt_o = (zeros if d is None else d.to(dtype) for d in (d_o, dt_o))
    one = torch.ones_like(v[..., :1])
    v, t_v = torch.cat([v, one], -1), torch.cat([t_v, 0 * one], -1)
    f_q, t_f_q = q.relu(), torch.where(q > 0, t_q, 0)
    f_k, t_f_k = k.relu(), torch.where(k > 0, t_k, 0)

    sums, t_sums = f_q @ state, t_f_q @ state + f_q @ t_state
    den = sums[..., -1:] + eps
    ratio = t_sums[..., -1:] / den
    o = sums[..., :-1] / den
    t_o = t_sums[..., :-1] / den - ratio * o
    b_o = (dt_o * o).sum(-1, keepdim=True)
    s = torch.cat([dt_o, -b_o], -1) / den
    last = (d_o * o + dt_o * t_o).sum(-1, keepdim=True) - ratio * b_o
    r = torch.cat([d_o - ratio * dt_o, -last], -1) / den

    d_t_state = f_q.mT @ s
    d_state = f_q.mT @ r + t_f_q.mT @ s
    d_t_q = torch.where(q > 0, s @ state.mT, 0)
    d_q = torch.where(q > 0, r @ state.mT + s @ t_state.mT, 0)
    d_t_k = torch.where(k > 0, v @ d_t_state.mT, 0)
    d_k = torch.where(k > 0, v @ d_state.mT + t_v @ d_t_state.mT, 0)
    d_t_v = (f_k @ d_t_state)[..., :-1]
    d_v = (f_k @ d_state + t_f_k @ d_t_state)[..., :-1]
    return d_q, d_k, d_v, d_t_q, d_t_k, d_t_v
