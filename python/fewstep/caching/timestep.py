"""Outputs that depend on the time alone: computed once per step of a grid, kept, exact to the bit.

    temb_i = MLP(sincos(t_i))         i = 1 .. n steps of the grid; any image, any guidance pass

TFMQ-DM (arXiv 2311.16503) and Temporal Feature Matters (arXiv 2407.19547): the grid of a sampler is
finite, so the features of the time are a table of n rows. Here each module that makes one gets a
forward of its own that asks a `TimeSession`, which holds what they returned.

A value is used again only where the module would compute the same bits:

    time       the arguments of the denoiser that the module depends on, by their bits where they
               are on the host; a view of the scheduler's grid on another device by its place in a
               host copy of the grid, read once per grid; other tensors there by being the very same
               object, unchanged. What none of these knows is computed as ever: nothing ever waits
               for the device to say which step this is
    form       shapes, strides, dtypes and device of the module's own arguments, so each batch size
               has rows of its own; autocast, threads, precision of matmuls, stream
    weights    same tensors, storages and versions at every call. Writes through `.data`, which
               change no version, are looked for once per image in a sample of the weights
    result     not written to by anybody since

It stays out while gradients are enabled, in inference mode (tensors have no versions there), in
transforms and modes, in training, where a module inside has hooks or is of a kind not known (a
LoRA), and out of graphs: compiled, traced or captured.
"""

from __future__ import annotations

import copy
import threading
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .clock import Clock, Unknown, form_of
from .surroundings import refuse_module, refuse_surroundings, surroundings
from .weights import Weights

__all__ = ["MAX_BYTES", "TimePart", "TimeSession", "is_time_cached"]

MAX_BYTES = 64 << 20
_PART = "_fewstep_time"
_PATIENCE = 1024  # calls of the denoiser after which a step that has not come again may go


def is_time_cached(module: nn.Module) -> bool:
    """Whether a `TimePart` belongs to the module, also below other wrappers."""
    return _PART in module.__dict__


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand for the forward of a module's class: return what is kept, where that is the same."""
    part = self.__dict__.get(_PART)  # absent where somebody wraps this beyond the patch's end
    if torch.compiler.is_compiling() or part is None or part.session.closed:
        return type(self).forward(self, *args, **kwargs)
    return part.session.run(part, args, kwargs)


class TimePart:
    """A module whose output depends on the time alone.

    Args:
        module: has the forward of its class.
        session: keeps the values.
        depends: names of the denoiser's arguments that decide the output; none where the module's
            own arguments do.
    """

    def __init__(self, module: nn.Module, session: TimeSession, depends: tuple[str, ...]) -> None:
        self.module, self.session, self.depends = module, session, depends
        self.weights = Weights(module)
        session.parts.append(self)
        if depends:
            session.groups.add(depends)

    def replacements(self) -> dict[str, Any]:
        """Return the instance attributes to set.

        A method bound to the module rather than an object with a `__call__`: torch.compile guards
        on the identity of such an object, so that every block would be compiled for itself.
        """
        return {_PART: self, "forward": types.MethodType(forward, self.module)}

    def __deepcopy__(self, memo: dict[int, Any]) -> TimePart:
        module, session = copy.deepcopy((self.module, self.session), memo)
        return TimePart(module, session, self.depends)

    def __reduce__(self) -> tuple[Any, ...]:
        return TimePart, (self.module, self.session, self.depends)


@dataclass
class _Kept:
    value: Any
    tensors: tuple[Tensor, ...]
    versions: tuple[int, ...]

    @classmethod
    def of(cls, value: Any) -> _Kept | None:
        tensors = value if type(value) is tuple else (value,)
        if not all(type(x) is Tensor and not x.requires_grad for x in tensors):
            return None
        return cls(value, tensors, tuple(x._version for x in tensors))

    def is_untouched(self) -> bool:
        return all(x._version == v for x, v in zip(self.tensors, self.versions, strict=True))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors)


@dataclass
class _Step:
    """What the parts returned at one time."""

    values: dict[Any, _Kept] = field(default_factory=dict)
    last: int = 0  # number of the denoiser's call that used it
    look: int = 0  # number of the last look at the weights then


