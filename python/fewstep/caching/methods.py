"""Published methods whose every decision is known before the run, as presets of one machine.

    method   which steps run in full    what stands for the others
    Fora     every n-th                 the newest output              FORA (arXiv 2407.01425)
    Taylor   warm-up, every n-th        a Taylor sum                   TaylorSeer (arXiv 2503.06923)
    Newton   the same                   the polynomial through points  the exact form of it
    HiCache  the same                   scaled Hermite polynomials     HiCache (arXiv 2508.16984)
    FoCa     the same                   BDF2 and Heun                  FoCa (arXiv 2508.16211)
    Scm      an explicit mask           a Taylor sum, or the newest    cache-dit's steps mask

`forecasters` has the weights, `schedules` the steps. With scope "output" the model's output is
forecast and a skipped step runs nothing of the model; with "blocks" it is the residual of all its
blocks (of a UNet: what enters its outermost up block), as in TaylorSeer-Lite and cache-dit. With
"block" every block has a forecast of its own, with "module" every attention and feed-forward layer,
as in the originals: that costs memory, which `snapshots` makes less (`snapshots.py`).

Forecasters see the scheduler's times in units of the grid's mean step, or, where `clock` is "step"
as in the originals, the numbers of the steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from . import forecasters, schedules
from ._checks import check_choice, check_count, check_number
from .kept import Kept
from .policy import Forecasts
from .ring import MAX_ORDER
from .schedules import Schedule

__all__ = [
    "Extrapolated",
    "FoCa",
    "Fora",
    "HiCache",
    "Newton",
    "Scm",
    "Taylor",
    "forecast_steps",
    "step_places",
]

_CLOCKS = ("time", "step")


def step_places(times: Sequence[float], clock: str) -> list[float]:
    """Return where the steps are, the mean step as the unit."""
    falling = all(a > b for a, b in pairwise(times))
    rising = all(a < b for a, b in pairwise(times))
    # Samplers of second order give a time to two steps: these can only be told by their number.
    if clock == "step" or len(times) < 2 or not (falling or rising):
        return [float(index) for index in range(len(times))]
    unit = (times[0] - times[-1]) / (len(times) - 1)
    return [(times[0] - time) / unit for time in times]


def forecast_steps(
    full: Schedule,
    times: Sequence[float],
    weights: Callable[[Sequence[float], float], tuple[float, ...]],
    *,
    clock: str = "time",
) -> Forecasts:
    """Return the decisions of a schedule and a forecaster for a grid.

    Args:
        full: the full steps.
        times: the scheduler's timesteps.
        weights: of the full steps at these times, newest first, for a target time.
        clock: "time", or "step" where the forecaster is to see numbers of steps instead.

    Raises:
        ValueError: no times, so that nobody knows how many steps there are.
    """
    if not len(times):
        raise ValueError(
            "cache: expected a scheduler that lists its timesteps, which tell how many steps a run "
            'has; got none. cache="interval" and "first-block" need no list'
        )
    places = step_places(times, clock)
    wanted, known = set(full), []
    steps: list[tuple[float, ...] | None] = []
    for index, place in enumerate(places):
        if index in wanted:
            known.insert(0, place)
            steps.append(None)
        else:
            steps.append(weights(known[:MAX_ORDER], place))
    return tuple(steps)


@dataclass(frozen=True)
class Fora(Kept):
    """Run every n-th step in full and repeat its output in between.

    Args:
        every: n; 1 never skips.
        warmup: steps at the start that always run in full.
        tail: steps at the end that do.

    `scope`, `modules` and `snapshots`: as of `Kept`.
    """

    every: int = 3
    warmup: int = 1
    tail: int = 0

    clock = "step"
    restarts = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("every", 1), ("warmup", 1), ("tail", 0)):
            check_count(name, getattr(self, name), least)
        check_choice("clock", self.clock, _CLOCKS)

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return 1

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return the weights of the newest full steps."""
        return forecasters.reuse(known, target)

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid."""
        full = schedules.every_nth(len(times), self.every, warmup=self.warmup, tail=self.tail)
        return forecast_steps(full, times, self.weights, clock=self.clock)


@dataclass(frozen=True)
class Extrapolated(Fora):
    """What FORA keeps, carried on by a forecaster.

    Args:
        every: n; 1 never skips.
        warmup: steps at the start that always run in full, so that there is something to carry on.
        tail: steps at the end that do.
        clock: "time" or "step": what the forecaster sees.
    """

    every: int = 4
    warmup: int = 3
    clock: str = "time"


@dataclass(frozen=True)
class _Polynomial(Extrapolated):
    """An extrapolation of a degree.

    Args:
        degree: of the polynomial, 1 to 7; one snapshot more is kept.
    """

    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("degree", self.degree, 1)
        if self.degree >= MAX_ORDER:
            raise ValueError(f"degree: expected at most {MAX_ORDER - 1}, got {self.degree}")

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return self.degree + 1


@dataclass(frozen=True)
class Taylor(_Polynomial):
    """TaylorSeer: differences of the full outputs as derivatives of a Taylor sum.

    Settings as of `Fora`, with `degree`, 1 to 7, and `clock`.
    """

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return the weights of the newest full steps."""
        return forecasters.taylor(known, target, degree=self.degree)


