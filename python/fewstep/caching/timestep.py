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
import itertools
import threading
import types
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .surroundings import refuse_surroundings, surroundings

__all__ = ["MAX_BYTES", "TimePart", "TimeSession", "is_time_cached"]

MAX_BYTES = 64 << 20
_PART = "_fewstep_time"
_PATIENCE = 1024  # calls of the denoiser after which a step that has not come again may go
_MAX_VALUES = 4096  # of a tensor that is told by its bits
_MAX_GRID = 65536
_SAMPLE = 512  # elements of a weight that are looked at once per image
_KNOWN = (
    "torch.nn.",
    "diffusers.models.",
    "fewstep.quantization.linear",
    "fewstep.quantization.layers",
)


class _Unknown(Exception):
    """A call that can't be told from others; the text says why."""


def is_time_cached(module: nn.Module) -> bool:
    """Whether a `TimePart` belongs to the module, also below other wrappers."""
    return _PART in module.__dict__


def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand for the forward of a module's class: return what is kept, where that is the same."""
    part = self.__dict__.get(_PART)  # absent where somebody wraps this beyond the patch's end
    if torch.compiler.is_compiling() or part is None or part.session.closed:
        return type(self).forward(self, *args, **kwargs)
    return part.session.run(part, args, kwargs)


def refuse_module(module: nn.Module, inside: bool = False) -> str | None:
    """Return why what a module returns may differ for the same input and weights, or None."""
    kind = type(module)
    if not kind.__module__.startswith(_KNOWN):
        return f"a {kind.__name__} is in it"
    if module.training:
        return "it is in training"
    attributes = module.__dict__
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in attributes
    if inside and hooked:
        return "a module in it has hooks"
    for child in module._modules.values():
        if child is not None and (reason := refuse_module(child, True)) is not None:
            return reason
    return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