class TimeSession:
    """Holds the values of one denoiser's parts and follows its calls.

    Args:
        scheduler: returns the pipeline's present scheduler, or None.
        max_bytes: what all values together may take.
    """

    def __init__(self, scheduler: Callable[[], Any], max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.parts: list[TimePart] = []
        self.groups: set[tuple[str, ...]] = set()  # of arguments that parts depend on
        self.closed = False
        self.hits = self.evaluations = self.bytes = 0
        self.reasons: Counter[str] = Counter()
        self._scheduler = scheduler
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        self._now = threading.local()
        self._clock = Clock()
        self._calls = self._looks = 0
        self._last: dict[tuple[str, ...], Any] = {}

    # What time is it?

    def begin(self, given: dict[str, Any], form: Any) -> None:
        """Open a call of the denoiser, with those of its arguments that parts depend on."""
        self._calls += 1
        reason = refuse_surroundings()
        if reason is not None:  # nothing may be read then, under capture least of all
            self._now.keys = dict.fromkeys(self.groups, reason)
            return
        self._now.keys = {}
        grid = getattr(self._scheduler(), "timesteps", None)
        if self._clock.set_grid(grid):
            self._look()
        for depends in self.groups:
            try:
                bits = tuple(self._clock.identify(given.get(x), x != "timestep") for x in depends)
            except Unknown as reason:
                self._now.keys[depends] = str(reason)
                continue
            key = (depends, bits, form)
            step, before = self._steps.get(key), self._last.get(depends)
            if step is not None:
                if key != before and step.look == self._looks:  # the grid starts again
                    self._look()
                step.look, step.last = self._looks, self._calls
            self._last[depends] = key
            self._now.keys[depends] = (key,)

    def end(self) -> None:
        """Close it. Outside of a call parts that depend on its arguments know no time."""
        self._now.keys = {}

    # What is known of it?

    def run(self, part: TimePart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the part's forward returns, from what is kept where that is the same."""
        try:
            key, slot = self._key(part, args, kwargs)
            if not part.weights.are_same():
                self._forget(part)
                part.weights.remember()
        except Unknown as reason:
            self.reasons[str(reason)] += 1
            return type(part.module).forward(part.module, *args, **kwargs)
        step = self._steps.get(key)
        kept = None if step is None else step.values.get(slot)
        if kept is not None and kept.is_untouched():
            self.hits += 1
            self._steps.move_to_end(key)
            step.last = self._calls
            return kept.value
        value = type(part.module).forward(part.module, *args, **kwargs)
        self.evaluations += 1
        self._keep(key, slot, _Kept.of(value))
        return value

    def _key(self, part: TimePart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        reason = refuse_surroundings() or refuse_module(part.module)
        if reason is not None:
            raise Unknown(reason)
        if part.depends:
            key = getattr(self._now, "keys", {}).get(part.depends, "outside of the denoiser")
            if isinstance(key, str):
                raise Unknown(key)
            key = key[0]
        else:
            key = ((), tuple(self._clock.identify(x) for x in (*args, *kwargs.values())))
        tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        return key, (id(part), form_of((args, kwargs)), surroundings(device))

    def _keep(self, key: Any, slot: Any, kept: _Kept | None) -> None:
        if kept is None or kept.bytes > self.max_bytes:
            return
        step = self._steps.get(key)
        if step is not None and (old := step.values.pop(slot, None)) is not None:
            self.bytes -= old.bytes
        while self.bytes + kept.bytes > self.max_bytes:
            # Steps that come again and again are not thrown out for each other.
            oldest = next(iter(self._steps))
            if oldest == key or self._calls - self._steps[oldest].last < _PATIENCE:
                self.reasons["max_bytes reached"] += 1
                return
            self.bytes -= sum(x.bytes for x in self._steps.pop(oldest).values.values())
        step = self._steps.setdefault(key, _Step())
        step.last, step.look = self._calls, self._looks
        step.values[slot] = kept
        self.bytes += kept.bytes

    def _forget(self, part: TimePart) -> None:
        for step in self._steps.values():
            for slot in [slot for slot in step.values if slot[0] == id(part)]:
                self.bytes -= step.values.pop(slot).bytes

    def _look(self) -> None:
        """Drop everything if the weights are others than their versions say."""
        self._looks += 1
        pairs = [pair for part in self.parts for pair in part.weights.samples()]
        for device in {now.device for _, now in pairs}:  # one answer to wait for
            here = [pair for pair in pairs if pair[1].device == device]
            before, now = (torch.cat(some) for some in zip(*here, strict=True))
            if not torch.equal(before, now):
                self.forget()

    def forget(self) -> None:
        """Drop all values."""
        self._steps.clear()
        self.bytes = 0
        for part in self.parts:
            part.weights.forget()

    def close(self) -> None:
        """Stay out of every call from now on, and drop the values."""
        self.closed = True
        self.forget()

    def report(self) -> dict[str, Any]:
        """Evaluations done and saved so far, what is kept, and why modules were left to run."""
        return {
            "saved": self.hits,
            "evaluated": self.evaluations,
            "times": len(self._steps),
            "bytes": self.bytes,
            "not_kept": dict(self.reasons),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> TimeSession:
        """A session of its own for a copy of the model, without this one's values."""
        twin = TimeSession(copy.deepcopy(self._scheduler, memo), self.max_bytes)
        twin.closed = self.closed
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return TimeSession, (_nothing, self.max_bytes)


def _nothing() -> None:
    return None
