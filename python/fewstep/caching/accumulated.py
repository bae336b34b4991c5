"""Skip while the change of what enters the model, summed over steps, is small.

    e := e + d_t at every step, by sample;  skip while e < threshold;  a full step sets e := 0

    TeaCache    d = P(|h_t - h_{t-1}| / |h_{t-1}|), h what enters the first block, P a polynomial
                that makes of it the change of the output        (arXiv 2411.19108)
    EasyCache   d = k |x_t - x_{t-1}| / |v_f|, x what enters the model, v_f its output on the last
                full step f, k = |v_f - v_g| / |x_f - x_g| of the two last ones; a skipped step
                gives x_t + (v_f - x_f)                          (arXiv 2507.02860)

|.| is the mean of magnitudes over a sample. TeaCache takes h behind the first block's norm and
modulation, which are other code in every model; here it is what enters them, so that coefficients
fitted by its authors do not carry over and the default is P(c) = c. The first block runs on every
step. EasyCache lets the guided pass decide for the unguided one; here the pass that runs first
decides for those behind it (session.py), and all of them sum up, for steps that drop a pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_count, to_numbers
from .calls import Call
from .policy import Threshold
from .session import Session, blend
from .shards import measure

__all__ = ["EasyCache", "InputSession", "TeaCache"]


@dataclass
class Memory:
    """What a branch knows of the steps before, by sample."""

    entry: Tensor  # what entered on the last step
    error: Tensor  # [B], e
    full_entry: Tensor | None = None  # what entered on the last full step,
    full_output: Tensor | None = None  # and what the model made of it
    gain: Tensor | None = None  # [B], k
    group: Any = None  # of the ranks, where each has a share of the entry


def _mean(x: Tensor) -> Tensor:
    return x.flatten(1).abs().mean(1, dtype=torch.promote_types(x.dtype, torch.float32))


def _shapes(call: Call) -> str:
    return f"samples of {[list(x) for x in call.form[0][1:]]}" if call.form else "none"


class InputSession(Session):
    """Sums what the policy makes of every step's input."""

    remember: type[Memory] = Memory

    def enter(self, call: Call) -> None:
        """Decide before the model runs, by what enters it, where the policy wants that."""
        if not self.policy.early or call.branch is None:
            return
        if call.entry is None:
            raise ValueError(
                "cache: expected a model that is given one tensor, or a list of samples of one "
                f"size, got {_shapes(call)}; {self.policy!r} looks at them"
            )
        self._decide(call, call.entry, call.entry)

    def decide(self, call: Call, entry: Tensor, output: Tensor) -> None:
        """Decide by what entered the first block, where the policy wants that."""
        if not self.policy.early:
            self._decide(call, entry, output)

    @torch.compiler.disable
    def _decide(self, call: Call, entry: Tensor, output: Tensor) -> None:
        """Set `call.skip` and `call.stays`."""
        branch, form = call.branch, self._form(call, output)
        if form is None:
            return
        reasons = self._must_run(call, branch, form)
        if call.is_last:  # it runs, and nothing is compared with it
            self._settle(call, reasons, output.device)
            branch.form = form
            return
        entry = self.seen(call, entry)
        memory: Memory | None = branch.memory
        if memory is None or memory.entry.shape != entry.shape:
            memory = branch.memory = self.remember(entry, _mean(entry) * 0, group=self.group)
        elif not all(reasons):
            memory.error = memory.error + self.policy.increment(memory, entry)
            reasons = self._judge(call, reasons, memory.error)
        self._settle(call, reasons, output.device)
        memory.entry = entry.detach().clone()
        if not call.skip:
            nothing = torch.zeros_like(memory.error)
            stays = call.stays
            memory.error = nothing if stays is None else blend(stays, memory.error, nothing)
            branch.form = form

    def seen(self, call: Call, entry: Tensor) -> Tensor:
        """Return what is compared of what entered: here, all of it."""
        return entry

    @torch.compiler.disable
    def keep(self, call: Call, *kept: Any) -> None:
        """Store the features of a full step, and what the policy learns of them."""
        branch = call.branch
        if branch is None or call.is_last:
            return
        if any(isinstance(part, Tensor) and part.requires_grad for part in kept):
            self.reasons["gradients wanted"] += 1
            branch.forget()
            return
        if getattr(self.policy, "scope", "blocks") == "output":
            # The pipeline may write to what the model returns; residuals are nobody else's.
            kept = tuple(part.clone() if isinstance(part, Tensor) else part for part in kept)
        super().keep(call, *self.policy.learn(branch.memory, call, kept))

    def recall(self, call: Call) -> tuple[Any, ...]:
        """Return what stands for a skipped call."""
        kept = super().recall(call)
        return (self.policy.carry(call.branch.memory, kept[0], call), *kept[1:])