@dataclass(frozen=True)
class Newton(_Polynomial):
    """The polynomial through the newest full outputs: what TaylorSeer approximates.

    Settings as of `Fora`, with `degree`, 1 to 7, and `clock`.
    """

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return the weights of the newest full steps."""
        return forecasters.newton(known, target, degree=self.degree)


@dataclass(frozen=True)
class HiCache(_Polynomial):
    """HiCache: Hermite polynomials in place of TaylorSeer's powers.

    Settings as of `Fora`, with `degree`, 1 to 7, and `clock`.

    Args:
        scale: of the polynomials' argument and value; smaller ones hold the forecast back.
    """

    scale: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("scale", self.scale, 0, above=True)

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return the weights of the newest full steps."""
        return forecasters.hermite(known, target, degree=self.degree, scale=self.scale)


@dataclass(frozen=True)
class FoCa(Extrapolated):
    """FoCa: a BDF2 prediction corrected by Heun's rule.

    Settings as of `Fora`, with `clock`.
    """

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return 3

    def weights(self, known: Sequence[float], target: float) -> tuple[float, ...]:
        """Return the weights of the newest full steps."""
        return forecasters.foca(known, target)


@dataclass(frozen=True)
class Scm(Kept):
    """Run the steps of a mask in full; a Taylor sum stands for the others.

    Args:
        mask: 1 (full) or 0 per step, as a sequence or as text such as "11101000"; `from_bins` makes
            one of runs, and LeMiCa's schedule (`schedules.minimax`) is one by `Scm.of`.
        degree: of the sum; 0 repeats the newest output.
        clock: "time" or "step": what the sum sees.

    `scope`, `modules` and `snapshots`: as of `Kept`.
    """

    mask: str | tuple[int, ...]
    degree: int = 0
    clock: str = "time"

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.from_mask(self.mask)
        check_count("degree", self.degree, 0)
        if self.degree >= MAX_ORDER:
            raise ValueError(f"degree: expected at most {MAX_ORDER - 1}, got {self.degree}")
        check_choice("clock", self.clock, _CLOCKS)

    @classmethod
    def of(cls, full: Schedule, steps: int, **settings: object) -> Scm:
        """Return the policy of a schedule."""
        return cls(tuple(int(index in full) for index in range(steps)), **settings)

    @property
    def order(self) -> int:
        """Snapshots that are kept."""
        return self.degree + 1

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid, which must have the mask's length."""
        if len(times) != len(self.mask):
            raise ValueError(
                f"cache: expected a run of the mask's {len(self.mask)} steps, got {len(times)}"
            )
        return forecast_steps(
            schedules.from_mask(self.mask),
            times,
            lambda known, target: forecasters.taylor(known, target, degree=self.degree),
            clock=self.clock,
        )
