"""Providers that most files need: the op's implementations, baselines, installable peers."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .. import ops
from .model import Case, Provider, Thunk


def _device_type(inputs: tuple[Any, ...]) -> str:
    return next(value.device.type for value in inputs if isinstance(value, Tensor))


def implementations(
    op: str, call: Callable[..., Any], prepare: Callable[..., tuple[Any, ...]] | None = None
) -> list[Provider]:
    """Return one provider per kernel of `op`; the timed call is `call(*inputs, impl=impl)`.

    The reference is the oracle and no competitor, so it is left out. `prepare(case, *inputs)`
    runs untimed and returns the arguments of `call`.
    """

    def make(impl: str, case: Case, *inputs: Any) -> Thunk | str:
        if impl == "triton" and _device_type(inputs) != "cuda":
            return "Triton needs a GPU; its interpreter is not worth timing"
        arguments = prepare(case, *inputs) if prepare else inputs
        return functools.partial(call, *arguments, impl=impl)

    names = [candidate.name for candidate in ops.module(op).IMPLEMENTATIONS]
    return [
        Provider(f"fewstep {name}", functools.partial(make, name), "op", name)
        for name in names
        if name != "reference"
    ]


def baseline(
    name: str,
    call: Callable[..., Any],
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    unless: Callable[..., str | None] | None = None,
    package: str | None = None,
) -> Provider:
    """Return a baseline; the timed call is `call(*inputs)`.

    `prepare` as above; `unless` and `package` as Provider has them.
    """

    def make(case: Case, *inputs: Any) -> Thunk:
        return functools.partial(call, *(prepare(case, *inputs) if prepare else inputs))

    return Provider(name, make, "baseline", unless=unless, package=package)


def needs(package: str, device: str | None = None) -> Callable[..., str | None]:
    """Return an `unless` for a peer: its package must be installed, on this device type."""

    def unless(case: Case, *inputs: Any) -> str | None:
        if device is not None and _device_type(inputs) != device:
            return f"{package} runs on {device} only"
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed (pip install {package})"
        return None

    return unless
