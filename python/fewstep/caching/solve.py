"""Weights and schedule of a cached run from the Gram matrix of the model's outputs.

    v_i            output of step i, i = 0 .. S-1, as the scheduler gets it
    G_ij           <v_i, v_j> per element, a mean over the calibration's samples
    forecast       v^_i = sum_k w_ik v_f(k),  f(0) > f(1) > ... the last K full steps before i
    sum_k w_ik = 1 a constant trajectory is reproduced, and errors don't grow with |v|
    gap a..b       the skipped steps between two neighbouring full ones, a < i < b
    cost of a gap  min over w of | sum_i rho_i v_i - sum_k w_k v_f(k) |^2,  sum_k w_k = sum_i rho_i

rho_i is what one unit of v_i does to the latents that enter step b: only their sum over the gap
matters, since the model sees none of the latents in between. So a gap is one step of a linear
multistep solver whose coefficients are fitted to the model; the schedule is the cheapest chain of
gaps, found by dynamic programming over (last two full steps, number of full steps).

Least squares under a sum constraint is the affine forecast of the Gram matrix; solvers with fitted
coefficients: Bespoke Solvers (arXiv 2310.19075), S4S (arXiv 2502.17423); schedules as shortest
paths: LeMiCa (arXiv 2511.00090). Everything here is float64 NumPy on matrices of at most S x S.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Array",
    "affine_weights",
    "best_schedule",
    "best_stages",
    "fit_affine",
    "gap_costs",
    "gaps",
]

Array = NDArray[np.float64]

# Ridge of the normal equations, relative to the mean of their diagonal: snapshots of neighbouring
# steps are nearly parallel, and weights that cancel each other would amplify their rounding.
RIDGE = 1e-6
_MEMORY = 2  # full steps that the schedule's cost looks back on


def fit_affine(
    normal: Array, right: Array, total: float, *, ridge: float = RIDGE, prior: Array | None = None
) -> Array:
    """Return w [K] that minimises w'Aw - 2 b'w + ridge |w - prior|^2 with sum w = total.

    Args:
        normal: A [K, K], inner products of the snapshots.
        right: b [K], inner products of the snapshots with the target.
        total: what the weights sum to.
        ridge: relative to the mean of A's diagonal.
        prior: weights to stay close to; equal shares by default.
    """
    order = len(right)
    if order == 1:
        return np.array([total])
    prior = np.full(order, total / order) if prior is None else prior
    lift = ridge * max(np.trace(normal) / order, np.finfo(float).tiny)
    system = np.ones((order + 1, order + 1))
    system[:order, :order] = normal + lift * np.eye(order)
    system[order, order] = 0.0
    return np.linalg.solve(system, np.append(right + lift * prior, total))[:order]


def affine_weights(
    gram: Array, known: Sequence[int], target: int, *, ridge: float = RIDGE
) -> Array:
    """Return the weights of the outputs of the steps `known` that forecast step `target` best."""
    index = list(known)
    if not index:
        return np.zeros(0)
    return fit_affine(gram[np.ix_(index, index)], gram[index, target], 1.0, ridge=ridge)


def gaps(full: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """Return (a, b) of every pair of neighbouring full steps, b = steps after the last one."""
    return list(pairwise([*full, steps]))


def gap_costs(
    grams: Array, rho: Callable[[int, int], Array], *, power: float = 1.0
) -> Callable[[tuple[int, ...], int], float]:
    """Return the cost of the gap between the last of `known` and step b, as a function of both.

    Args:
        grams: [N, S, S], one Gram matrix per sample, or [1, S, S].
        rho: (a, b) -> [S], what a unit of each output does to the latents of step b, 0 outside of
            a < i < b.
        power: p of the mean over samples, (mean c^p)^(1/p): 1 is the mean, large is the worst.
    """
    mean = grams.mean(0)

    @cache
    def cost(known: tuple[int, ...], end: int) -> float:
        if end == known[-1] + 1:
            return 0.0
        index, share = list(known), rho(known[-1], end)
        reach = mean @ share
        weights = fit_affine(mean[np.ix_(index, index)], reach[index], share.sum())
        error = share.copy()
        error[index] -= weights
        each = np.maximum(np.einsum("s,nst,t->n", error, grams, error), 0.0)
        worst = each.max()
        return 0.0 if worst == 0 else float(worst * np.mean((each / worst) ** power) ** (1 / power))

    return cost


def best_schedule(
    steps: int, full_steps: int, cost: Callable[[tuple[int, ...], int], float]
) -> tuple[int, ...]:
    """Return the full steps, 0 the first of them, whose gaps cost least in sum.

    Args:
        steps: S.
        full_steps: how many run in full, 1 to S.
        cost: of the gap between the last of the known full steps and the next one (`gap_costs`).
    """
    if full_steps >= steps:
        return tuple(range(steps))
    reach = max(4, 4 * -(-steps // full_steps))  # the longest gap that is tried
    layers: list[dict[tuple[int, ...], tuple[float, tuple[int, ...]]]] = [{(0,): (0.0, ())}]
    for count in range(1, full_steps):
        layer: dict[tuple[int, ...], tuple[float, tuple[int, ...]]] = {}
        latest = steps - (full_steps - count)  # the full steps still to come need a place each
        for known, (spent, _) in layers[-1].items():
            for end in range(known[-1] + 1, min(latest, known[-1] + reach) + 1):
                after = (*known, end)[-_MEMORY:]
                total = spent + cost(known, end)
                if after not in layer or total < layer[after][0]:
                    layer[after] = (total, known)
        layers.append(layer)
    last = layers[-1]
    known = min(last, key=lambda known: last[known][0] + cost(known, steps))
    chosen = [known[-1]]
    for layer in reversed(layers[1:]):
        known = layer[known][1]
        chosen.append(known[-1])
    return tuple(reversed(chosen))


def best_stages(
    ends: Sequence[int], full_steps: int, cost: Callable[[tuple[int, ...], int], float]
) -> tuple[int, ...]:
    """Return the full steps of a run whose stages know nothing of each other.

    Args:
        ends: the step behind each stage; every stage starts in full.
        full_steps: of all stages, at least one each.
        cost: as in `best_schedule`.
    """
    if len(ends) == 1:
        return best_schedule(ends[0], full_steps, cost)
    if full_steps < len(ends):
        raise ValueError(
            f"full_steps: expected at least {len(ends)}, one for each model, got {full_steps}"
        )
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # by full steps so far
    for begin, end in pairwise([0, *ends]):

        def moved(known: tuple[int, ...], to: int, begin: int = begin) -> float:
            return cost(tuple(step + begin for step in known), to + begin)

        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        for count in range(1, min(end - begin, full_steps) + 1):
            chosen = best_schedule(end - begin, count, moved)
            spent = sum(
                moved(chosen[: place + 1][-_MEMORY:], to)
                for place, to in enumerate((*chosen[1:], end - begin))
            )
            found = tuple(step + begin for step in chosen)
            for before, (paid, path) in best.items():
                total = paid + spent
                if before + count not in after or total < after[before + count][0]:
                    after[before + count] = (total, path + found)
        best = after
    return best[min(full_steps, max(best))][1]
