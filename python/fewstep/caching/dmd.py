"""DMD: outputs carried on as a sum of exponentials, found in the products of a few snapshots.

    E_0, E_1, ...        outputs at equal distances back from the newest full step, E_0 that of it
    D_i = E_i - E_{i+1}
    D_0 ~ c_1 D_1 + c_2 D_2      least squares, by sample: all that is needed are <D_i, D_j>
    lambda_1, lambda_2           roots of z^2 = c_1 z + c_2, what a mode grows by in one distance
    E(h) = E_0 + u_0 D_0 + u_1 D_1     h distances ahead;  (u_0, u_1) the first row of f(F),
                                 F = [[c_1, c_2], [1, 0]],  f(z) = z (z^h - 1) / (z - 1)

Dynamic mode decomposition as in cache-dit's calibrator takes a tall singular value decomposition of
the snapshots and their modes at full length. Its forecast is in the span of the snapshots, so that
the matrix of products has all that it knows: here a gap is a few numbers a sample, found on the
device and without a wait, and what is put in is a sum of weights x snapshots. The products are
those of differences, since the snapshots' own would leave few digits; once a gap and pass the first
stream's snapshots are read for them, in slices (`snapshots.SLICE`), so that no difference is ever
held whole. What is held is the snapshots, `order` of every stream and pass.

Differences are what is predicted, which adds a mode that stays: weights sum to one, and constants
are exact whatever is found. With one mode more than there are roots to find the system is square.

Equal distances: the original takes as many of the newest snapshots as are equally far apart. So it
is here, the distance being that of the two newest, and where a snapshot is missing in between it is
interpolated through its neighbours by a cubic. Exponentials are reproduced where nothing had to be
interpolated. Below three outputs a Taylor sum stands in, as there.

On the digits and photograph models, with 10 to 18 of 50 steps in full, one mode does as well as
two, and neither three of them nor more snapshots than two modes need did better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import forecasters, schedules
from ._checks import check_choice, check_number
from .calls import Call
from .methods import Extrapolated, step_places
from .ring import Ring
from .scheduled import ScheduledSession, expect_one_size
from .shards import total

__all__ = ["Dmd", "DmdSession", "Gap", "equally_spaced", "exponential_weights"]

GROWTH = 2.0  # what a mode may grow by in one distance: those found in noise grow without limit
_NEAR = 1e-7  # of a root to 1, and half of that between two roots: limits are not taken exactly
_LEAST = 1e-12


@dataclass(frozen=True)
class Gap:
    """The skipped steps between two full ones.

    Args:
        start: the first of them.
        rank: full steps before it.
        rows: [m, K] weights of E_0 .. E_{m-1} on the newest outputs, newest first; m is 3 or 4.
        ahead: of every step of the gap, h.
    """

    start: int
    rank: int
    rows: tuple[tuple[float, ...], ...]
    ahead: tuple[float, ...]

    @property
    def needs(self) -> int:
        """How many snapshots are read."""
        return max(k + 1 for row in self.rows for k, weight in enumerate(row) if weight)


def equally_spaced(known: Sequence[float], count: int) -> tuple[tuple[float, ...], ...]:
    """Return the weights of up to `count` outputs at equal distances.

    Args:
        known: places of the full steps, newest first, at least two of them.
        count: how many are wanted; those before the oldest known one are not to be had.
    """
    distance = known[0] - known[1]
    slack = 1e-6 * abs(distance)
    rows = []
    for index in range(count):
        place = known[0] - index * distance
        near = [k for k, at in enumerate(known) if abs(at - place) <= slack]
        if near:
            rows.append(tuple(float(k == near[0]) for k in range(len(known))))
        elif abs(place - known[0]) < abs(known[-1] - known[0]):
            nearest = sorted(range(len(known)), key=lambda k, p=place: abs(known[k] - p))[:4]
            weights = forecasters.newton([known[k] for k in nearest], place, degree=3)
            found = dict(zip(nearest, weights, strict=True))
            rows.append(tuple(found.get(k, 0.0) for k in range(len(known))))
        else:
            break
    return tuple(rows)


def _prediction(products: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return c_1 and c_2 [B] of D_0 ~ c_1 D_1 (+ c_2 D_2)."""
    tiny = torch.finfo(torch.float32).tiny
    right = [products[:, 0, k] for k in range(1, products.shape[1])]
    if len(right) == 1:
        size = products[:, 1, 1]
        return right[0] / (size * (1 + ridge) + tiny), torch.zeros_like(size)
    first, both, second = (products[:, i, j] for i, j in ((1, 1), (1, 2), (2, 2)))
    lift = ridge * (first + second) / 2 + tiny
    first, second = first + lift, second + lift
    scale = first * second - both**2
    return (
        (second * right[0] - both * right[1]) / scale,
        (first * right[1] - both * right[0]) / scale,
    )


