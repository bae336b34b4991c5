"""Modules for whose forward a session stands, which keeps what depends on few arguments."""

from __future__ import annotations

import copy
import threading
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from .weights import Weights

__all__ = ["Part", "PartSession"]


class Part:
    """Stands for the forward of a module's class.

    The module is held weakly, or it would be in a cycle through its own `forward`.

    Args:
        module: has the forward of its class.
        session: keeps the values.
    """

    mark: ClassVar[str]  # the instance attribute that holds the part

    def __init__(self, module: nn.Module, session: PartSession) -> None:
        self._module = weakref.ref(module)
        self.session = session
        self.weights = Weights()
        session.parts.append(self)

    @classmethod
    def is_on(cls, module: nn.Module) -> bool:
        """Whether such a part belongs to the module, also below other wrappers."""
        return cls.mark in module.__dict__

    @property
    def module(self) -> nn.Module | None:
        """The module, while it is there."""
        return self._module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what is kept where that is the same, or else what the class's forward does."""
        module = self._module()
        if torch.compiler.is_compiling() or self.session.closed:
            return type(module).forward(module, *args, **kwargs)
        return self.session.run(self, module, args, kwargs)

    def replacements(self) -> dict[str, Any]:
        """Return the instance attributes to set.

        A bound method rather than an object with a `__call__`: torch.compile guards on the identity
        of such an object, so that every block would be compiled for itself.
        """
        return {self.mark: self, "forward": self.forward}

    def _more(self) -> tuple[Any, ...]:
        """What the constructor takes besides."""
        return ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Part:
        module, session = copy.deepcopy((self.module, self.session), memo)
        return type(self)(module, session, *self._more())

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module, self.session, *self._more())


class PartSession(ABC):
    """Follows one denoiser's calls and keeps what its parts return.

    Args:
        scheduler: returns the pipeline's present scheduler, or None.
        max_bytes: what all values together may take.
    """

    def __init__(self, scheduler: Callable[[], Any], max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.parts: list[Any] = []
        self.closed = False
        self.bytes = 0
        self.reasons: Counter[str] = Counter()  # why values were not kept
        self._scheduler = scheduler
        self._lock = threading.RLock()  # of all that is kept; modules compute outside of it

    @abstractmethod
    def run(
        self, part: Any, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Return what the module's forward returns, from what is kept where that is the same."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all values."""

    def close(self) -> None:
        """Stay out of every call from now on, and drop the values."""
        self.closed = True
        self.forget()

    def __deepcopy__(self, memo: dict[int, Any]) -> PartSession:
        """A session of its own for a copy of the model, without this one's values."""
        twin = type(self)(copy.deepcopy(self._scheduler, memo), self.max_bytes)
        twin.closed = self.closed
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (_nothing, self.max_bytes)


def _nothing() -> None:
    return None
