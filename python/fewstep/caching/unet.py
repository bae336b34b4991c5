"""Caching a UNet: the outermost levels run on every step, the deeper ones are reused.

    full step      keep d = output of the last but one up block, what enters the outermost one
    skipped step   conv_in, down block 0 and the outermost up block run; down blocks 1.., the mid
                   block and the inner up blocks do not, and the last of these returns d

The skip connections of the outermost level are always fresh, which is why d may be stale: DeepCache
(arXiv 2312.00858). A policy with a `level` of l has the l + 1 outermost levels run; d is then what
enters up block -(l + 1). For `first-block` the residual measured is the one of down block 0 at full
resolution: its last feature before the downsampler, minus its input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._wrap import Replacement, Wrapped, follow, uncompiled
from .session import Session, blend

__all__ = ["UNetStack"]


@dataclass
class UNetStack:
    """The levels of a UNet2DConditionModel or UNet2DModel.

    Args:
        denoiser: the UNet.
        down: its down blocks, outermost first.
        mid: its mid block, or None.
        up: its up blocks, outermost last.
    """

    denoiser: nn.Module
    down: list[nn.Module]
    mid: nn.Module | None
    up: list[nn.Module]

    def level(self, session: Session) -> int:
        """Return the innermost level that every step runs, the outermost is 0.

        Raises:
            ValueError: the levels can't be cut there.
        """
        level = getattr(session.policy, "level", 0)
        name = type(self.denoiser).__name__
        if len(self.down) < 2 or len(self.up) != len(self.down):
            raise ValueError(
                f"cache: expected at least 2 down blocks and as many up blocks, "
                f"got {len(self.down)} and {len(self.up)} in {name}"
            )
        if level > len(self.down) - 2:
            raise ValueError(
                f"cache: expected a level of at most {len(self.down) - 2}, so that something is "
                f"left to skip of the {len(self.down)} levels of {name}, got {level}"
            )
        odd = [type(block).__name__ for block in self.down if hasattr(block, "skip_conv")]
        if odd:
            raise ValueError(
                f"cache: expected down blocks that return their output and its skip connections, "
                f"got {', '.join(odd)} in {name}"
            )
        for outside in range(level + 1):
            outer, inner = self.up[-1 - outside].resnets, self.down[outside].resnets
            if len(outer) != len(inner) + 1:
                raise ValueError(
                    f"cache: expected the up block of level {outside} to take {len(inner) + 1} "
                    f"skip connections (what enters down block {outside}, and its layers'), got "
                    f"{len(outer)} in {name}"
                )
        return level

    def describe(self, session: Session) -> str:
        """Say which blocks a skipped step leaves out."""
        level = self.level(session)
        mid = "" if self.mid is None else ", the mid block"
        outermost = (
            f"{level + 1} outermost down and up blocks" if level else "outermost down and up block"
        )
        return (
            f"a skipped step leaves out down blocks {level + 1} to {len(self.down) - 1}{mid} and "
            f"up blocks 0 to {len(self.up) - 2 - level}; the {outermost} always run"
        )

    def replacements(self, session: Session) -> list[Replacement]:
        """Return what to set on the instances; sets nothing itself."""
        level = self.level(session)
        found = follow(self.denoiser, session, ignore=())

        def add(module: nn.Module, kind: type[Wrapped], *extra: Any) -> None:
            found.append(Replacement(module, "forward", kind(module.forward, session, *extra)))

        add(self.down[0], _Probe, len(self.down[0].resnets) - 1)
        for module in self.down[level + 1 :] + ([] if self.mid is None else [self.mid]):
            add(module, _Stubbed)
        for module in self.up[: -2 - level]:
            add(module, _Passed)
        add(self.up[-2 - level], _Leaving)
        return found


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


class _Probe(Wrapped):
    """Down block 0: decides by its last feature at full resolution, `finest` in its outputs."""

    always = True

    def __init__(self, below: Callable[..., Any], session: Session, finest: int) -> None:
        super().__init__(below, session)
        self.finest = finest

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.below(*args, **kwargs)
        call = self.session.call
        if call is not None and call.branch is not None:
            # A block's skip connections are its features in order, the downsampled one last.
            self.session.decide(call, _hidden(args, kwargs), output[1][self.finest])
        return output


def _stand_in(output: Any) -> Any:
    """Describe an output by shapes alone."""
    if isinstance(output, Tensor):
        return output.shape
    return tuple(_stand_in(part) for part in output)


def _blank(shape: Any, like_: Tensor) -> Any:
    """Make an output of the right shapes that nobody reads; a tensor that can be written to."""
    if isinstance(shape, torch.Size):
        return like_.new_zeros(shape)
    return tuple(_blank(part, like_) for part in shape)


class _Stubbed(Wrapped):
    """A block whose output nobody reads on a skipped step."""

    def __init__(self, below: Callable[..., Any], session: Session) -> None:
        super().__init__(below, session)
        # Shapes matter even where values do not: the model slices, and adapters add in place.
        self.shapes: dict[torch.Size, Any] = {}

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.session.call
        if call is None or call.branch is None:
            return self.below(*args, **kwargs)
        hidden = _hidden(args, kwargs)
        if call.skip:
            return _blank(self.shapes[hidden.shape], hidden)
        output = self.below(*args, **kwargs)
        self.shapes[hidden.shape] = _stand_in(output)
        return output


class _Passed(Wrapped):
    """An inner up block: they hand one tensor along, and `_Leaving` drops it."""

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.session.call
        if call is not None and call.skip:
            return _hidden(args, kwargs)
        return self.below(*args, **kwargs)


class _Leaving(Wrapped):
    """The last inner up block, whose output is kept."""

    @uncompiled
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.session.call
        if call is None or call.branch is None:
            return self.below(*args, **kwargs)
        if call.skip:
            call.done = True
            return self.session.recall(call)[0]
        output = self.below(*args, **kwargs)
        self.session.keep(call, output)
        if call.stays is not None:
            call.done = True
            output = blend(call.stays, self.session.recall(call)[0], output)
        return output