class _Weight:
    """A tensor as it was. Its storage is held weakly: memory goes when the model's does."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise _Unknown("weights are not there")
        if tensor.is_inference():
            raise _Unknown("weights were made in inference mode")
        storage = tensor.untyped_storage()
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.storage = StorageWeakRef(storage)  # keeps the address from being used again
        self.layout = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def is_same(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and not tensor.is_inference()
            and self.version == tensor._version
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.layout
            == (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        )


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)]
    return some.clone(memory_format=torch.contiguous_format).view(torch.uint8)


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
        self.weights: list[_Weight] = []
        self.samples: list[Tensor] = []
        session.parts.append(self)
        if depends:
            session.groups.add(depends)

    def replacements(self) -> dict[str, Any]:
        """Return the instance attributes to set.

        A method bound to the module rather than an object with a `__call__`: torch.compile guards
        on the identity of such an object, so that every block would be compiled for itself.
        """
        return {_PART: self, "forward": types.MethodType(forward, self.module)}

    def has_same_weights(self) -> bool:
        """Whether the tensors are those of `remember`, unchanged as far as versions tell."""
        tensors = list(_tensors(self.module))
        return len(tensors) == len(self.weights) and all(
            map(_Weight.is_same, self.weights, tensors)
        )

    def remember(self) -> None:
        """Take the present weights for those of the values from now on."""
        self.weights, self.samples = [], []
        tensors = list(_tensors(self.module))
        weights = [_Weight(tensor) for tensor in tensors]
        self.samples = [_sample(tensor) for tensor in tensors if tensor.numel()]
        self.weights = weights

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
        self._grid: tuple[Any, ...] = (None, None, -1, b"")  # tensor, its base, version, bytes
        self._objects: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._serial = itertools.count()
        self._calls = self._looks = 0
        self._last: dict[tuple[str, ...], Any] = {}

    # What time is it?

    def begin(self, given: dict[str, Any], form: Any) -> None:
        """Open a call of the denoiser, with those of its arguments that parts depend on."""
        self._calls += 1
        self._now.keys = {}
        grid = getattr(self._scheduler(), "timesteps", None)
        if grid is not self._grid[0]:
            self._grid = (grid, None, -1, b"")
            self._look()
        for depends in self.groups:
            try:
                bits = tuple(self._identify(given.get(x), i) for i, x in enumerate(depends))
            except _Unknown as reason:
                self._now.keys[depends] = str(reason)
                continue
            key = (depends, bits, form)
            step = self._steps.get(key)
            if step is not None:
                if (
                    key != self._last.get(depends) and step.look == self._looks
                ):  # the grid starts again
                    self._look()
                step.look, step.last = self._looks, self._calls
            self._last[depends] = key
            self._now.keys[depends] = (key,)

    def end(self) -> None:
        """Close it. Outside of a call parts that depend on its arguments know no time."""
        self._now.keys = {}

    def _identify(self, value: Any, index: int = 0) -> Any:
        """Return what two values share only if they are the same to the bit.

        The first of the arguments is the time, which is new at every step: an object that is not
        the grid's would never come again.
        """
        if isinstance(value, dict):
            return tuple((name, self._identify(x, 1)) for name, x in value.items())
        if not isinstance(value, Tensor):
            return _constant(value)
        if type(value) is not Tensor:
            raise _Unknown(f"a {type(value).__name__} is not a plain tensor")
        form = (value.dtype, value.shape, value.device)
        if on_host(value):
            if value.numel() > _MAX_VALUES:
                raise _Unknown("a time of too many values")
            return form, _bytes(value)
        place = self._place_in_grid(value)
        if place is not None:
            return form, place
        if index == 0:
            raise _Unknown("times on a device that are not the scheduler's own")
        return form, self._object(value), value._version

    def _place_in_grid(self, x: Tensor) -> bytes | None:
        """Return the bytes of the value that all of x shows of the scheduler's grid, or None."""
        grid = self._grid[0]
        one = all(
            size == 1 or stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)
        )
        if not isinstance(grid, Tensor) or not one or x.numel() == 0 or x.is_inference():
            return None
        base = _base(grid)
        if _base(x) is not base or x.dtype != base.dtype or not base.is_contiguous():
            return None
        if base.numel() > _MAX_GRID:
            return None
        if self._grid[1] is not base or self._grid[2] != base._version:
            # The one wait, per image; most grids are made on the host anyway.
            self._grid = (grid, base, base._version, _bytes(base.detach().cpu()))
        width, offset = base.element_size(), x.storage_offset() - base.storage_offset()
        return self._grid[3][offset * width : (offset + 1) * width]

    def _object(self, x: Tensor) -> int:
        """Return a number that belongs to this tensor object alone."""
        if x.is_inference():
            raise _Unknown("tensors of inference mode")
        held = self._objects.get(id(x))
        if held is None or held[0]() is not x:
            for key in [key for key, (ref, _) in self._objects.items() if ref() is None]:
                del self._objects[key]
            held = self._objects[id(x)] = (weakref.ref(x), next(self._serial))
        return held[1]

    # What is known of it?

    def run(self, part: TimePart, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the part's forward returns, from what is kept where that is the same."""
        try:
            key, slot = self._key(part, args, kwargs)
            if not part.has_same_weights():
                self._forget(part)
                part.remember()
        except _Unknown as reason:
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
            raise _Unknown(reason)
        if part.depends:
            key = getattr(self._now, "keys", {}).get(part.depends, "outside of the denoiser")
            if isinstance(key, str):
                raise _Unknown(key)
            key = key[0]
        else:
            key = ((), tuple(self._identify(x) for x in (*args, *kwargs.values())))
        tensor = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        device = torch.device("cpu") if tensor is None else tensor.device
        return key, (id(part), _form((args, kwargs)), surroundings(device))

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
        before: dict[torch.device, list[Tensor]] = {}
        now: dict[torch.device, list[Tensor]] = {}
        for part in self.parts:
            if part.weights and part.has_same_weights():
                tensors = [tensor for tensor in _tensors(part.module) if tensor.numel()]
                for tensor, sample in zip(tensors, part.samples, strict=True):
                    before.setdefault(sample.device, []).append(sample)
                    now.setdefault(sample.device, []).append(_sample(tensor))
        if any(not torch.equal(torch.cat(before[d]), torch.cat(now[d])) for d in before):
            self.forget()

    def forget(self) -> None:
        """Drop all values."""
        self._steps.clear()
        self.bytes = 0
        for part in self.parts:
            part.weights, part.samples = [], []

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


def on_host(x: Tensor) -> bool:
    """Whether the values of x can be read without waiting for a device."""
    return x.device.type == "cpu"


def _base(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


def _bytes(x: Tensor) -> bytes:
    flat = x.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()


def _constant(value: Any) -> Any:
    """Return a hashable form of a plain value; floats by their bits, zero's sign included."""
    if value is None or isinstance(value, bool | int | str | torch.dtype | torch.device):
        return type(value), value
    if isinstance(value, float):
        return float, value.hex()
    raise _Unknown(f"an argument of type {type(value).__name__}")


def _form(value: Any) -> Any:
    """Return all of a call's arguments but the values of tensors."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor:
            raise _Unknown(f"a {type(value).__name__} is not a plain tensor")
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    if isinstance(value, dict):
        return tuple((name, _form(x)) for name, x in value.items())
    return _constant(value)
