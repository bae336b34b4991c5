"""A module for whose forward a session stands: it keeps what depends on few arguments."""

from __future__ import annotations

import copy
import weakref
from typing import Any, ClassVar

import torch
from torch import nn

from .weights import Weights

__all__ = ["Part"]


class Part:
    """Stands for the forward of a module's class.

    The module is held weakly, or it would be in a cycle through its own `forward`.

    Args:
        module: has the forward of its class.
        session: has `run(part, module, args, kwargs)`, a list of `parts`, and may be `closed`.
    """

    mark: ClassVar[str]  # the instance attribute that holds the part

    def __init__(self, module: nn.Module, session: Any) -> None:
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
