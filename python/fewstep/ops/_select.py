"""Choice of implementation: `auto` walks an op's list in order of preference and keeps the reasons.

An op declares `IMPLEMENTATIONS`, most preferred first. Each says in words why it cannot serve given
arguments, or returns None. Nothing falls back silently: an explicit `impl` runs or raises.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import _gate

# Asked once: a search of sys.path costs tens of microseconds.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
NAMES = ("auto", "reference", "native", "triton")
KERNEL_NOT_RUN_YET = "the CUDA kernel was not run on a GPU yet; ask for impl='native' to use it"
NO_RUN_YET = "the Hopper kernel was not run on a GPU yet; ask for impl='native' to use it"


class UnsupportedError(RuntimeError):
    """The requested implementation cannot serve these arguments; the message holds the reasons."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: `run(*args, **kwargs)`, and `refuse` saying why it can't.

    `held_back` says why `auto` leaves it alone on CUDA devices although it could run.
    """

    name: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None]
    held_back: str | None = None


@dataclass(frozen=True)
class Explanation:
    """What `auto` picks (`choice`, None if nothing can run) and each refusal in words."""

    op: str
    choice: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        others = "; ".join(f"{name}: {why}" for name, why in self.reasons.items())
        return f"{self.op}: {self.choice or 'nothing can run'}" + (f" ({others})" if others else "")


def first_tensor(args: Sequence[Any]) -> Tensor:
    """Return the first tensor among the arguments, or in lists of them: its device decides."""
    for value in args:
        if isinstance(value, Tensor):
            return value
        if type(value) in (list, tuple) and value and isinstance(value[0], Tensor):
            return value[0]
    raise TypeError("expected at least one tensor among the positional arguments, got none")


def refuse_native(op: str, args: Sequence[Any], dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why the native kernel can't run: not built, wrong device, or the dtype."""
    x = first_tensor(args)
    return _native.unavailable(op, x.device) or _refuse_dtype(x, dtypes)


def refuse_triton(args: Sequence[Any], dtypes: Sequence[torch.dtype]) -> str | None:
    """Return why a Triton kernel can't run: not installed, the dtype, or the wrong device."""
    x = first_tensor(args)
    if not _HAS_TRITON:
        return "Triton is not installed"
    reason = _refuse_dtype(x, dtypes)
    if reason is None and x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"Triton needs a GPU (or TRITON_INTERPRET=1), got device '{x.device}'"
    return reason


def _refuse_dtype(x: Tensor, dtypes: Sequence[torch.dtype]) -> str | None:
    if x.dtype in dtypes:
        return None
    expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    return f"expected one of {expected}, got {str(x.dtype).removeprefix('torch.')}"


def _held_back(candidate: Implementation, x: Tensor) -> str | None:
    """Return why `auto` leaves an implementation alone whatever else the arguments are."""
    if x.device.type == "cuda":
        return candidate.held_back
    if candidate.name == "triton":
        return "the Triton interpreter is for tests; ask for impl='triton' to use it"
    return None


def _refuse_gate(op: str, candidate: Implementation, x: Tensor) -> str | None:
    """Return why a kernel that could run may not be trusted on this device."""
    if candidate.name == "reference" or x.device.type != "cuda":
        return None
    return _gate.refusal(op, candidate.name, x.device)


def explain_choice(
    op: str, implementations: Sequence[Implementation], args: Sequence[Any], kwargs: dict[str, Any]
) -> Explanation:
    """Return the choice of `auto` for these arguments with everyone else's reason."""
    choice: str | None = None
    reasons: dict[str, str] = {}
    x = first_tensor(args)
    for candidate in implementations:
        reason = candidate.refuse(*args, **kwargs)
        if reason is None:
            reason = _held_back(candidate, x) or _refuse_gate(op, candidate, x)
        if reason is not None:
            reasons[candidate.name] = reason
        elif choice is None:
            choice = candidate.name
        else:
            reasons[candidate.name] = f"could run; {choice} is preferred"
    return Explanation(op, choice, reasons)


def serves(op: str, candidate: Implementation, *args: Any, **kwargs: Any) -> bool:
    """Return whether `auto` may take an implementation for these arguments."""
    x = first_tensor(args)
    # What costs least is asked first.
    return (
        _held_back(candidate, x) is None
        and candidate.refuse(*args, **kwargs) is None
        and _refuse_gate(op, candidate, x) is None
    )


def select(
    op: str, impl: str, implementations: Sequence[Implementation], *args: Any, **kwargs: Any
) -> str:
    """Return the name of the implementation to run.

    Raises:
        ValueError: `impl` is not a known name.
        UnsupportedError: the implementation asked for, or every one under `auto`, refuses.
    """
    if impl not in NAMES:
        raise ValueError(f"impl: expected one of {', '.join(NAMES)}, got {impl!r}")
    if impl == "auto":
        for candidate in implementations:
            if serves(op, candidate, *args, **kwargs):
                return candidate.name
        explanation = explain_choice(op, implementations, args, kwargs)
        raise UnsupportedError(f"{op}: no implementation can run: {explanation}")
    for candidate in implementations:
        if candidate.name == impl:
            reason = candidate.refuse(*args, **kwargs)
            if reason is not None:
                raise UnsupportedError(f"{op}: impl='{impl}' can't run: {reason}")
            return impl
    offered = ", ".join(candidate.name for candidate in implementations)
    raise UnsupportedError(f"{op}: impl='{impl}' does not exist; this op has {offered}")
