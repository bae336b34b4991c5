"""Caching the output of the whole model: a skipped step runs nothing of it.

    full step      keep v_i, the model's output
    skipped step   v^ = sum_k w_k v_f(k), the forecast of the schedule

Needs to know nothing about the model, so it serves every pipeline that has a scheduler. What is
skipped costs one pass over tensors of the latents' size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ._wrap import Followed, Replacement, follow
from .calls import Call
from .guided import rows_of
from .inputs import input_of, stacked
from .session import Session, blend

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
            lists = isinstance(input_of(call.arguments), list)
            mine = rows_of((args, kwargs), rows, count, lists=lists)
            output = self.below(*mine[0], **mine[1])
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


def take_apart(output: Any) -> tuple[tuple[Tensor, ...], Callable[[tuple[Tensor, ...]], Any]]:
    """Return the tensors of a model's output, and what makes such an output of others.

    Lists, tuples and mappings may be nested. A list of tensors of one form is a batch and becomes
    one tensor, so that decisions by sample are those of its entries. None stays where it is.

    Raises:
        TypeError: anything else, which nothing could be put in for; or a tensor of whole numbers,
            which has no weighted sums.
    """
    parts: list[Tensor] = []
    make = _take(output, parts)
    if not parts:
        raise _not_tensors(output)
    return tuple(parts), lambda others: make(iter(others))


def _take(value: Any, parts: list[Tensor]) -> Callable[[Iterator[Tensor]], Any]:
    """Append the tensors of a value, and return what makes such a value of others."""
    if value is None:
        return lambda others: None
    if isinstance(value, Tensor):
        if not (value.is_floating_point() or value.is_complex()):
            raise _not_tensors(value)
        parts.append(value)
        return next
    kind = type(value)
    if isinstance(value, Mapping):  # diffusers' BaseOutput, before tuple: some are both
        named = {name: _take(part, parts) for name, part in value.items()}
        return lambda others: kind(**{name: make(others) for name, make in named.items()})
    if not isinstance(value, list | tuple):
        raise _not_tensors(value)
    if kind is list and (batch := stacked(value)) is not None:
        make = _take(batch, parts)
        return lambda others: list(make(others).unbind())
    makes = [_take(part, parts) for part in value]
    gather = getattr(kind, "_make", kind)  # of named tuples, whose class takes them one by one
    return lambda others: gather([make(others) for make in makes])


def _not_tensors(value: Any) -> TypeError:
    got = f"one of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
    return TypeError(
        "cache: expected a model that returns tensors of floating point, or lists, tuples or "
        f"mappings of such, got {got} from it"
    )
