"""What is computed of the prompt alone: once per run of the sampler, kept, exact to the bit.

    K = W_k c    V = W_v c        c: a prompt's embeddings, the same at every step

Cross-attention projects the prompt's tokens anew at every step, and a projection in front of all
blocks makes c of the text encoder's states anew. Each of these modules gets a forward of its own
that asks a `TextSession`, which holds what they returned.

A value is used again only where the module would compute the same bits:

    input    the same memory in the same version: storage, offset, shape, strides, dtype. Nothing is
             read, so nothing waits for a device; a view made anew is the same input
    module   same children, attributes, tensors, storages and versions
    around   autocast, threads, precision of matmuls, stream
    result   not written to by anybody since

All is dropped when the scheduler has another grid, what a pass has used on its last step at the end
of that (where the scheduler counts steps), and what was made of a tensor when that is gone. Writes
through `.data`, which change no version, are therefore seen by the next run.
Stays out where `TimeSession` does: with gradients, in inference mode, transforms, training, inside
of a module with hooks or of a kind not known (a LoRA), outside of the denoiser, out of graphs.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .clock import Unknown
from .part import Part, PartSession
from .surroundings import refuse_module, refuse_surroundings, surroundings

__all__ = ["TextPart", "TextSession"]

MAX_BYTES = 1 << 30
_PASSES = 4  # values that a part keeps: guidance passes of one step
_PATIENCE = 8  # values in a row that were made in vain, after which a part is left alone


class _Tensor:
    """A tensor by the memory that it shows; the memory may go."""

    def __init__(self, x: Tensor) -> None:
        self.storage = StorageWeakRef(x.untyped_storage())  # its address is not used again
        self.version = x._version
        self.layout = _layout(x)

    def is_same(self, x: Tensor) -> bool:
        return (
            self.storage.cdata == x.untyped_storage()._cdata
            and self.version == x._version
            and self.layout == _layout(x)
        )


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.storage_offset(), x.shape, x.stride()


@dataclass(eq=False)
class _Kept:
    given: _Tensor
    around: Any
    value: Tensor
    version: int
    used: int  # number of the denoiser's call

    @property
    def bytes(self) -> int:
        return self.value.numel() * self.value.element_size()


class TextPart(Part):
    """A module whose output depends on its one argument alone."""

    mark = "_fewstep_text"

    def __init__(self, module: nn.Module, session: TextSession) -> None:
        super().__init__(module, session)
        self.kept: list[_Kept] = []
        self.in_vain = 0  # values in a row that nobody asked for


class _Now(threading.local):
    """A thread's call of the denoiser."""

    around: Any = None  # its surroundings; None outside of it and where nothing may be kept
    is_last = False


