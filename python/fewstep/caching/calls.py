"""What a session knows of a guidance branch and of a call of the denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from .ring import Ring

__all__ = ["Branch", "Call", "Decided"]


@dataclass
class Branch:
    """State of one guidance branch: what its last full step left behind."""

    name: str
    conditioning: Any = None
    full_at: tuple[int, ...] | None = None  # step of the last full run, by sample
    form: tuple[Any, ...] = ()  # shape, dtype and device of the hidden state there
    probe: Tensor | None = None  # the first blocks' residual there
    ring: Ring | None = None  # outputs of the newest full steps, where a schedule forecasts
    kept: tuple[Any, ...] = ()  # what the layout stored there
    rebuild: Any = None  # makes an output of the model of its parts
    steady: bool = False  # whether its conditioning was the same tensor on two steps of the run
    replaced: bool = False  # whether it is another one now
    memory: Any = None  # what else the session knows of the steps before
    errors: dict[int, Tensor] = field(default_factory=dict)  # of forecasts, by step of the run
    decisions: list[str] = field(default_factory=list)  # "full", "half", "part" or "skip"
    why: list[str | None] = field(default_factory=list)  # these ran in full, or in part
    changes: dict[int, Tensor] = field(default_factory=dict)  # that were measured, [B] by place

    def note(self, decision: str, why: str | None = None) -> None:
        """Add a step to the record."""
        self.decisions.append(decision)
        self.why.append(why)

    def correct(self, decision: str, why: str | None = None) -> None:
        """Say something else of the last step."""
        self.decisions[-1], self.why[-1] = decision, why

    def forget(self) -> None:
        """Drop the tensors, keep the record of decisions."""
        self.full_at, self.probe, self.kept, self.conditioning = None, None, (), None
        self.memory = None
        if self.ring is not None:
            self.ring.clear()


class Decided(NamedTuple):
    """What a pass decided, for the passes of its step that are given the same."""

    given: Tensor  # what entered the model
    reasons: list[str | None]  # by sample, why it runs in full


@dataclass
class Call:
    """One call of the denoiser."""

    branch: Branch | None  # None: run as if there were no cache
    step: int = 0
    is_last: bool = False
    skip: bool = False
    flags: Any = None  # of the guard: the samples that a skipped step computes all the same
    form: tuple[Any, ...] = ()  # of what entered the model
    place: int = 0  # among the calls of its step
    half: slice | None = None  # the rows of the batch that are computed, where not all are
    given: Tensor | None = None  # what entered the model
    arguments: dict[str, Any] = field(default_factory=dict)  # all of it, by name
    entry: Tensor | None = None  # the layout's scratch: what entered the model or block 0,
    head: tuple[Any, ...] = ()  # what left the last block that always runs,
    done: bool = False  # and whether the stored features were put in
    copies: int = 1  # of the batch: what lies behind a UNet's encoder may run for several steps
    stays: Tensor | None = None  # [B], the samples of a full step that take the stored features,
    before: tuple[Any, ...] = ()  # these features,
    since: tuple[int, ...] = ()  # and the step of every sample's last full run after this one
