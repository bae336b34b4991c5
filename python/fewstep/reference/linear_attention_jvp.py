"""Oracle of `fewstep.ops.linear_attention_jvp`: the tangent written out by hand.

    f(x) = relu(x)                          t_f(x) = [x > 0] t_x
    A  = sum_j f(k_j)^T [v_j, 1]            tA = sum_j t_f(k_j)^T [v_j, 1] + f(k_j)^T [t_v_j, 0]
    [num, den] = f(q) A                     [t_num, t_den] = t_f(q) A + f(q) tA
    o = num / (den + eps)                   t_o = (t_num - o t_den) / (den + eps)

q, t_q [..., Nq, D]; k, t_k [..., Nk, D]; v, t_v [..., Nk, Dv]; o, t_o [..., Nq, Dv];
state A, t_state tA [..., D, Dv + 1]. A tangent that is None is zero. Nothing here is taken from
torch's own forward mode. Runs in float64 for float64 inputs, else in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    t_q: Tensor | None = None,
    t_k: Tensor | None = None,
    t_v: Tensor | None = None,
    *,
    eps: float = 1e-15,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (o, t_o, state, t_state) in the accumulation dtype."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    t_q, t_k, t_v = (
        torch.zeros_like(x) if t is None else t.to(dtype) for x, t in ((q, t_q), (k, t_k), (v, t_v))
    )
    one = torch.ones_like(v[..., :1])
    v, t_v = torch.cat([v, one], -1), torch.cat([t_v, 0 * one], -1)
    f_q, t_f_q = q.relu(), torch.where(q > 0, t_q, 0)
    f_k, t_f_k = k.relu(), torch.where(k > 0, t_k, 0)
    state = f_k.mT @ v
    t_state = t_f_k.mT @ v + f_k.mT @ t_v
    sums, t_sums = f_q @ state, t_f_q @ state + f_q @ t_state
    den = sums[..., -1:] + eps
    o = sums[..., :-1] / den
    t_o = (t_sums[..., :-1] - o * t_sums[..., -1:]) / den
    return o, t_o, state, t_state
