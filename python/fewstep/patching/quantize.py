"""`quantize="w8a8"`: int8 linear layers in the denoiser."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..quantization import SCHEMES, QuantizedModules, quantize_linears
from .recognise import Target
from .saving import RefuseModel
from .undo import Change, Slot

__all__ = ["plan_quantize"]


class _QuantizeChange(Change):
    """Replaces linear layers through `fewstep.quantization`, whose handle knows the way back."""

    def __init__(self, target: Target, scheme: str) -> None:
        super().__init__("quantize", scheme)
        self._target, self._scheme = target, scheme
        self._handle: QuantizedModules | None = None
        if hasattr(target.denoiser, "save_pretrained"):
            where = f"pipe.{target.component}.save_pretrained"
            refuse = RefuseModel(target.model)
            self.slots.append(Slot(target.denoiser, "save_pretrained", refuse, where))

    def apply(self) -> None:
        self._handle = quantize_linears(self._target.denoiser, scheme=self._scheme)
        self.done.append(
            f"{self._handle.count()} of {self._target.model} in int8 (activations per row, weights "
            "per output channel)"
        )
        self.done.append(self._handle.memory())
        self.left += self._handle.left_alone()
        super().apply()

    can_leave = False

    def conflicts(self) -> list[str]:
        here = dict(self._target.denoiser.named_modules(remove_duplicate=False))
        replaced = {} if self._handle is None else self._handle.replaced
        place = f"pipe.{self._target.component}"
        gone = [name for name, layer in replaced.items() if here.get(name) is not layer]
        return [*(f"{place}.{name}" for name in gone), *super().conflicts()]

    def undo(self) -> None:
        super().undo()
        if self._handle is not None:
            self._handle.undo()
            self._handle = None


def plan_quantize(target: Target, scheme: Any) -> Change:
    """Plan the int8 layers; nothing is changed yet.

    Raises:
        TypeError, ValueError: not a scheme, or a model without linear layers to replace.
    """
    known = ", ".join(repr(name) for name in SCHEMES)
    if not isinstance(scheme, str):
        raise TypeError(f"quantize: expected {known}, got {type(scheme).__name__} {scheme!r}")
    if scheme not in SCHEMES:
        raise ValueError(f"quantize: expected {known}, got {scheme!r}")
    target.require_eager("quantize")
    target.require_alone("quantize")
    if not any(isinstance(module, nn.Linear) for module in target.denoiser.modules()):
        raise ValueError(f"quantize: expected a model with nn.Linear layers, got {target.model}")
    return _QuantizeChange(target, scheme)
