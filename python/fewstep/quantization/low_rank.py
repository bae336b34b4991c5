"""Takes the largest directions of a weight out of what is quantised.

    W = Q(W - up down) + up down + error          up [N, R], down [R, K] in the model's dtype

First up down is the best rank-R approximation of W; then, in rounds, that of W - Q(W - up down),
which is what quantisation made of the rest (SVDQuant, arXiv 2411.05007, and its refinement by
alternation, as LoftQ, arXiv 2310.08659). The round with the least error is kept.

The singular vectors come from a randomised SVD (Halko, Martinsson, Tropp, arXiv 0909.4061): at rank
32 a full one of 3072 x 12288 takes minutes and finds the same subspace. torch.svd_lowrank draws
from the global generators, which belong to the caller; here a generator of our own is seeded, so
the same weight gives the same bits and nobody's next image changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDS = 3
_OVERSAMPLING, _ITERATIONS = 16, 4


def factorize(weight: Tensor, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (down [R, K], up [N, R]) of the best rank-R approximation, in `dtype`."""
    columns = min(rank + _OVERSAMPLING, *weight.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(weight.shape[1], columns, generator=generator).to(weight)
    for _ in range(_ITERATIONS):  # of the subspace, which W W^T turns to the largest directions
        basis = weight.mT @ torch.linalg.qr(weight @ basis).Q
    basis = torch.linalg.qr(weight @ basis).Q
    u, s, v = torch.linalg.svd(basis.mT @ weight, full_matrices=False)
    root = s[:rank].sqrt()
    # Both factors get the root: neither leaves the range of 16 bits before the other.
    up = basis @ u[:, :rank] * root
    return (v[:rank] * root[:, None]).to(dtype).contiguous(), up.to(dtype).contiguous()


def split(
    weight: Tensor,
    rank: int,
    dtype: torch.dtype,
    requantized: Callable[[Tensor], Tensor],
    smooth: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rest, down, up): the weight to quantise, and the branch beside it.

    Args:
        weight: float32 [N, K]; with smooth, the smoothed one.
        rank: at least 1, below min(N, K).
        dtype: of the branch.
        requantized: what quantising a float32 weight makes of it, in float32.
        smooth: [K]: the quantised weight will see x / smooth, the branch x as it is. The
            directions are those of the smoothed weight (SVDQuant's order), so that the branch
            takes what is hard to quantise there; its down is divided by smooth for the way back.
    """
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    target = weight
    for _ in range(1 + ROUNDS):
        down, up = factorize(target, rank, dtype)
        taken = down.float()
        if smooth is not None:
            down = (taken / smooth.float()).to(dtype)
            taken = down.float() * smooth.float()  # what is left of it after rounding
        rest = weight - up.float() @ taken
        quantized = requantized(rest)
        error = float((rest - quantized).square().sum())
        if best is None or error < best[0]:
            best = error, rest, down, up
        target = weight - quantized
    assert best is not None
    return best[1:]
