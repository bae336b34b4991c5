"""Reversible changes of instance attributes and of a pipeline's config.

A slot is one entry of one object's `__dict__`. Setting it remembers what was there, also that
nothing was there; restoring puts back that very object or deletes the entry. Writing to `__dict__`
rather than through `setattr` keeps `torch.nn.Module` and diffusers from doing more than is asked:
a pipeline's `__setattr__` replaces its config.

Owners are held weakly: the record of a pipeline's patches must not keep the pipeline alive.
"""

from __future__ import annotations

import weakref
from typing import Any

__all__ = ["Change", "ConfigKeys", "ConfigStack", "Hook", "PatchError", "Slot"]

_ABSENT = object()


class PatchError(RuntimeError):
    """The pipeline is not in the state that this operation needs."""


class Slot:
    """One instance attribute: `owner.__dict__[name]`; `where` names it in messages."""

    def __init__(self, owner: Any, name: str, value: Any, where: str) -> None:
        self._owner = weakref.ref(owner)
        self.name, self.value, self.where = name, value, where
        self._before: Any = None
        self._applied = False

    def _attributes(self) -> dict[str, Any]:
        owner = self._owner()
        return {} if owner is None else owner.__dict__

    def apply(self) -> None:
        """Set the value and remember what it replaces."""
        attributes = self._attributes()
        self._before = attributes.get(self.name, _ABSENT)
        attributes[self.name] = self.value
        self._applied = True

    @property
    def covered(self) -> bool:
        """Whether somebody else has set the attribute since."""
        if not self._applied or self._owner() is None:
            return False
        return self._attributes().get(self.name, _ABSENT) is not self.value

    def restore(self) -> None:
        """Put back what was there; an attribute that somebody else has set since is left."""
        if self._applied and self._owner() is not None and not self.covered:
            if self._before is _ABSENT:
                del self._attributes()[self.name]
            else:
                self._attributes()[self.name] = self._before
        self._applied, self._before = False, None


class Hook:
    """A forward hook or pre-hook of a module, with the interface of `Slot`.

    Hooks of several patches lie side by side, so they are taken out in any order. One after the
    forward runs after an exception too.
    """

    covered = False

    def __init__(self, module: Any, hook: Any, where: str, *, before: bool) -> None:
        self._module, self._hook = weakref.ref(module), hook
        self.where, self._before = where, before
        self._handle: Any = None

    def apply(self) -> None:
        """Register the hook."""
        module = self._module()
        if self._before:
            self._handle = module.register_forward_pre_hook(self._hook, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(self._hook, always_call=True)

    def restore(self) -> None:
        """Take it out."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class ConfigStack:
    """The entries that patches override in one pipeline's config.

    diffusers replaces a pipeline's frozen config as a whole, so patches that each put back the
    object they found could not be undone in any order. Here each owns its keys; when none is left,
    the very object of before returns. What others change meanwhile stays.
    """

    def __init__(self) -> None:
        self._layers: dict[str, dict[str, Any]] = {}
        self._base: Any = None
        self._written: Any = None

    def _ours(self) -> dict[str, Any]:
        return {key: value for keys in self._layers.values() for key, value in keys.items()}

    def _refresh(self, pipe: Any) -> None:
        present = pipe.__dict__["_internal_dict"]
        if not self._layers:
            self._base = present
        elif present is not self._written:
            ours = {k: v for k, v in self._ours().items() if k in present and present[k] == v}
            self._base = type(present)({**present, **{k: self._base[k] for k in ours}})

    def _write(self, pipe: Any) -> None:
        ours = self._ours()
        self._written = type(self._base)({**self._base, **ours}) if ours else self._base
        pipe.__dict__["_internal_dict"] = self._written

    def push(self, pipe: Any, feature: str, keys: dict[str, Any]) -> None:
        """Override existing keys for a feature."""
        self._refresh(pipe)
        self._layers[feature] = keys
        self._write(pipe)

    def pop(self, pipe: Any, feature: str) -> None:
        """Take a feature's overrides back."""
        self._refresh(pipe)
        if self._layers.pop(feature, None) is not None:
            self._write(pipe)


class ConfigKeys:
    """A feature's overrides in a pipeline's config, with the interface of `Slot`."""

    covered = False  # the stack merges what others change

    def __init__(self, pipe: Any, stack: ConfigStack, feature: str, keys: dict[str, Any]) -> None:
        self._pipe, self._stack = weakref.ref(pipe), stack
        self._feature, self._keys = feature, keys
        self.where = "pipe.config"

    def apply(self) -> None:
        """Write the overrides."""
        self._stack.push(self._pipe(), self._feature, self._keys)

    def restore(self) -> None:
        """Take them back."""
        if (pipe := self._pipe()) is not None:
            self._stack.pop(pipe, self._feature)


class Change:
    """What one feature does to a pipeline: planned without touching it, applied, undone.

    Attributes:
        feature: the keyword of `patch`.
        summary: what it does, in a few words.
        done: what is changed and why, one line each.
        left: what is left alone and why, one line each.
        slots: the attributes it sets.
        gone: whether somebody has taken it off, other than by `undo`.
    """

    def __init__(self, feature: str, summary: str) -> None:
        self.feature, self.summary = feature, summary
        self.done: list[str] = []
        self.left: list[str] = []
        self.slots: list[Any] = []  # Slot, or what has its interface

    gone = False

    def apply(self) -> None:
        """Make the change; leave nothing behind if that fails."""
        try:
            for slot in self.slots:
                slot.apply()
        except BaseException:
            self.undo()
            raise

    can_leave = True  # whether `undo` works around what others have put on top

    def conflicts(self) -> list[str]:
        """What somebody else has put on top since, so that undoing would throw it away."""
        return [slot.where for slot in self.slots if slot.covered]

    def undo(self) -> None:
        """Take back everything that is still this change's own."""
        for slot in reversed(self.slots):
            slot.restore()

    def report(self) -> dict[str, Any]:
        """Numbers seen so far."""
        return {}
