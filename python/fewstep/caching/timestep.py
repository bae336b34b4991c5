"""Outputs that depend on the time alone: computed once per step of a grid, kept, exact to the bit.

    temb_i = MLP(sincos(t_i))         i = 1 .. n steps of the grid; any image, any guidance pass

TFMQ-DM (arXiv 2311.16503) and Temporal Feature Matters (arXiv 2407.19547): the grid of a sampler is
finite, so the features of the time are a table of n rows. Here each module that makes one gets a
forward of its own that asks a `TimeSession`, which holds what they returned.

A value is used again only where the module would compute the same bits:

    input      the module's own arguments by their bits where they are on the host; on another
               device a view of the scheduler's grid by its place in a host copy of the grid, read
               once per grid; what the sincos in front has just returned there, by what that was
               asked; other conditions by being the very same object, unchanged. What none of these
               knows is computed as ever: nothing ever waits for the device to say which step it is
    form       shapes, strides, dtypes and device of the module's own arguments, so each batch size
               has rows of its own; autocast, threads, precision of matmuls, stream
    module     same children, attributes, tensors, storages and versions at every call. Writes
               through `.data`, which change no version, are looked for once per image in a sample
               of the weights
    result     not written to by anybody since

It stays out while gradients are enabled, in inference mode (tensors have no versions there), in
transforms and modes, in training, where a module inside has hooks or is of a kind not known (a
LoRA), outside of the denoiser's calls, and out of graphs: compiled, traced or captured. Threads may
share it: they look and keep in turns, and compute side by side.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import clock
from .clock import Clock, Unknown, form_of
from .part import Part, PartSession
from .surroundings import refuse_module, refuse_surroundings, surroundings

__all__ = ["MAX_BYTES", "TimePart", "TimeSession"]

MAX_BYTES = 64 << 20
_PATIENCE = 1024  # calls of the denoiser after which a value that was not asked for may go
_MAX_SEEN = 4096  # times remembered to notice that a grid starts again


class TimePart(Part):
    """A module whose output depends on its arguments and on few of them: times, conditions.

    Args:
        module: has the forward of its class.
        session: keeps the values.
        gives: a name for the output, where another part takes it.
        takes: the name of the output that is this one's first argument, perhaps in another dtype.
            On a device its values can't be read: there it is known as that output.
    """

    mark = "_fewstep_time"

    def __init__(
        self, module: nn.Module, session: TimeSession, gives: str = "", takes: str = ""
    ) -> None:
        super().__init__(module, session)
        self.gives, self.takes = gives, takes

    def is_outermost(self, module: nn.Module) -> bool:
        """Whether nobody has wrapped the module's forward since."""
        return getattr(module.__dict__.get("forward"), "__self__", None) is self

    def _more(self) -> tuple[str, str]:
        return self.gives, self.takes


@dataclass
class _Kept:
    value: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]
    bytes: int  # with the arguments it is found by
    last: int = 0  # number of the denoiser's call that used it

    @classmethod
    def of(cls, value: Any, arguments: Any) -> _Kept | None:
        tensors = value if type(value) is tuple else (value,)
        if not all(type(x) is Tensor and not x.requires_grad for x in tensors):
            return None
        held = (*tensors, *(x for x in arguments if isinstance(x, Tensor)))
        size = sum(x.numel() * x.element_size() for x in held)
        return cls(value, tensors, tuple(x._version for x in tensors), size)

    def is_untouched(self) -> bool:
        return all(x._version == v for x, v in zip(self.tensors, self.versions, strict=True))


class _Now(threading.local):
    """A thread's call of the denoiser."""

    is_open = False

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}  # what parts have just returned, by name