class TextSession(PartSession):
    """Holds the values of one denoiser's parts and follows its calls.

    Args:
        scheduler: returns the pipeline's present scheduler, or None.
        max_bytes: what all values together may take.
    """

    def __init__(self, scheduler: Callable[[], Any], max_bytes: int = MAX_BYTES) -> None:
        super().__init__(scheduler, max_bytes)
        self.saved = self.evaluated = self.most = 0
        self._grid: Any = None
        self._calls = 0
        self._now = _Now()
        self._made: set[int] = set()  # identities of the values that are kept

    def begin(self, device: torch.device) -> None:
        """Open a call of the denoiser."""
        now = self._now
        now.around = now.is_last = None
        reason = refuse_surroundings()
        if reason is not None:
            self.reasons[reason] += 1
            return
        now.around = surroundings(device)
        scheduler = self._scheduler()
        grid, index = (getattr(scheduler, n, None) for n in ("timesteps", "step_index"))
        now.is_last = isinstance(index, int) and grid is not None and index + 1 >= len(grid)
        with self._lock:
            self._calls += 1
            if grid is not self._grid:
                self.forget()
                self._grid = grid

    def end(self) -> None:
        """Close it."""
        if self._now.is_last:
            with self._lock:
                for part in self.parts:
                    for kept in [kept for kept in part.kept if kept.used == self._calls]:
                        self._drop(part, kept)
        self._now.around = self._now.is_last = None

    def run(
        self, part: TextPart, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module's forward returns, from what is kept where that is the same."""
        forward, around = type(module).forward, self._now.around
        reason = self._refuse(part, module, args, kwargs)
        if reason is not None:
            self.reasons[reason] += 1
            return forward(module, *args, **kwargs)
        x = args[0]
        with self._lock:
            try:
                if not part.weights.are_same(module):
                    self._forget(part)
                    part.weights.remember(module)
            except Unknown as unknown:
                self.reasons[str(unknown)] += 1
                return forward(module, x)
            state = part.weights.state
            for kept in list(part.kept):
                if kept.value._version != kept.version:  # somebody has written to it
                    self._drop(part, kept)
                elif kept.around == around and kept.given.is_same(x):
                    self.saved += 1
                    part.in_vain, kept.used = 0, self._calls
                    return kept.value
        value = forward(module, x)
        with self._lock:
            self.evaluated += 1
            if type(value) is Tensor and part.weights.state == state:
                kept = _Kept(_Tensor(x), around, value, value._version, self._calls)
                if self._keep(part, kept):
                    self._drop_with(x, part, kept)
        return value

    def _refuse(
        self, part: TextPart, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        if self._now.around is None:
            return "outside of the denoiser"
        if torch.is_grad_enabled():
            return "gradients are enabled"
        if kwargs or len(args) != 1 or type(args[0]) is not Tensor or args[0].is_inference():
            return "not one plain tensor"
        if part.in_vain >= _PATIENCE:
            return "another input at every step"
        return refuse_module(module)

    def _keep(self, part: TextPart, kept: _Kept) -> bool:
        part.in_vain += 1
        if len(part.kept) >= _PASSES:
            self._drop(part, min(part.kept, key=lambda kept: kept.used))
        if part.in_vain >= _PATIENCE:
            for old in list(part.kept):
                self._drop(part, old)
        elif self.bytes + kept.bytes > self.max_bytes:
            self.reasons["max_bytes reached"] += 1
        else:
            part.kept.append(kept)
            self._made.add(id(kept.value))
            self.bytes += kept.bytes
            self.most = max(self.most, self.bytes)
            return True
        return False

    def _drop_with(self, x: Tensor, part: TextPart, kept: _Kept) -> None:
        """Drop a value when what it was made of is gone: the prompt with the pipeline's call.

        The base of a view lasts only where somebody holds it as a Python object, as this does with
        other parts' values.
        """
        owner = x if x._base is None else x._base
        if x._base is None or id(owner) in self._made:
            where = (weakref.ref(self), weakref.ref(part), weakref.ref(kept))
            weakref.finalize(owner, _gone, *where).atexit = False

    def _drop(self, part: TextPart, kept: _Kept) -> None:
        if kept in part.kept:
            part.kept.remove(kept)
            self._made.discard(id(kept.value))
            self.bytes -= kept.bytes

    def _forget(self, part: TextPart) -> None:
        for kept in list(part.kept):
            self._drop(part, kept)

    def forget(self) -> None:
        """Drop all values."""
        with self._lock:
            for part in self.parts:
                self._forget(part)
                part.weights.forget()
                part.in_vain = 0

    def report(self) -> dict[str, Any]:
        """Evaluations done and saved so far, the most bytes kept, and why modules were left."""
        with self._lock:
            return {
                "saved": self.saved,
                "evaluated": self.evaluated,
                "values": sum(len(part.kept) for part in self.parts),
                "bytes": self.bytes,
                "most_bytes": self.most,
                "not_kept": dict(self.reasons),
            }


def _gone(
    session: weakref.ref[TextSession], part: weakref.ref[TextPart], kept: weakref.ref[_Kept]
) -> None:
    """Drop a value if it is still there."""
    found = session(), part(), kept()
    if all(one is not None for one in found):
        with found[0]._lock:
            found[0]._drop(*found[1:])
