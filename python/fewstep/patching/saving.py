"""Saving while patched: what is written equals the unpatched pipeline, or the call raises.

A cache leaves weights and configs as they are. The other features would go into the files: another
scheduler, another default scale, and int8 weights under names that a loader of the class takes for
missing ones and replaces by random numbers.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from .undo import PatchError

__all__ = ["PERSISTENT", "RefuseModel", "SaveGuard"]

PERSISTENT = ("steps", "guidance", "quantize")


class SaveGuard:
    """`save_pretrained` of a pipeline with patches; a deep copy of the pipeline keeps the guard."""

    def __init__(self, pipe: Any, features: tuple[str, ...] = ()) -> None:
        self._pipe = weakref.ref(pipe)
        self._below = pipe.__dict__.get("save_pretrained")
        self.__signature__ = inspect.signature(pipe.save_pretrained)
        self.features = list(features)  # that are patched now and would be written

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save, or raise PatchError."""
        pipe = self._pipe()
        if self.features:
            raise PatchError(
                f"save_pretrained: expected a {type(pipe).__name__} as it was loaded, got one "
                f"patched with {', '.join(self.features)}, which the files would hold; undo that "
                "(fewstep.patching.active_patches(pipe) has the handles; a deep copy taken while "
                "patched has none), save, and patch again"
            )
        below = type(pipe).save_pretrained.__get__(pipe) if self._below is None else self._below
        return below(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveGuard:
        pipe = self._pipe()
        return SaveGuard(memo.get(id(pipe), pipe), tuple(self.features))


class RefuseModel:
    """`save_pretrained` of a model with low-bit layers."""

    def __init__(self, model: str) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Raise PatchError."""
        raise PatchError(
            f"save_pretrained: expected a {self._model} as it was loaded, got one with int8 "
            "layers, which from_pretrained would read as random weights; undo the patch first, or "
            "keep the int8 weights with torch.save(model.state_dict(), ...)"
        )
