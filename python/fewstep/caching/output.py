"""Caching the output of the whole model: a skipped step runs nothing of it.

    full step      keep v_i, the model's output
    skipped step   v^ = sum_k w_k v_f(k), the forecast of the schedule

Needs to know nothing about the model, so it serves every pipeline that has a scheduler. What is
skipped costs one pass over tensors of the latents' size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ._wrap import Followed, Replacement, follow
from .guided import rows_of
from .session import Call, Session, blend

__all__ = ["OutputStack", "take_apart"]


@dataclass
class OutputStack:
    """A denoiser as a whole.

    Args:
        denoiser: the model whose call is one evaluation.
    """

    denoiser: nn.Module

    def describe(self, session: Session) -> str:
        """Say what a skipped step leaves out."""
        return f"a skipped step leaves out all of {type(self.denoiser).__name__}"

    def replacements(self, session: Session) -> list[Replacement]:
        """Return what to set on the instance; sets nothing itself."""
        return follow(self.denoiser, session, ignore=(), kind=_Output)


class _Output(Followed):
    """`forward` of the model; a skipped call returns the forecast in the form of the last one."""

    def run(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.skip:
            call.done = True
            forecast = self.session.recall(call)
            if call.flags is not None or self.session.verify:
                forecast = self._beside(call, forecast, self.below(*args, **kwargs))
            return call.branch.rebuild(forecast)
        if call.half is not None:
            rows, count = call.half, call.form[0][0]
            output = self.below(*rows_of(args, rows, count), **rows_of(kwargs, rows, count))
            parts, call.branch.rebuild = take_apart(output)
            return call.branch.rebuild(self.session.complete(call, parts))
        output = self.below(*args, **kwargs)
        if call.branch is not None:
            parts, call.branch.rebuild = take_apart(output)
            self.session.keep(call, *parts)
            if call.stays is not None:
                call.done = True
                mixed = map(partial(blend, call.stays), self.session.recall(call), parts)
                return call.branch.rebuild(tuple(mixed))
        return output

    def _beside(self, call: Call, forecast: tuple[Any, ...], output: Any) -> tuple[Any, ...]:
        """Return the forecast, given what the model computes on the same step."""
        computed, _ = take_apart(output)
        if self.session.verify:
            self.session.compare(call, computed, forecast)
        if call.flags is None:
            return forecast
        stays = ~call.flags.tripped
        return tuple(
            blend(stays, other, own) if isinstance(own, Tensor) else other
            for own, other in zip(computed, forecast, strict=True)
        )


def take_apart(output: Any) -> tuple[tuple[Any, ...], Callable[[tuple[Any, ...]], Any]]:
    """Return the tensors of a model's output, and what makes such an output of others."""
    if isinstance(output, Tensor):
        return (output,), lambda parts: parts[0]
    kind = type(output)
    if isinstance(output, Mapping):  # diffusers' BaseOutput, before tuple: some are both
        names = tuple(output)
        return tuple(output.values()), lambda parts: kind(**dict(zip(names, parts, strict=True)))
    if isinstance(output, tuple):
        return output, kind
    raise TypeError(f"cache: expected a model that returns tensors, got a {kind.__name__} from it")
