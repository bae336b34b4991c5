"""When a step may skip its middle blocks.

    first-block   r_t = h_first - h_0 at step t;  a sample skips if
                  sum |r_t - r_p| / sum |r_p| < threshold,  p = its last step that ran in full
    interval      run in full every n-th step, skip the middle blocks in between

A skipped step adds the middle blocks' residual of the last full step instead of running them. The
first step, the last step and every step whose state is missing or too old always run in full.

Every sample of a batch has decisions and a state of its own: where one of them wants a full step
the model runs, and the others take what a skipped step would have given them. So, for one size of
the batch, no bit of an image depends on its batch-mates.

first-block is ParaAttention's First Block Cache (diffusers: FirstBlockCache), which decides by the
mean over the batch. interval is the rule of DeepCache (arXiv 2312.00858) and FORA (arXiv
2407.01425), on residuals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ._checks import check_count, check_number

__all__ = [
    "CachePolicy",
    "FirstBlock",
    "Forecasts",
    "Interval",
    "ScheduledPolicy",
    "Threshold",
    "check_ends",
]

# Per step: None runs in full; else the weights of the newest outputs of full steps, newest first.
Forecasts = tuple[tuple[float, ...] | None, ...]


@runtime_checkable
class CachePolicy(Protocol):
    """What decides. `first` and `last` blocks of a transformer stack run on every step.

    A UNet always keeps its outermost down and up block, whatever `first` and `last` say. What a
    policy may have besides is what `ScheduledPolicy` names: `scope`, here "blocks" where it is not
    said, "levels" (a UNet's) or "output", and `session`.
    """

    first: int
    last: int
    measures: bool  # whether `small_change` wants the change of the first blocks' residual

    def must_run(self, step: int, since_full: int) -> str | None:
        """Reason why this step runs in full, known before it starts; None if it may skip.

        `step` counts from 0 in the run, `since_full` the distance to the sample's last full one.
        """

    def small_change(self, change: Tensor) -> Tensor | bool:
        """Whether the change [B] of the first blocks' residual is small enough to skip.

        Returns:
            [B] by sample, or one answer for all of them.
        """


@runtime_checkable
class ScheduledPolicy(Protocol):
    """What knows every decision before the run starts: nothing is left to measure at run time.

    What is forecast, by `scope`:

        "output"     the model's output
        "blocks"     the residual of its middle blocks
        "block"      the residual of every block by itself
        "module"     the output of every attention and feed-forward layer
        "encoder"    nothing: a UNet's decoder runs on what its encoder gave last
        "tokens"     the output of the tokens that are left out; the others run

    A policy may have besides:

        restarts        whether a run of a grid's last steps has the schedule of these alone; else,
                        as by default, the grid's, in full until enough snapshots are there
        session         the class that follows runs and decides, a `Session`; by default the
                        scope's. It may ask for more, such as `share` of "tokens"
        snapshots       how snapshots are kept, a name of `snapshots.FORMATS`; as computed by
                        default
        modules         with "block" and "module", which: a pattern or names; by default all
        forecasts_for   with these, (name, times) -> a schedule for each
    """

    scope: str
    order: int  # K, snapshots that are kept

    def forecasts(self, times: Sequence[float]) -> Forecasts:
        """Return what to do at every step of a grid.

        Args:
            times: the scheduler's timesteps, in the order of the run.

        Raises:
            ValueError: the grid is not one that this policy serves.
        """


@dataclass(frozen=True)
class Threshold:
    """What all that skip below a threshold have in common."""

    threshold: float
    max_skips: int
    warmup: int

    measures = True

    def __post_init__(self) -> None:
        check_number("threshold", self.threshold, 0)
        check_count("max_skips", self.max_skips, 0)
        check_count("warmup", self.warmup, 1)

    def must_run(self, step: int, since_full: int) -> str | None:
        """Warm-up, or too many skips in a row."""
        if step < self.warmup:
            return "warm-up"
        return "max_skips reached" if since_full > self.max_skips else None

    def small_change(self, change: Tensor) -> Tensor:
        """By sample; a NaN is never small."""
        return change < self.threshold


@dataclass(frozen=True)
class FirstBlock(Threshold):
    """Skip while the first block's residual barely changes.

    Args:
        threshold: largest relative L1 change that counts as barely, exclusive; 0 never skips.
        max_skips: at most this many skipped steps in a row.
        warmup: steps at the start that always run in full.
        first: blocks that run on every step and are measured.
        last: blocks at the end that run on every step.
    """

    threshold: float = 0.08
    max_skips: int = 3
    warmup: int = 1
    first: int = 1
    last: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("first", self.first, 1)
        check_count("last", self.last, 0)


@dataclass(frozen=True)
class Interval:
    """Run in full every n-th step, skip the middle blocks otherwise.

    Args:
        every: distance of full steps; 1 never skips.
        first: blocks at the start that run on every step.
        last: blocks at the end that run on every step.
    """

    every: int = 2
    first: int = 1
    last: int = 1

    measures = False

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("first", 1), ("last", 0)):
            check_count(name, getattr(self, name), least)

    def must_run(self, step: int, since_full: int) -> str | None:
        """Every n-th step of the run, or a state that is older than that."""
        return "interval" if step % self.every == 0 or since_full >= self.every else None

    def small_change(self, change: Tensor) -> bool:
        """Never asked: the decision needs no measurement."""
        return True


def check_ends(policy: CachePolicy) -> None:
    """Raise where a policy's `first` or `last` can't be."""
    # What decides before the model runs needs no block for it.
    for name, least in (("first", int(not getattr(policy, "early", False))), ("last", 0)):
        check_count(f"cache: {name} of {policy!r}", getattr(policy, name), least)
