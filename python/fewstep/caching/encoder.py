"""Caching a UNet's encoder: on skipped steps its decoder alone runs.

    key step       keep E, all that leaves the encoder: conv_in's output, the down blocks' skip
                   connections, the mid block's output
    skipped step   y = decoder(E, t): the up blocks and the output layer at the step's own time

Nothing of a skipped step depends on its latents, so the decoders of a whole gap can run at its key
step, in one batch ("parallel"; copies of E and of the conditioning, one time per copy):

    key step k     y_k, ..., y_{k+g} = decoder(E x (g + 1), t_k ... t_{k+g})
    skipped step   y_i, handed out; nothing of the model runs

Faster Diffusion (arXiv 2312.09608). The times of later steps are the scheduler's, scaled as the
model's own time at the key step is; on the CPU a step that comes with another time is computed
after all. So is one that comes with other conditioning than its key step had; from there on this
guidance pass's decoders run step by step. What a ControlNet adds enters behind the encoder and is
the step's own: such calls, and those with attention arguments that hold tensors, do so, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from ._wrap import Followed, Replacement, Wrapped, follow, uncompiled
from .ahead import Ahead, Conditioning, is_time
from .calls import Call
from .output import take_apart
from .scheduled import ScheduledSession
from .session import Session

__all__ = ["EncoderSession", "EncoderStack"]

# What belongs to one step, so that the decoders of others can't run with it.
_OF_A_STEP = (
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "mid_block_additional_residual",
)


class EncoderSession(ScheduledSession):
    """Keeps, beside the encoder's features, outputs of steps that are still to come."""

    ahead = 0  # outputs of the run that were there before their step
    _in_vain: frozenset[str] = frozenset()  # branches that came with other conditioning than those

    def _start_run(self, timesteps: Any) -> None:
        super()._start_run(timesteps)
        self.ahead, self._in_vain = 0, frozenset()

    def gap(self, call: Call) -> dict[int, float]:
        """Return the skipped steps that follow a key step, with their times over its own."""
        step = call.step
        if self._refused or step >= len(self.forecasts) or self.forecasts[step] is not None:
            return {}
        if call.branch.name in self._in_vain:
            return {}
        now = self._times[step]
        skipped = takewhile(
            lambda index: self.forecasts[index] is not None, range(step + 1, len(self.forecasts))
        )
        return {index: self._times[index] / now for index in skipped} if now else {}

    def put(self, call: Call, ahead: Ahead) -> None:
        """Keep outputs of later steps; the older ones go."""
        call.branch.memory = ahead

    def take(self, call: Call, given: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the parts of this step's output; None where what is given asks for another one."""
        ahead: Ahead | None = call.branch.memory
        if ahead is None:
            return None
        expected, parts = ahead.outputs.pop(call.step, (None, None))
        if not ahead.outputs:
            call.branch.memory = None
        if parts is None or not _serves(given):
            return None
        if ahead.conditioning != Conditioning(given):
            self._in_vain |= {call.branch.name}
            return None
        if not is_time(given["timestep"], expected):
            return None
        self.ahead += 1
        return parts

    def report(self) -> dict[str, Any]:
        """Return what every session does, and how many outputs were there before their step."""
        return super().report() | {"ahead": self.ahead}


@dataclass
class EncoderStack:
    """The encoder of a UNet2DConditionModel or UNet2DModel.

    Args:
        denoiser: the UNet.
        entry: its first convolution.
        down: its down blocks, outermost first.
        mid: its mid block, or None.
    """

    denoiser: nn.Module
    entry: nn.Module
    down: list[nn.Module]
    mid: nn.Module | None

    def check(self) -> None:
        """Raise ValueError where down blocks hand on more than skip connections."""
        odd = [type(block).__name__ for block in self.down if hasattr(block, "skip_conv")]
        if odd:
            raise ValueError(
                f"cache: expected down blocks that return their output and its skip connections, "
                f"got {', '.join(odd)} in {type(self.denoiser).__name__}, which hand on images too"
            )

    def describe(self, session: Session) -> str:
        """Say what a skipped step leaves out."""
        self.check()
        mid = "" if self.mid is None else " and the mid block"
        at_once = (
            "; the up blocks run once for a key step and the skipped ones behind it"
            if getattr(session.policy, "parallel", False)
            else "; the up blocks always run"
        )
        return f"a skipped step leaves out conv_in, the down blocks{mid}{at_once}"

    def replacements(self, session: Session) -> list[Replacement]:
        """Return what to set on the instances; sets nothing itself."""
        self.check()
        found = follow(self.denoiser, session, ignore=(), kind=_Decoders)
        parts = [self.entry, *self.down, *([] if self.mid is None else [self.mid])]
        for index, module in enumerate(parts):
            part = _Part(module.forward, session, index == 0, index == len(parts) - 1)
            found.append(Replacement(module, "forward", part))
        return found


def _first(value: Any, call: Call) -> Any:
    """Return the first of the copies that a batch holds."""
    rows = len(call.entry)
    if isinstance(value, Tensor):
        whole = value.dim() and len(value) == rows * call.copies
        return value[:rows] if whole else value
    if isinstance(value, Mapping):
        return {name: _first(part, call) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_first(part, call) for part in value)
    return value


def _copied(value: Any, rows: int, copies: int) -> Any:
    """Return a batch, or a structure of such, one copy behind the other."""
    if isinstance(value, Tensor):
        batched = value.dim() and len(value) == rows
        return value.repeat(copies, *[1] * (value.dim() - 1)) if batched else value
    if isinstance(value, Mapping):
        return {name: _copied(part, rows, copies) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(part, rows, copies) for part in value)
    return value


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensors, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_tensors, value))
    return isinstance(value, Tensor)


