"""Rounds a weight so that the errors of its columns make up for each other on the inputs seen.

    min  E_x |W x + b - (Q x + up (down x) + b')|^2 = tr(D H D^T)        D = W - Q - up down

    H   = E_x[(x - m) (x - m)^T] + damping          m = E_x[x]  (0 without a bias)
    b'  = b + D m

Rounded to nearest, each weight errs by itself: tr(D H D^T) sees what the sum of them does. Inputs
of trained models are far from white, so nearly all of it can be undone by weights that are not yet
rounded. Column by column (GPTQ, arXiv 2210.17323; Optimal Brain Surgeon), with H^-1 = U^T U:

    e_i = (w_i - nearest(w_i)) / U_ii          w_j -= e_i U_ij  for all j > i

largest H_ii first, over scales that are settled before (`grids.search`, columns counted by
1 / (H^-1)_ii, what an error there costs once the others have made up for it). Values are those of
the product: w4a8's folded weight, so what the fold rounds is made up for as well.

The branch is refitted to what is left, and the rest rounded anew, in turns: with R R^T = H the best
up down under tr(. H .^T) is the truncated SVD of (W - Q) R, times R^-1 (SVDQuant, arXiv 2411.05007,
and LQER, arXiv 2402.02446, have the branch; here it sees the rounding and the rounding sees it).

Mean and H are taken in the space of what is quantised: x smoothed and rotated. Rows count in units
of their output's energy, as in `errors.row_error`, so one token of 80 times the others' size does
not decide. H is made of one layer's rows at a time, K x K in float64, and forgotten: for K = 12,288
1.2 GB, three of them at once; 4/3 K^3 operations for U, N K^2 for rounding, or with a branch
2 N K^2 in each of 1 + ROUNDS turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops._prologue import rotate_blocks
from .errors import row_energy, row_error
from .grids import Grid, search
from .linear import QuantLinear
from .low_rank import ROUNDS, factorize
from .samples import Samples, Split
from .scheme import Scheme
from .smoothing import GAIN

DAMPING = 0.01  # of the mean of H's diagonal, as in GPTQ
BLOCK = 128  # columns whose errors reach the later ones in one product


@dataclass(frozen=True)
class Metric:
    """H, as the rounding needs it.

    mean     m [K]
    order    columns [K], largest H_ii first
    factor   U [K, K], upper triangular: (U^T U)^-1 is H in that order
    """

    mean: Tensor
    order: Tensor
    factor: Tensor

    @staticmethod
    def of(x: Tensor, weights: Tensor, centred: bool) -> Metric:
        """Return the metric of rows x [R, K] that count by weights [R], float64."""
        x, weights = x.double(), weights / weights.sum()
        mean = weights @ x
        if not centred:
            mean = torch.zeros_like(mean)
        rows = (x - mean) * weights.sqrt()[:, None]
        h = rows.mT @ rows
        diagonal = h.diagonal().clone()
        order = diagonal.argsort(descending=True, stable=True)
        h = h[order][:, order]
        h.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)
        lower = torch.linalg.cholesky(h)
        factor = torch.linalg.cholesky(torch.cholesky_inverse(lower, out=h), upper=True)
        return Metric(mean.float(), order, factor.float())

    def importance(self) -> Tensor:
        """Return 1 / (H^-1)_kk [K]."""
        found = torch.empty_like(self.mean)
        found[self.order] = 1 / self.factor.square().sum(0)
        return found

    def whiten(self, d: Tensor) -> Tensor:
        """Return D R [N, K] of an error D, R R^T = H: its energy is tr(D H D^T)."""
        return torch.linalg.solve_triangular(self.factor, d[:, self.order], upper=True, left=False)

    def restore(self, whitened: Tensor) -> Tensor:
        """Return D of D R."""
        d = torch.empty_like(whitened)
        d[:, self.order] = whitened @ self.factor
        return d


def round_columns(weight: Tensor, grid: Grid, metric: Metric) -> tuple[Tensor, Tensor]:
    """Return codes and values [N, K] of a float32 weight, each making up for earlier ones."""
    order, factor = metric.order, metric.factor
    places = order.tolist()
    left = weight.mT[order]  # a copy whose rows are columns: each is read whole
    codes, values = torch.empty_like(left), torch.empty_like(left)
    pivots = factor.diagonal().tolist()
    for start in range(0, len(places), BLOCK):
        stop = min(start + BLOCK, len(places))
        errors = left.new_empty((stop - start, left.shape[1]))
        for i in range(start, stop):
            codes[i], values[i] = grid.round(left[i], places[i])
            error = errors[i - start]
            torch.sub(left[i], values[i], out=error).div_(pivots[i])
            left[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].mT, errors, alpha=-1)
    back = order.argsort()
    return codes[back].mT.contiguous(), values[back].mT.contiguous()


@dataclass(frozen=True)
class _Space:
    """Where the weight is quantised: columns times smooth, then rotated."""

    smooth: Tensor | None
    rotate: int

    def weight(self, weight: Tensor) -> Tensor:
        """Return a float32 weight [N, K], or a branch's down, as it meets `inputs`."""
        return rotate_blocks(weight if self.smooth is None else weight * self.smooth, self.rotate)

    def back(self, weight: Tensor) -> Tensor:
        """Undo `weight`."""
        weight = rotate_blocks(weight, self.rotate)
        return weight if self.smooth is None else weight / self.smooth

    def inputs(self, x: Tensor) -> Tensor:
        """Return float32 inputs [R, K] as they meet the weight."""
        return rotate_blocks(x if self.smooth is None else x / self.smooth, self.rotate)


