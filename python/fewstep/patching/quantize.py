"""`quantize="w8a8"`: int8 linear layers in the denoiser."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import nn

from .recognise import Target
from .undo import Change

__all__ = ["plan_quantize"]

_SCHEMES = ("w8a8",)


class _QuantizeChange(Change):
    """Replaces linear layers through `fewstep.quantization`, whose handle knows the way back."""

    def __init__(self, target: Target, scheme: str) -> None:
        super().__init__("quantize", scheme)
        self._target, self._scheme = target, scheme
        self._handle: Any = None

    def apply(self) -> None:
        from ..quantization import quantize_linears

        self._handle = quantize_linears(self._target.denoiser, scheme=self._scheme)

        replaced, skipped = self._handle.replaced, self._handle.skipped
        self.done.append(
            f"{len(replaced)} linear layers of {self._target.model} in int8 (activations per row, "
            "weights per output channel)"
        )
        for reason, count in Counter(skipped.values()).most_common():
            names = [name for name, why in skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            self.left.append(f"{count} layers, {reason}: {shown}")

    can_leave = False

    def conflicts(self) -> list[str]:
        here = dict(self._target.denoiser.named_modules(remove_duplicate=False))
        replaced = {} if self._handle is None else self._handle.replaced
        place = f"pipe.{self._target.component}"
        return [
            f"{place}.{name}" for name, layer in replaced.items() if here.get(name) is not layer
        ]

    def undo(self) -> None:
        if self._handle is not None:
            self._handle.undo()
            self._handle = None


def plan_quantize(target: Target, scheme: Any) -> Change:
    """Plan the int8 layers; nothing is changed yet.

    Raises:
        TypeError, ValueError: not a scheme, or a model without linear layers to replace.
    """
    known = ", ".join(repr(name) for name in _SCHEMES)
    if not isinstance(scheme, str):
        raise TypeError(f"quantize: expected {known}, got {type(scheme).__name__} {scheme!r}")
    if scheme not in _SCHEMES:
        raise ValueError(f"quantize: expected {known}, got {scheme!r}")
    target.require_eager("quantize")
    if not any(isinstance(module, nn.Linear) for module in target.denoiser.modules()):
        raise ValueError(f"quantize: expected a model with nn.Linear layers, got {target.model}")
    return _QuantizeChange(target, scheme)
