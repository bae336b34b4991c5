"""Measuring a change where every rank holds some of the tokens (context parallelism).

    c = sum_ranks sum |r - p| / sum_ranks sum |p|     r = x - y, p an earlier residual
    c = sum_ranks sum |r| / sum_ranks sum |y|         without one;  0 / 0 = 0
    <D_i, D_j> = sum_ranks sum D_i D_j                weights that are found in a run (DMD)

A decision taken by a share of the tokens would differ between ranks, which then wait for each other
for ever; weights found in a share would differ between tokens of one image. The sums, a few numbers
a sample, are added up over the ranks, so all of them have the same.
Every rank comes here at the same calls: what else decides is known from steps, forms and inputs of
the whole model, which all ranks see alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import cache_metric

__all__ = ["measure", "total"]


def total(sums: Tensor, group: Any) -> Tensor:
    """Return sums over tokens of all ranks, given those over a rank's own; alone where no group."""
    if group is None:
        return sums
    sums = sums.contiguous()
    torch.distributed.all_reduce(sums, group=group)
    return sums


def measure(
    x: Tensor, y: Tensor, *, previous: Tensor | None = None, group: Any = None
) -> tuple[Tensor, Tensor]:
    """Return the change by sample [B], and the residual x - y.

    Args:
        x: new hidden state [B, ...], or this rank's share of it.
        y: what it is compared with.
        previous: an earlier residual; its change is measured then.
        group: the ranks' process group, None where x is whole.
    """
    if group is None:
        return cache_metric(x, y, previous=previous, return_residual=True, per_sample=True)
    residual = torch.sub(x, y)
    moved, base = (residual, y) if previous is None else (residual - previous, previous)
    sums = torch.stack([s.flatten(1).abs().sum(1, dtype=torch.float64) for s in (moved, base)])
    sums = total(sums, group)
    change = torch.where(sums[0] == 0, torch.zeros_like(sums[0]), sums[0] / sums[1])
    return change.to(torch.promote_types(x.dtype, torch.float32)), residual
