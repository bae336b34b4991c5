"""Caching a stack of transformer blocks.

    h_first            after the blocks that always run at the start (the probe)
    h_tail             before the blocks that always run at the end (or the output norm)
    full step          keep R = h_tail - h_first
    skipped step       h_tail := h_first + R; the blocks between hand their inputs through

Where a schedule forecasts, R is the weighted sum of several full steps' residuals. In a full step
that only some samples of the batch want, h_tail of the others is h_first + R as in a skipped one.

Two-stream blocks (FLUX, SD3) return (encoder_hidden_states, hidden_states); both are kept. What a
ControlNet adds between blocks is inside R, so a skipped step reuses it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ._wrap import Replacement, Wrapped, follow, uncompiled
from .calls import Call
from .session import Session, add_residual, blend, residual_of

__all__ = ["BlockStack"]


@dataclass
class BlockStack:
    """The blocks of a denoiser in the order in which they run.

    Args:
        denoiser: the model whose call is one evaluation.
        blocks: its blocks, all lists joined.
        two_streams: blocks take (hidden_states, encoder_hidden_states) and return the two in
            reverse order; otherwise they return hidden_states alone.
    """

    denoiser: nn.Module
    blocks: list[nn.Module]
    two_streams: bool

    def middle(self, session: Session) -> range:
        """Indices of the blocks that a skipped step leaves out.

        Raises:
            ValueError: the policy leaves no block to skip.
        """
        first, last = (getattr(session.policy, name, 0) for name in ("first", "last"))
        middle = range(first, len(self.blocks) - last)
        if not len(middle):
            raise ValueError(
                f"cache: expected more than {first + last} blocks (first="
                f"{first} and last={last} always run), got {len(self.blocks)} in "
                f"{type(self.denoiser).__name__}"
            )
        return middle

    def describe(self, session: Session) -> str:
        """Say which blocks a skipped step leaves out."""
        middle = self.middle(session)
        return (
            f"a skipped step leaves out blocks {middle[0]} to {middle[-1]} of "
            f"{len(self.blocks)} (counted from 0)"
        )

    def replacements(self, session: Session) -> list[Replacement]:
        """Return what to set on the instances; sets nothing itself."""
        middle = self.middle(session)
        found = follow(self.denoiser, session, ignore=("skip_layers",))
        for index in range(middle[-1] + 1):
            block = self.blocks[index]
            forward = _Block(block.forward, session, index, middle, self.two_streams)
            found.append(Replacement(block, "forward", forward))
        return found


class _Block(Wrapped):
    """`forward` of the block at `index`; a skipped step leaves the `middle` ones out."""

    def __init__(
        self,
        below: Callable[..., Any],
        session: Session,
        index: int,
        middle: range,
        two_streams: bool,
    ) -> None:
        super().__init__(below, session)
        self.index, self.middle, self.two_streams = index, middle, two_streams
        self.always = index < middle[0]

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        call = session.call
        if call is None or call.branch is None:
            return self.below(*args, **kwargs)
        if self.index == 0:
            streams = self._streams(args, kwargs)
            call.entry = streams[0]
            if self.middle[0] == 0:
                call.head = streams
        if call.skip and self.index >= self.middle[0]:
            return self._skip(call, args, kwargs)
        output = self.below(*args, **kwargs)
        if self.index == self.middle[0] - 1:
            call.head = self._split(output)
            session.decide(call, call.entry, call.head[0])
        elif self.index == self.middle[-1]:
            streams = self._split(output)
            session.keep(call, *map(residual_of, streams, call.head))
            if call.stays is not None:
                call.done = True
                stored = map(add_residual, call.head, session.recall(call))
                output = self._joined(*map(partial(blend, call.stays), stored, streams))
            call.head = ()
        return output

    def _skip(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.index != self.middle[-1]:
            return self._joined(*self._streams(args, kwargs))
        call.done = True
        streams = zip(call.head, self.session.recall(call), strict=True)
        return self._joined(*(add_residual(head, tail) for head, tail in streams))

    def _streams(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not self.two_streams:
            return hidden, None
        return hidden, args[1] if len(args) > 1 else kwargs["encoder_hidden_states"]

    def _split(self, output: Any) -> tuple[Any, Any]:
        return (output[1], output[0]) if self.two_streams else (output, None)

    def _joined(self, hidden: Any, encoder: Any) -> Any:
        return (encoder, hidden) if self.two_streams else hidden
