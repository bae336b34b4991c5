"""Outputs that were made before their step, and how a step tells whether one is its own.

A step's output can stand for it where the step brings the time that was foreseen, and all else that
goes into it is the same. Nothing is read from a device for that: a time that is there is taken for
the one that was foreseen, and another tensor there for another value, also where values are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Ahead", "Conditioning", "is_time"]


class Conditioning:
    """What a decoder is given beside features and time, told by which tensors these are."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.tensors: list[tuple[Tensor, int | None]] = []  # with their versions
        self.others = {
            name: self._told(value)
            for name, value in given.items()
            if name not in ("sample", "timestep")
        }

    def _told(self, value: Any) -> Any:
        """Return a value with its tensors, which can't be compared by `==`, taken out."""
        if isinstance(value, Tensor):
            self.tensors.append((value, None if value.is_inference() else value._version))
            return Tensor
        if isinstance(value, Mapping):
            return {name: self._told(part) for name, part in value.items()}
        return tuple(map(self._told, value)) if isinstance(value, list | tuple) else value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Conditioning) or self.others != other.others:
            return False
        return all(map(_same, self.tensors, other.tensors))

    __hash__ = None


def _same(kept: tuple[Tensor, int | None], given: tuple[Tensor, int | None]) -> bool:
    """Whether a tensor that was noted has the values that one has which is noted now."""
    (old, version), (new, _) = kept, given
    if not old.is_inference() and old._version != version:
        return False  # written to since
    on_host = old.device.type == new.device.type == "cpu"
    return old is new or (on_host and old.dtype == new.dtype and torch.equal(old, new))


@dataclass
class Ahead:
    """What a key step leaves for the skipped ones behind it.

    Args:
        conditioning: that all of it was made with.
        outputs: by step, the time it was made for, None where that is not known without a wait, and
            its parts.
    """

    conditioning: Conditioning
    outputs: dict[int, tuple[Tensor | None, tuple[Any, ...]]]


def is_time(time: Tensor, expected: Tensor | None) -> bool:
    """Whether a step's time is the one that was expected; a time on a device is taken to be."""
    if time.device.type != "cpu":
        return True
    if expected is None:
        return False
    return torch.allclose(time.float(), expected.float(), rtol=1e-5, atol=1e-6)