@dataclass(frozen=True)
class _Branch:
    """down [R, K] and up [N, R] in the layer's dtype; rows is down as it meets the weight."""

    down: Tensor
    up: Tensor
    rows: Tensor

    @staticmethod
    def of(down: Tensor, up: Tensor, space: _Space, dtype: torch.dtype) -> _Branch:
        """Return the branch of float32 factors in the space of the weight."""
        down = space.back(down)
        # Of one size: neither leaves the range of 16 bits before the other.
        balance = (up.norm(dim=0) / down.norm(dim=1)).sqrt().nan_to_num(1.0, 1.0, 1.0)
        balance = torch.where(balance > 0, balance, torch.ones_like(balance))
        down, up = (down * balance[:, None]).to(dtype), (up / balance).to(dtype)
        return _Branch(down, up, space.weight(down.float()))

    def taken(self) -> Tensor:
        """Return what the branch holds of the weight, float32 [N, K]."""
        return self.up.float() @ self.rows

    def left(self, whitened: Tensor, metric: Metric) -> float:
        """Return the energy that the branch leaves of an error D R."""
        return float((whitened - self.up.float() @ metric.whiten(self.rows)).square().sum())


@torch.no_grad()
def compensate(
    linear: nn.Linear, scheme: Scheme, samples: Samples, smooth: Tensor | None = None
) -> QuantLinear:
    """Return the quantised layer whose rounding makes up for itself on these rows.

    Args:
        linear: the layer; left as it is. One that `QuantLinear.from_linear` takes.
        scheme: how to quantise it.
        samples: of its input.
        smooth: factors [K] in the layer's dtype, as in `QuantLinear.from_linear`.
    """
    scheme = scheme.of(linear.in_features)
    plain = replace(scheme, rotate=0, smooth=False)
    dtype = linear.weight.dtype
    space = _Space(None if smooth is None else smooth.float(), scheme.rotate)
    bias = None if linear.bias is None else linear.bias.detach().float()
    weight = linear.weight.detach().float()
    samples = samples.to(weight)
    x, counts = samples.rows, samples.counts
    # What each row counts: `row_error` is their sum of squared errors so weighted.
    weights = counts / row_energy(F.linear(x, weight, bias), counts)
    metric = Metric.of(space.inputs(x), weights, bias is not None)
    weight = space.weight(weight)
    importance = metric.importance()
    best: tuple[float, Grid, Tensor, Tensor, _Branch | None] | None = None
    if not scheme.rank:
        grid = search(weight, plain, importance)
        best = 0.0, grid, *round_columns(weight, grid, metric), None
    else:
        branch = _Branch.of(*factorize(weight, scheme.rank, torch.float32), space, dtype)
        for _ in range(1 + ROUNDS):
            rest = weight - branch.taken()
            grid = search(rest, plain, importance)
            codes, values = round_columns(rest, grid, metric)
            error = metric.whiten(weight - values)
            down, up = factorize(error, scheme.rank, torch.float32)
            refitted = _Branch.of(metric.restore(down), up, space, dtype)
            for tried in (branch, refitted):  # rounding to 16 bits can make the new one worse
                energy = tried.left(error, metric)
                if best is None or energy < best[0]:
                    best = energy, grid, codes, values, tried
            branch = refitted
    assert best is not None
    _, grid, codes, values, kept = best
    if bias is not None:
        error = weight - values if kept is None else weight - values - kept.taken()
        bias = (bias + error @ metric.mean).to(linear.bias)
    layer = QuantLinear.kinds[scheme.kind](
        grid.pack(codes),
        grid.scale,
        bias,
        *((None, None) if kept is None else (kept.down, kept.up)),
        smooth,
        dtype=dtype,
        rotate=scheme.rotate,
    )
    return layer.train(linear.training)


@torch.no_grad()
def quantize_compensated(
    linear: nn.Linear, rounded: QuantLinear, ways: Sequence[Split], *, literal: bool = False
) -> tuple[QuantLinear, float, float]:
    """Return (layer, its error, the error of `rounded`): compensated where that errs less.

    Both errors are `row_error` over what the first split holds out. Less is less by `GAIN` than
    what it is taken instead of, on everything that each of the splits judges by.

    Args:
        linear: the layer; left as it is.
        rounded: its quantised form, rounded to nearest. Its smoothing is tried, and none.
        ways: splits of samples of its input, one at least. The layer is fitted to the first one's.
        literal: keep the smoothing that `rounded` has.
    """
    before = [held_out_errors(linear, rounded, split) for split in ways]
    scheme = rounded.scheme
    best, least = rounded, before
    for smooth in {id(s): s for s in (None, rounded.smooth)}.values():
        if literal and smooth is not rounded.smooth:
            continue
        tried = replace(scheme, smooth=smooth is not None)
        layers, found = [], []
        for split, bounds in zip(ways, least, strict=True):
            try:
                layers.append(compensate(linear, tried, split.fitted, smooth))
            except torch.linalg.LinAlgError:  # inputs beyond what float32 can multiply
                break
            found.append(held_out_errors(linear, layers[-1], split))
            if not all(e < bound * GAIN for e, bound in zip(found[-1], bounds, strict=True)):
                break
        else:
            best, least = layers[0], found
    return best, least[0][0], before[0][0]


@torch.no_grad()
def held_out_errors(linear: nn.Linear, layer: nn.Module, split: Split) -> list[float]:
    """Return the `row_error` of a layer that stands for `linear`, over each of what judges it."""
    bias = None if linear.bias is None else linear.bias.float()
    errors = []
    for held in split.judges():
        held = held.to(linear.weight)
        want = F.linear(held.rows.float(), linear.weight.float(), bias)
        errors.append(row_error(layer(held.rows), want, held.counts))
    return errors