class TimeSession(PartSession):
    """Holds the values of one denoiser's parts and follows its calls.

    Args:
        scheduler: returns the pipeline's present scheduler, or None.
        max_bytes: what all values together may take.
    """

    def __init__(self, scheduler: Callable[[], Any], max_bytes: int = MAX_BYTES) -> None:
        super().__init__(scheduler, max_bytes)
        self.hits = self.evaluations = 0
        self._kept: OrderedDict[Any, _Kept] = OrderedDict()
        self._now = _Now()
        self._clock = Clock()
        self._calls = 0
        self._seen: set[Any] = set()  # times since the last look at the weights
        self._last: Any = None

    # What time is it?

    def begin(self, time: Any) -> None:
        """Open a call of the denoiser at a time, and notice the start of an image."""
        self._now.is_open = True
        self._now.given.clear()
        if refuse_surroundings() is not None:  # nothing may be read then, in capture least of all
            return
        with self._lock:
            self._calls += 1
            starts = self._clock.set_grid(getattr(self._scheduler(), "timesteps", None))
            try:
                now = self._clock.identify(time)
            except Unknown:
                now = None
            again = now is not None and now != self._last and now in self._seen
            if starts or again or len(self._seen) >= _MAX_SEEN:
                self._look()
            self._last = now
            self._seen.add(now)

    def end(self) -> None:
        """Close it. Outside of a call parts run as ever: nobody looks at their weights there."""
        self._now.is_open = False
        self._now.given.clear()

    # What is known of it?

    def run(
        self, part: TimePart, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module's forward returns, from what is kept where that is the same."""
        forward = type(module).forward
        with self._lock:
            try:
                slot = self._slot(part, module, args, kwargs)
                if not part.weights.are_same(module):
                    self._forget(part)
                    part.weights.remember(module)
            except Unknown as reason:
                self.reasons[str(reason)] += 1
                slot = None
            else:
                state = part.weights.state
                if part.gives and not module._forward_hooks and part.is_outermost(module):
                    self._now.given[part.gives] = (slot, state)
                kept = self._kept.get(slot)
                if kept is not None and kept.is_untouched():
                    self.hits += 1
                    self._kept.move_to_end(slot)
                    kept.last = self._calls
                    return kept.value
        value = forward(module, *args, **kwargs)
        if slot is not None:
            with self._lock:
                self.evaluations += 1
                if part.weights.state == state:  # or another thread has seen other weights
                    self._keep(slot, _Kept.of(value, (*args, *kwargs.values())))
        return value

    def _slot(
        self, part: TimePart, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        reason = refuse_surroundings() or refuse_module(module)
        if reason is None and not self._now.is_open:
            reason = "outside of the denoiser"
        if reason is not None:
            raise Unknown(reason)
        values = (*args, *kwargs.values())
        first = None
        if part.takes and args and isinstance(args[0], Tensor) and not clock.on_host(args[0]):
            # Once: what it is asked next is another call's.
            first = self._now.given.pop(part.takes, None)
            if module._forward_pre_hooks or not part.is_outermost(module):
                raise Unknown("hooks between times on a device")
        bits = tuple(
            first if first is not None and i == 0 else self._clock.identify(x, lasting=i > 0)
            for i, x in enumerate(values)
        )
        tensor = next((x for x in values if isinstance(x, Tensor)), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        return id(part), bits, form_of((args, kwargs)), surroundings(device)

    def _keep(self, slot: Any, kept: _Kept | None) -> None:
        self._drop(slot)
        if kept is None or kept.bytes > self.max_bytes:
            return
        while self.bytes + kept.bytes > self.max_bytes:
            # Values that come again and again are not thrown out for each other.
            oldest = next(iter(self._kept))
            if self._calls - self._kept[oldest].last < _PATIENCE:
                self.reasons["max_bytes reached"] += 1
                return
            self._drop(oldest)
        kept.last = self._calls
        self._kept[slot] = kept
        self.bytes += kept.bytes

    def _drop(self, slot: Any) -> None:
        if (old := self._kept.pop(slot, None)) is not None:
            self.bytes -= old.bytes

    def _forget(self, part: TimePart) -> None:
        for slot in [slot for slot in self._kept if slot[0] == id(part)]:
            self._drop(slot)

    def _look(self) -> None:
        """Drop everything if the weights are others than their versions say."""
        self._seen.clear()
        pairs = [
            pair
            for part in self.parts
            if (module := part.module) is not None
            for pair in part.weights.samples(module)
        ]
        for device in {now.device for _, now in pairs}:  # one answer to wait for
            here = [pair for pair in pairs if pair[1].device == device]
            before, now = (torch.cat(some) for some in zip(*here, strict=True))
            if not torch.equal(before, now):
                self.forget()

    def forget(self) -> None:
        """Drop all values."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0
            for part in self.parts:
                part.weights.forget()

    def report(self) -> dict[str, Any]:
        """Evaluations done and saved so far, what is kept, and why modules were left to run."""
        with self._lock:
            return {
                "saved": self.hits,
                "evaluated": self.evaluations,
                "values": len(self._kept),
                "bytes": self.bytes,
                "not_kept": dict(self.reasons),
            }
