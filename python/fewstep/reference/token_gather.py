"""Oracle of `fewstep.ops.token_gather`.

    n = x[b, index[b, m]]                             NaN outside of 0 to N - 1
    n = (n - mean(n)) (mean((n - mean(n))^2) + eps)^-1/2       where eps is given
    y[b, m] = n (1 + scale[b]) + shift[b]

Rows that are only gathered keep their bits; norms are taken in float64 for float64, else float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_gather(
    x: Tensor,
    index: Tensor,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    """Return y in the dtype of x, in the accumulation dtype where eps is given."""
    inside = ((index >= 0) & (index < x.shape[1]))[..., None]
    if x.shape[1] == 0:
        rows = x.new_empty(*index.shape, x.shape[2])
    else:
        at = torch.where(inside, index[..., None], 0).long().expand(-1, -1, x.shape[2])
        rows = x.gather(1, at)
    rows = torch.where(inside, rows, torch.nan)
    if eps is None:
        return rows
    n = rows.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    n = n - n.mean(-1, keepdim=True)
    n = n * (n.square().mean(-1, keepdim=True) + eps).rsqrt()
    if scale is not None:
        n = n * (1 + scale.to(n.dtype)[:, None])
    return n if shift is None else n + shift.to(n.dtype)[:, None]
