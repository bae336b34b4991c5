"""`quantize="w8a8"` of patch(), and `fewstep.quantize` and `load_nunchaku` for one model."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from torch import nn

from .. import quantization
from ..quantization import Plan, QuantizedModules, Scheme
from .norms import expect_how, expect_places, fuse_norms
from .recognise import Target
from .saving import RefuseModel
from .undo import Change, Slot

__all__ = ["load_nunchaku", "plan_quantize", "quantize"]


@functools.wraps(quantization.quantize)
def quantize(  # noqa: D103
    model: nn.Module, *args: Any, norms: str | None = None, **kwargs: Any
) -> QuantizedModules:
    if norms is not None:
        expect_how(norms)
        expect_places(model)
    handle = _savable(model, quantization.quantize(model, *args, **kwargs))
    if norms is not None:
        fused = fuse_norms(model, norms)
        handle.notes.append(fused.explain())
        handle.at_undo(fused.undo)
    return handle


# One argument more than the function it stands for, in what help() and editors show.
_BEFORE = "\n\n    Returns:"
_NORMS = """
        norms: for blocks of diffusers whose layers take 8-bit activations: "share" lets the norm
            before them quantise once for all of them (the same bits), "fuse" computes norm,
            modulation and quantisation in one pass over memory (`patching.norms`).
"""
_signature = inspect.signature(quantization.quantize)
_norms = inspect.Parameter(
    "norms", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None"
)
quantize.__signature__ = _signature.replace(parameters=[*_signature.parameters.values(), _norms])
quantize.__doc__ = (quantization.quantize.__doc__ or "").replace(_BEFORE, _NORMS + _BEFORE[1:])


@functools.wraps(quantization.load_nunchaku)
def load_nunchaku(model: nn.Module, *args: Any, **kwargs: Any) -> QuantizedModules:  # noqa: D103
    return _savable(model, quantization.load_nunchaku(model, *args, **kwargs))


def _savable(model: nn.Module, handle: QuantizedModules) -> QuantizedModules:
    # A model of diffusers is here only if diffusers was imported.
    models = sys.modules.get("diffusers.models.modeling_utils")
    if models is not None and isinstance(model, models.ModelMixin):
        from .quantizer import make_savable

        make_savable(model, handle)
    return handle


class _QuantizeChange(Change):
    """Replaces linear layers through `fewstep.quantization`, whose handle knows the way back."""

    def __init__(self, target: Target, summary: str, how: dict[str, Any]) -> None:
        super().__init__("quantize", summary)
        self._target, self._how = target, how
        self._handle: QuantizedModules | None = None
        if hasattr(target.denoiser, "save_pretrained"):
            where = f"pipe.{target.component}.save_pretrained"
            refuse = RefuseModel(target.model)
            self.slots.append(Slot(target.denoiser, "save_pretrained", refuse, where))

    def apply(self) -> None:
        self._handle = quantization.quantize(self._target.denoiser, **self._how)
        self.done += [f"{line} of {self._target.model}" for line in self._handle.schemes()]
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


def plan_quantize(target: Target, scheme: Any, smooth: Any = None) -> Change:
    """Plan the low-bit layers; nothing is changed yet.

    Raises:
        TypeError, ValueError: not a scheme or plan, or a model without linear layers to replace.
    """
    how: dict[str, Any] = {"smooth": smooth}
    if isinstance(scheme, Plan):
        how["plan"], summary = scheme, f"a plan for {scheme.model}"
    else:
        try:
            how["scheme"] = Scheme.parse(scheme)
        except (TypeError, ValueError) as error:
            raise type(error)(f"quantize: {error}") from error
        summary = str(how["scheme"])
    target.require_eager("quantize")
    target.require_alone("quantize")
    if not any(isinstance(module, nn.Linear) for module in target.denoiser.modules()):
        raise ValueError(f"quantize: expected a model with nn.Linear layers, got {target.model}")
    return _QuantizeChange(target, summary, how)
