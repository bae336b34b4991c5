"""Weights of the published linear forecasters, for any spacing of the full steps.

    y(t) ~ sum_k w_k y(t_k),   t_0 newest, ..., t_{n-1} oldest full step;   sum_k w_k = 1
    f[t_0 .. t_i]              divided difference, a weighted sum of y(t_0) .. y(t_i)
    polynomial basis           y(t) ~ sum_i b_i(x) f[t_0 .. t_i],   x = t - t_0,   b_0 = 1

    reuse      b_i = 0 for i > 0        FORA (arXiv 2407.01425), DeepCache (arXiv 2312.00858)
    taylor     b_i = x^i                TaylorSeer (arXiv 2503.06923)
    newton     b_i = prod_{j<i} (t - t_j): the polynomial through all points
    hermite    b_i = s^i H_i(s x)       HiCache (arXiv 2508.16984), H_i of the physicists
    foca       BDF2 predictor, Heun corrector: FoCa (arXiv 2508.16211)

TaylorSeer and HiCache take backward differences over the interval N for derivatives; on even steps
their i-th difference is i! N^i f[t_0 .. t_i], so that the divided difference is their formula with
the right scale on uneven steps. `taylor` is exact on lines only, whatever its degree, since x^i is
not Newton's product; `newton` is exact to its degree and amplifies noise more. `hermite` is exact
on constants, and on lines where s = 1/sqrt(2). x counts in steps there: it has no other unit.

BDF2 on uneven steps, r = h / (t_0 - t_1), h = t - t_0, with the slope d_0 of the parabola through
the three newest points at t_0 in place of the unknown one at t, and Heun's rule with the slope d of
the parabola through the prediction p and the two newest points at t:

    p = ((1 + r)^2 y_0 - r^2 y_1 + (1 + r) h d_0) / (1 + 2 r)
    y = y_0 + h / 2 (d_0 + d)

The implementation of FoCa in cache-dit 1.5.3 leaves the spacing out and errs on straight lines.
Adams-Bashforth is none of its own here: outputs have no slopes but their differences. Taken for the
slopes at the newer points, two of them give `taylor`, at the middles `newton`, both of degree 2.
All functions take and return float64 weights as tuples; with few points they lower their degree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["divided_differences", "foca", "hermite", "newton", "reuse", "taylor"]

Array = NDArray[np.float64]
Weights = tuple[float, ...]


def _expect_points(known: Sequence[float], target: float) -> Array:
    points = np.asarray(known, dtype=np.float64)
    if points.ndim != 1 or not len(points):
        raise ValueError(f"known: expected the times of at least one full step, got {known!r}")
    if not np.isfinite(points).all() or not np.isfinite(target):
        raise ValueError(f"known, target: expected finite times, got {known!r} and {target!r}")
    if len(np.unique(points)) != len(points):
        raise ValueError(f"known: expected distinct times, got {known!r}")
    return points


def divided_differences(points: Array) -> Array:
    """Return D [n, n] with f[t_0 .. t_i] = sum_k D_ik y(t_k), lower triangular."""
    table = np.eye(len(points))
    rows = [table[0]]
    for order in range(1, len(points)):
        gaps = points[:-order] - points[order:]
        table = (table[:-1] - table[1:]) / gaps[:, None]
        rows.append(table[0])
    return np.stack(rows)


def _in_basis(
    known: Sequence[float], target: float, degree: int, basis: Callable[[int, Array], float]
) -> Weights:
    """Return the weights of sum_i basis(i, points) f[t_0 .. t_i]."""
    points = _expect_points(known, target)[: degree + 1]
    factors = np.array([basis(i, points) for i in range(len(points))])
    return tuple((factors @ divided_differences(points)).tolist())


def reuse(known: Sequence[float], target: float) -> Weights:
    """The newest output as it is."""
    _expect_points(known, target)
    return (1.0,)


def taylor(known: Sequence[float], target: float, *, degree: int = 2) -> Weights:
    """A Taylor sum with divided differences as derivatives."""
    return _in_basis(known, target, degree, lambda i, points: (target - points[0]) ** i)


def newton(known: Sequence[float], target: float, *, degree: int = 2) -> Weights:
    """The polynomial through the newest degree + 1 points."""
    return _in_basis(known, target, degree, lambda i, points: float(np.prod(target - points[:i])))


def hermite(
    known: Sequence[float], target: float, *, degree: int = 2, scale: float = 0.5
) -> Weights:
    """A Taylor sum whose powers are scaled Hermite polynomials; times count in steps."""

    def basis(i: int, points: Array) -> float:
        only = [0.0] * i + [1.0]
        return scale**i * float(np.polynomial.hermite.hermval(scale * (target - points[0]), only))

    return _in_basis(known, target, degree, basis)


def _slope(points: Array, at: float) -> Array:
    """Return the weights of the slope, at a time, of the polynomial through the points."""
    total = np.zeros(len(points))
    table = divided_differences(points)
    for order in range(1, len(points)):
        # The derivative of a product of the linear factors (at - points[j]), j < order.
        rest = [np.prod(np.delete(at - points[:order], j)) for j in range(order)]
        total += float(np.sum(rest)) * table[order]
    return total


def foca(known: Sequence[float], target: float) -> Weights:
    """A BDF2 prediction, corrected by Heun's rule; three points."""
    points = _expect_points(known, target)[:3]
    count = len(points)
    if count == 1:
        return (1.0,)
    one = np.eye(count)
    step = target - points[0]
    ratio = step / (points[0] - points[1])
    before = _slope(points, points[0])
    if step == 0 or 1 + 2 * ratio == 0:
        raise ValueError(f"target: expected a time after the full steps, got {target!r}")
    predicted = (1 + ratio) ** 2 * one[0] - ratio**2 * one[1] + (1 + ratio) * step * before
    predicted /= 1 + 2 * ratio
    ahead = _slope(np.array([target, points[0], points[1]]), target)
    after = ahead[0] * predicted + ahead[1] * one[0] + ahead[2] * one[1]
    return tuple((one[0] + step / 2 * (before + after)).tolist())
