"""Checks of arguments that are of the wrong kind altogether: TypeError, before anything is run."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor


def expect_tensor(name: str, x: Any) -> None:
    """Refuse what is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {_kind(x)}")


def expect_tensors(**tensors: Any) -> None:
    """Refuse what is neither a tensor nor None."""
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor or None, got {_kind(x)}")


def expect_number(name: str, x: Any) -> None:
    """Refuse what is no number of Python's. No op has the derivative of a tensor in its place."""
    # The exact types first: that is all that torch.compile has to understand.
    if type(x) in (float, int):
        return
    if isinstance(x, Tensor):
        raise TypeError(
            f"{name}: expected a number, got a tensor, whose derivative would be lost; "
            f"float({name}) is a constant"
        )
    if isinstance(x, bool) or not isinstance(x, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {_kind(x)}")


def expect_bool(name: str, x: Any) -> None:
    """Refuse what is neither True nor False."""
    if type(x) is not bool:
        raise TypeError(f"{name}: expected True or False, got {_kind(x)}")


def _kind(x: Any) -> str:
    return "None" if x is None else f"{type(x).__name__}"