def _serves(given: dict[str, Any]) -> bool:
    """Whether a call's output can be made at another step, or another step's stand for it."""
    return not (
        torch.is_grad_enabled()  # outputs that want gradients are not kept
        or not isinstance(given.get("timestep"), Tensor)
        or any(given.get(name) is not None for name in _OF_A_STEP)
        or _holds_tensors(given.get("cross_attention_kwargs"))
    )


class _Decoders(Followed):
    """`forward` of the UNet: at a key step it may run for the steps behind it, too."""

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = self.session
        if call.branch is None or not session.policy.parallel:
            return self.below(*args, **kwargs)
        given = self.parameters.bind_partial(*args, **kwargs)
        if call.skip:
            parts = session.take(call, given.arguments)
            if parts is None:
                return self.below(*args, **kwargs)
            call.done = True
            return call.branch.rebuild(parts)
        call.branch.memory = None
        gap = session.gap(call)
        if not gap or not _serves(given.arguments):
            return self.below(*args, **kwargs)
        return self._at_once(call, gap, given)

    def _at_once(self, call: Call, gap: dict[int, float], given: Any) -> Any:
        rows, call.copies = len(call.entry), 1 + len(gap)
        conditioning = Conditioning(given.arguments)
        own = given.arguments["timestep"].reshape(-1).expand(rows)
        times = [own]
        for ratio in gap.values():
            later = own.to(torch.promote_types(own.dtype, torch.float32)) * ratio
            times.append((later if own.is_floating_point() else later.round()).to(own.dtype))
        given.arguments.update(_copied(given.arguments, rows, call.copies))
        given.arguments["timestep"] = torch.cat(times).to(call.entry.device)
        parts, call.branch.rebuild = take_apart(self.below(*given.args, **given.kwargs))
        first, *others = zip(*(part.split(rows) for part in parts), strict=True)
        # Those on a device are not read: that would wait for it.
        expected = [time if time.device.type == "cpu" else None for time in times[1:]]
        outputs = dict(zip(gap, zip(expected, others, strict=True), strict=True))
        self.session.put(call, Ahead(conditioning, outputs))
        return call.branch.rebuild(first)


class _Part(Wrapped):
    """conv_in (the first part), a down block, or the mid block (the last).

    A down block's own output is read by the next part alone, so it stands for nothing on a skipped
    step; the last part's is what the decoder starts from.
    """

    def __init__(
        self, below: Callable[..., Any], session: Session, first: bool, last: bool
    ) -> None:
        super().__init__(below, session)
        self.first, self.last = first, last
        self.kept = 0  # tensors of this part

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.session.call
        if call is None or call.branch is None:
            return self.below(*args, **kwargs)
        if call.skip:
            return self._stored(call)
        if call.copies > 1:
            args, kwargs = _first(args, call), _first(kwargs, call)
        output = self.below(*args, **kwargs)
        own = (output,) if isinstance(output, Tensor) else output[1]
        if self.last and not isinstance(output, Tensor):
            own = (*own, output[0])
        self.kept = len(own)
        call.head = own if self.first else (*call.head, *own)
        if self.last:
            self.session.keep(call, *call.head)
            call.head = ()
        return _copied(output, len(call.entry), call.copies) if call.copies > 1 else output

    def _stored(self, call: Call) -> Any:
        if self.first:
            call.head = self.session.recall(call)
        own, call.head = call.head[: self.kept], call.head[self.kept :]
        call.done |= self.last
        if self.first:
            return own[0]
        if not self.last:
            # A tensor of its own: adapters add to it in place, and have been added to what is kept.
            return torch.zeros_like(own[-1]), own
        return own[0] if len(own) == 1 else (own[-1], own[:-1])
