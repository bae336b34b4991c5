"""Which tokens a step computes, and what is kept of the others.

    dense step      all tokens; keep the output, and keys and values of every self-attention
    partial step    M tokens of each sample enter the blocks; their keys and values are put among
                    those that are kept, their output among the output that is kept

Every guidance pass keeps its own; the passes of a step that are given the same input compute the
same tokens, those that the first of them chose. Samples that are halves of one batch choose by the
mean of their ranks' logarithms. All of that is decided on the device, so the host never waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Branch, Call
from .guard import halves
from .scheduled import ScheduledSession

__all__ = ["Grid", "Selection", "TokenSession", "select"]


class Selection(NamedTuple):
    """Tokens of every sample."""

    index: Tensor  # [B, M], ascending
    position: Tensor  # [B, N]: which of them a token is, -1 for none


def select(rank: Tensor, count: int) -> Selection:
    """Return the `count` tokens of the largest rank [B, N] of every sample.

    A stable sort of the whole row, where top-k and a sort of what it found would do: of equal ranks
    (flat regions have many) the first tokens count, on every device. N numbers a sample are sorted
    once a step, next to nothing beside one layer; a kernel of our own would save a few launches.
    Ascending indices keep neighbours together in memory, and all tokens are taken in their order.
    """
    order = rank.argsort(dim=1, descending=True, stable=True)
    index = order[:, :count].sort(dim=1).values
    position = torch.full_like(order, -1)
    places = torch.arange(count, device=rank.device).expand_as(index)
    return Selection(index, position.scatter_(1, index, places))


class Grid(NamedTuple):
    """How tokens lie in a model's output [B, C, H, W]: in rows, each patch x patch of it."""

    patch: int
    channels: int  # of the noise; what follows (a learned variance) ranks nothing

    def count(self, output: Tensor) -> int:
        """Return N of an output, 0 where it has no such tokens."""
        if output.dim() != 4 or any(size % self.patch for size in output.shape[2:]):
            return 0
        return output.shape[2] * output.shape[3] // self.patch**2

    def spread(self, output: Tensor, metric: str) -> Tensor:
        """Return what ranks the tokens [B, N]; of one channel the deviation within the patch."""
        p = self.patch
        x = output[:, : self.channels].float().unflatten(3, (-1, p)).unflatten(2, (-1, p))
        x = x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4)  # [B, h, w, p p, C]
        if metric == "l2":
            found = x.norm(dim=-1).mean(-1)
        elif x.shape[-1] > 1:
            found = x.std(dim=-1, correction=0).mean(-1)
        else:
            found = x[..., 0].std(dim=-1, correction=0)
        return found.flatten(1)

    def merge(self, output: Tensor, kept: Tensor, position: Tensor) -> Tensor:
        """Return the output with the tokens that were left out as they are kept."""
        height, width = (size // self.patch for size in output.shape[2:])
        computed = (position >= 0).view(len(position), 1, height, width)
        for axis in (2, 3):
            computed = computed.repeat_interleave(self.patch, axis)
        return torch.where(computed, output, kept)


@dataclass
class Memory:
    """What a branch keeps of its newest step."""

    rows: dict[int, Tensor] = field(default_factory=dict)  # keys and values, by projection
    samples: int = 0  # B and
    tokens: int = 0  # N of what entered the blocks
    torn: bool = False  # whether a projection has run on some of their rows, or more than once
    output: Tensor | None = None
    spread: Tensor | None = None  # [B, N]
    left_out: Tensor | None = None  # [B, N], d
    chosen: Selection | None = None  # of the partial step under way


class _Chosen(NamedTuple):
    """What the first pass of a step chose."""

    given: Tensor
    selection: Selection


class TokenSession(ScheduledSession):
    """Follows the runs of one pipeline and decides by a schedule which tokens are computed."""

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        self._bytes: dict[str, int] = {}  # of what is kept, by branch

    def _must_run_now(self, call: Call, branch: Branch) -> str | None:
        if self._refused is not None:
            return self._refused
        if call.step >= len(self.forecasts):
            return "not in the schedule"
        if self.forecasts[call.step] is None:
            return "scheduled"
        if branch.replaced:
            return "conditioning changed"
        if branch.memory is None:
            return "nothing kept"
        return "shape changed" if branch.form != call.form else None

    def _foresee(self, call: Call, timesteps: Any, index: Any) -> None:
        super()._foresee(call, timesteps, index)
        if call.skip:
            call.branch.correct("part")

    @torch.compiler.disable
    def run_in_full(self, call: Call, reason: str) -> None:
        """Take back the decision to run a share of the tokens."""
        call.skip = False
        call.branch.correct("full", reason)
        self.reasons[reason] += 1

    @torch.compiler.disable
    def enter(self, call: Call) -> None:
        """Choose the tokens of a partial step; clear the table for a dense one."""
        branch = call.branch
        if branch is None:
            return
        if not call.skip:
            branch.memory = Memory() if call.step < self._last_skip else None
            return
        memory: Memory = branch.memory
        # Its logarithm: the exponential of a long wait is infinite, and of a zero none makes more.
        spread = memory.spread.clamp_min(torch.finfo(torch.float32).tiny)
        rank = spread.log() + self.policy.starvation * memory.left_out
        tied = halves(call.given, len(rank))
        if tied is not None:
            both = (rank + rank.roll(len(rank) // 2, 0)) / 2
            rank = torch.where(tied[:, None], both, rank)
        count = max(1, round(self.policy.share * memory.tokens))
        memory.chosen = self._shared_choice(call, select(rank, count))
        memory.left_out = memory.left_out + (memory.chosen.position < 0)

    def _shared_choice(self, call: Call, own: Selection) -> Selection:
        """Return what the first pass of this step chose, for the samples that get the same."""
        first, given = self._decided, call.given
        if first is None:
            self._decided = _Chosen(given.detach().clone(), own)
            return own
        theirs = first.selection
        fits = first.given.shape == given.shape and all(
            a.shape == b.shape for a, b in zip(theirs, own, strict=True)
        )
        if not fits:
            return own
        same = (first.given == given).flatten(1).all(1)[:, None]
        return Selection(*(torch.where(same, a, b) for a, b in zip(theirs, own, strict=True)))

    @torch.compiler.disable
    def keep_output(self, call: Call, output: Any, grid: Grid, projections: int) -> None:
        """Keep a step's output for the steps after it, with what its blocks have kept."""
        branch, memory = call.branch, call.branch.memory
        if memory is None:
            return
        branch.memory = None
        if call.step >= self._last_skip:
            return
        tensors = (output, *memory.rows.values())
        if any(not isinstance(x, Tensor) or x.requires_grad for x in tensors):
            self.reasons["gradients wanted"] += 1
            return
        if len(memory.rows) != projections:
            self.reasons["keys and values not seen"] += 1
            return
        if memory.torn:
            self.reasons["keys and values in parts"] += 1
            return
        if not memory.tokens or grid.count(output) != memory.tokens:
            self.reasons["tokens are no patches of the output"] += 1
            return
        # The pipeline may write to what the model returns.
        memory.output = output.detach().clone()
        memory.spread = grid.spread(memory.output, self.policy.metric)
        if not call.skip:
            memory.left_out = torch.zeros_like(memory.spread)
        memory.chosen = None
        self._bytes[branch.name] = sum(x.nbytes for x in tensors)
        branch.memory, branch.form = memory, call.form

    @torch.compiler.disable
    def finish(self, call: Call) -> None:
        """Close a call; what is kept goes with the last step."""
        super().finish(call)
        if call.is_last and call.branch is not None:
            call.branch.memory = None

    def report(self) -> dict[str, Any]:
        """Return what every session does.

        `partly`: steps of a share of the tokens. `snapshot_bytes`: keys, values and outputs.
        """
        numbers = super().report()
        every = [x for decisions in numbers["branches"].values() for x in decisions]
        return numbers | {
            "partly": every.count("part"),
            "snapshot_bytes": sum(self._bytes.values()),
        }
