"""Region-adaptive sampling: on most steps a share of the tokens alone goes through the model.

    r[n] = spread(v[n]) exp(starvation d[n])     v: the newest output, d: how often n was left out
    computed: the M = round(share N) tokens of the largest r, of every sample
    the others keep v[n]; attention reads their keys and values of the step that computed them last

RAS (arXiv 2502.10389). Dense steps at the start, and one in `every` after that, end the drift of
what is kept. The number of tokens is fixed, so nothing is read back and shapes never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import schedules
from ._checks import check_choice, check_count, check_number
from .methods import forecast_steps
from .policy import Forecasts
from .token_session import TokenSession

__all__ = ["Ras"]


@dataclass(frozen=True)
class Ras:
    """Run a share of the tokens on all but the first steps and one in n.

    Args:
        share: of the tokens, above 0; 1 computes all of them.
        every: n; 1 runs every step in full.
        warmup: steps at the start that always run in full.
        tail: steps at the end that do.
        starvation: how much a token's rank grows with every step that left it out.
        metric: what ranks a token of the output: "std" of its channels, or "l2", their norm; both
            as the mean over its pixels.
    """

    share: float = 0.5
    every: int = 9
    warmup: int = 4
    tail: int = 0
    starvation: float = 0.5
    metric: str = "std"

    scope = "tokens"
    order = 1
    session = TokenSession
    restarts = True

    def __post_init__(self) -> None:
        check_number("share", self.share, 0, above=True, most=1)
        for name, least in (("every", 1), ("warmup", 1), ("tail", 0)):
            check_count(name, getattr(self, name), least)
        check_number("starvation", self.starvation, 0)
        check_choice("metric", self.metric, ("std", "l2"))

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid: None where all tokens are computed."""
        full = schedules.every_nth(len(times), self.every, warmup=self.warmup, tail=self.tail)
        return forecast_steps(full, times, lambda known, target: (1.0,), clock="step")