@dataclass(frozen=True)
class TeaCache(Threshold):
    """Skip while the first block's input has changed little since the last full step.

    Args:
        threshold: of the accumulated change, exclusive; 0 never skips.
        coefficients: of P, highest power first.
        max_skips: at most this many skipped steps in a row.
        warmup: steps at the start that always run in full.
        first: blocks that run on every step.
        last: blocks at the end that do.
    """

    threshold: float = 0.15
    coefficients: tuple[float, ...] = (1.0, 0.0)
    max_skips: int = 8
    warmup: int = 1
    first: int = 1
    last: int = 0

    early = False  # whether the decision is taken before the model runs
    session = InputSession

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "coefficients", to_numbers("coefficients", self.coefficients))
        if not self.coefficients:
            raise ValueError("coefficients: expected at least one, got none")
        check_count("first", self.first, 1)
        check_count("last", self.last, 0)

    def increment(self, memory: Memory, entry: Tensor) -> Tensor:
        """Return d [B]."""
        change, _ = measure(entry, memory.entry, group=memory.group)
        total = torch.zeros_like(change)
        for coefficient in self.coefficients:
            total = total * change + coefficient
        return total

    def learn(self, memory: Memory, call: Call, kept: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return what is stored: all of it. P is given."""
        return kept

    def carry(self, memory: Memory, kept: Tensor, call: Call) -> Tensor:
        """Return the stored residual as it is."""
        return kept


@dataclass(frozen=True)
class EasyCache(Threshold):
    """Skip while the model's output, foretold from its input, has changed little.

    Args:
        threshold: of the accumulated change, exclusive; 0 never skips.
        max_skips: at most this many skipped steps in a row. The rule has no such bound; k is told
            on full steps alone, so this says how old it may get. On the digits teacher 8 is first
            met at a threshold of 0.1 on 50 steps.
        warmup: steps at the start that always run in full; k takes two of them, so that 1 does
            what 2 does. Its authors take 10 of 50 on Wan2.1, where outputs change most at the
            start; a number that suits 50 steps takes most of a short run, and on the digits teacher
            2 is as good on 50, so it is 2 here.
    """

    threshold: float = 0.05
    max_skips: int = 8
    warmup: int = 2

    scope, early = "output", True
    first, last = 1, 0
    session = InputSession

    def increment(self, memory: Memory, entry: Tensor) -> Tensor:
        """Return d [B]."""
        if memory.gain is None:
            return torch.full_like(memory.error, torch.inf)
        return memory.gain * _mean(entry - memory.entry) / _mean(memory.full_output)

    def learn(self, memory: Memory, call: Call, kept: tuple[Any, ...]) -> tuple[Any, ...]:
        """Take k from this full step and the one before, for the samples that ran."""
        entry, output = memory.entry, kept[0]
        if output.shape != entry.shape:
            raise ValueError(
                "cache: expected a model whose output has the shape of its input, "
                f"{list(entry.shape)}, got {list(output.shape)}; EasyCache adds their difference"
            )
        gain, full_entry, full_output = None, entry, output
        if memory.full_output is not None:
            gain = _mean(output - memory.full_output) / _mean(entry - memory.full_entry)
        if call.stays is not None:
            gain = blend(call.stays, memory.gain, gain)
            full_entry = blend(call.stays, memory.full_entry, entry)
            full_output = blend(call.stays, memory.full_output, output)
        memory.gain, memory.full_entry, memory.full_output = gain, full_entry, full_output
        return kept

    def carry(self, memory: Memory, kept: Tensor, call: Call) -> Tensor:
        """Return the last output, moved as the input has moved."""
        return kept + (memory.entry - memory.full_entry)