def _ahead(root: Tensor, ahead: Tensor) -> Tensor:
    """Return f [H, B] of the module's header, roots held to GROWTH."""
    root = root * (GROWTH / root.abs().clamp(min=GROWTH))
    root = torch.where(root.abs() < _LEAST, torch.full_like(root, _LEAST), root)
    root = torch.where((root - 1).abs() < _NEAR, torch.full_like(root, 1 + _NEAR), root)
    return root * (torch.exp(ahead[:, None] * root.log()) - 1) / (root - 1)


def exponential_weights(products: Tensor, ahead: Tensor, *, ridge: float) -> tuple[Tensor, Tensor]:
    """Return u_0 and u_1 [H, B] of the module's header.

    Args:
        products: [B, M, M], float64, of D_0, D_1 and, for two modes, D_2.
        ahead: h [H], float64.
        ridge: of the least squares, relative to the mean square of what D_0 is predicted from.
    """
    one, two = _prediction(products, ridge)
    centre = (one / 2).to(torch.complex128)
    apart = (centre**2 + two).sqrt()
    apart = torch.where(apart.abs() < _NEAR, torch.full_like(apart, _NEAR), apart)
    found = [_ahead(root, ahead) for root in (centre + apart, centre - apart)]
    # f(F) = alpha + beta F, which agrees with f on both roots.
    beta = (found[0] - found[1]) / (2 * apart)
    alpha = found[0] - beta * (centre + apart)
    return (alpha + beta * one).real, (beta * two).real


class DmdSession(ScheduledSession):
    """Finds the weights of a gap when its first step comes."""

    policy: Dmd

    def _plan_run(self, counted: int, index: Any) -> None:
        super()._plan_run(counted, index)
        start = self._start  # the policy counts from the run's first step
        gaps = self.policy.gaps(self._times[start:]) if self.forecasts else ()
        self._gaps = {
            start + gap.start + i: replace(
                gap, start=start + gap.start, rank=self._ranks[start + gap.start]
            )
            for gap in gaps
            for i in range(len(gap.ahead))
        }

    def _constants(self, gap: Gap, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return a gap's rows by slot, and h, on a device."""
        key = (gap, device)
        if key not in self._tables:
            order = self.policy.order
            rows = torch.zeros(len(gap.rows), order, dtype=torch.float64, device="cpu")
            for index, row in enumerate(gap.rows):
                for back, weight in enumerate(row, 1):
                    rows[index, (gap.rank - back) % order] = weight
            ahead = torch.tensor(gap.ahead, dtype=torch.float64, device="cpu")
            self._tables[key] = rows.to(device), ahead.to(device)
        return self._tables[key]

    @torch.compiler.disable
    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return the forecast."""
        gap, branch = self._gaps.get(call.step), call.branch
        if gap is None or branch.ring.count(gap.rank) < gap.needs:
            return super().recall(call)
        if branch.memory is None or branch.memory[0] != gap:
            expect_one_size(call)
            rows, ahead = self._constants(gap, call.form[-1])
            # The whole output is there on every rank; of the blocks each has its tokens.
            group = self.group if self.policy.scope == "blocks" else None
            branch.memory = gap, _weights(branch.ring, rows, ahead, self.policy.ridge, group)
        return branch.ring.forecast(branch.memory[1][call.step - gap.start])


def _weights(ring: Ring, rows: Tensor, ahead: Tensor, ridge: float, group: Any) -> Tensor:
    """Return the weights by slot of a gap's steps, [H, B, K]."""
    steps = rows[:-1] - rows[1:]
    products = total(ring.products(steps), group)
    first, second = exponential_weights(products, ahead, ridge=ridge)
    return rows[0] + first[..., None] * steps[0] + second[..., None] * steps[1]


@dataclass(frozen=True)
class Dmd(Extrapolated):
    """Exponentials through the newest full outputs; settings as of `Fora`.

    The scope is "output" or "blocks".

    Args:
        modes: how many exponentials beside what stays, 1 or 2 (then also a damped swing). Two
            snapshots more are kept.
        ridge: of the least squares, relative; more of it for outputs that are noisy.
        clock: "step" as in the original, or "time".
    """

    clock: str = "step"
    modes: int = 2
    ridge: float = 1e-6

    session = DmdSession

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("modes", self.modes, (1, 2))
        check_number("ridge", self.ridge, 0)
        check_choice("scope", self.scope, ("output", "blocks"))

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return self.modes + 2

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return what stands in where there are too few outputs."""
        return forecasters.taylor(known, target, degree=2)

    def gaps(self, times: Sequence[float]) -> tuple[Gap, ...]:
        """Return the gaps of a grid that exponentials are fitted for."""
        places = step_places(times, self.clock)
        full = schedules.every_nth(len(times), self.every, warmup=self.warmup, tail=self.tail)
        found = []
        for rank, (start, end) in enumerate(zip(full, (*full[1:], len(times)), strict=True), 1):
            known = [places[step] for step in full[:rank]][::-1][: self.order]
            if end == start + 1 or len(known) < 3:
                continue
            rows = equally_spaced(known, self.order)
            distance = known[0] - known[1]
            if len(rows) > 2:
                ahead = tuple((places[s] - known[0]) / distance for s in range(start + 1, end))
                found.append(Gap(start + 1, rank, rows, ahead))
        return tuple(found)
