"""Telling the values of tensors without waiting for the device that holds them.

on the host         by their bits
on a device         a view of one value of the scheduler's grid: by that value, in a copy of the
                    grid that is read once per grid; anything else: by being the same object,
                    in the same version
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

__all__ = ["Clock", "Unknown", "form_of", "on_host"]

_MAX_VALUES = 65536  # of a tensor that is told by its bits
_MAX_GRID = 65536


class Unknown(Exception):
    """A call that can't be told from others; the text says why."""


class Clock:
    """Knows the scheduler's grid, and which tensors it has seen."""

    def __init__(self) -> None:
        self._grid: Any = None
        self._read: tuple[Any, int, bytes] = (None, -1, b"")  # the grid's base, version, values
        self._objects: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._serial = itertools.count()

    def set_grid(self, grid: Any) -> bool:
        """Take the scheduler's timesteps of now; whether they are another tensor than before."""
        if grid is self._grid:
            return False
        self._grid, self._read = grid, (None, -1, b"")
        return True

    def identify(self, value: Any, lasting: bool = False) -> Any:
        """Return what two values share only if they are the same to the bit.

        Args:
            value: an argument.
            lasting: whether the same object may come at another step. The time is new at every
                step: an object that is not the grid's would be remembered in vain.

        Raises:
            Unknown: it can't be told.
        """
        if isinstance(value, dict):
            return tuple((name, self.identify(x, lasting)) for name, x in value.items())
        if not isinstance(value, Tensor):
            return _constant(value)
        if type(value) is not Tensor:
            raise Unknown(f"a {type(value).__name__} is not a plain tensor")
        form = (value.dtype, value.shape, value.device)
        if on_host(value):
            if value.numel() > _MAX_VALUES:
                raise Unknown("a time of too many values")
            return form, _bytes(value)
        place = self._place_in_grid(value)
        if place is not None:
            return form, place
        if not lasting:
            raise Unknown("times on a device that are not the scheduler's own")
        return form, self._object(value), value._version

    def _place_in_grid(self, x: Tensor) -> bytes | None:
        """Return the bytes of the value that all of x shows of the scheduler's grid, or None."""
        grid = self._grid
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
        if self._read[0] is not base or self._read[1] != base._version:
            # The one wait, per image; what it waits for is the copy of the grid to the device.
            self._read = (base, base._version, _bytes(base.detach().cpu()))
        width, offset = base.element_size(), x.storage_offset() - base.storage_offset()
        return self._read[2][offset * width : (offset + 1) * width]

    def _object(self, x: Tensor) -> int:
        """Return a number that belongs to this tensor object alone."""
        if x.is_inference():
            raise Unknown("tensors of inference mode")
        held = self._objects.get(id(x))
        if held is None or held[0]() is not x:
            for key in [key for key, (ref, _) in self._objects.items() if ref() is None]:
                del self._objects[key]
            held = self._objects[id(x)] = (weakref.ref(x), next(self._serial))
        return held[1]


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
    raise Unknown(f"an argument of type {type(value).__name__}")


def form_of(value: Any) -> Any:
    """Return all of a call's arguments but the values of tensors."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor:
            raise Unknown(f"a {type(value).__name__} is not a plain tensor")
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(map(form_of, value))
    if isinstance(value, dict):
        return tuple((name, form_of(x)) for name, x in value.items())
    return _constant(value)
