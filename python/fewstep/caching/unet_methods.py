"""Published methods that know a UNet's encoder and levels, as presets.

    method            which steps run in full         what the others run
    DeepCache         every n-th                      the outermost levels    (arXiv 2312.00858)
    FasterDiffusion   key steps, denser at the start  the decoder             (arXiv 2312.09608)
    Tiue              the first                       the decoder, all at once

TiUE ("time-independent unified encoder": Loopfree) is a student that was trained to decode all its
steps from one run of the encoder; on a model that was not, the first step's features have to stand
for the whole image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import forecasters
from ._checks import check_choice, check_count
from .encoder import EncoderSession
from .methods import forecast_steps
from .policy import Forecasts, Interval
from .snapshots import FORMATS

__all__ = ["DeepCache", "FasterDiffusion", "Tiue"]

# The published ones of Stable Diffusion with 50 steps of DDIM.
_KEY_STEPS, _OF = (0, 1, 2, 3, 5, 10, 15, 25, 35), 50


@dataclass(frozen=True)
class DeepCache:
    """Run every n-th step in full; on the others, a UNet's outermost levels alone.

    Args:
        every: n; 1 never skips.
        level: of the innermost level that every step runs: 0 is the outermost. Its up block gets
            the stored features of the level below.
    """

    every: int = 3
    level: int = 0

    first, last, measures, scope = 1, 0, False, "levels"

    def __post_init__(self) -> None:
        check_count("every", self.every, 1)
        check_count("level", self.level, 0)

    def must_run(self, step: int, since_full: int) -> str | None:
        """Every n-th step of the run, or a state that is older than that."""
        return Interval(self.every).must_run(step, since_full)

    def small_change(self, change: Tensor) -> bool:
        """Never asked: the decision needs no measurement."""
        return True


@dataclass(frozen=True)
class FasterDiffusion:
    """Run a UNet's encoder on key steps; its decoder goes on from their features.

    Args:
        every: distance of key steps; None takes `key_steps`.
        key_steps: numbers of the steps, 0 among them; None takes the published nine of 50, moved
            to the length of the run.
        parallel: whether a key step decodes for the steps up to the next one in one batch.
        snapshots: how features are kept, as of `Kept`; None as they were computed.
    """

    every: int | None = None
    key_steps: tuple[int, ...] | None = None
    parallel: bool = False
    snapshots: str | None = None

    scope, order, session, restarts = "encoder", 1, EncoderSession, True

    def __post_init__(self) -> None:
        if self.every is not None:
            check_count("every", self.every, 1)
            if self.key_steps is not None:
                raise ValueError("every: expected it or key_steps, got both")
        for step in self.key_steps or ():
            check_count("key_steps", step, 0)
        if self.key_steps is not None and 0 not in self.key_steps:
            raise ValueError(f"key_steps: expected 0 among them, got {self.key_steps!r}")
        if not isinstance(self.parallel, bool):
            raise TypeError(f"parallel: expected a bool, got {self.parallel!r}")
        if self.snapshots is not None:
            check_choice("snapshots", self.snapshots, tuple(FORMATS))

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid."""
        steps = len(times)
        if self.every is not None:
            full = set(range(0, steps, self.every))
        elif self.key_steps is not None:
            full = set(self.key_steps)
        else:
            full = {round(step * steps / _OF) for step in _KEY_STEPS}
        if steps and max(full) >= steps:
            raise ValueError(
                f"cache: expected a run of more than {max(full)} steps, which {self!r} names, "
                f"got {steps}"
            )
        return forecast_steps(tuple(sorted(full)), times, forecasters.reuse, clock="step")


@dataclass(frozen=True)
class Tiue:
    """Run a UNet's encoder on the first step alone: for students that were trained so.

    Args:
        parallel: whether all decoders run then, in one batch.
    """

    parallel: bool = True

    scope, order, session, restarts = "encoder", 1, EncoderSession, True

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return the decisions for a grid."""
        return FasterDiffusion(key_steps=(0,)).forecasts(times)
