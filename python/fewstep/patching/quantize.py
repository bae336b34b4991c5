"""`quantize="w8a8"` of patch(), and `fewstep.quantize` and `load_nunchaku` for one model."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from .. import quantization
from ..quantization import Plan, QuantizedModules, Scheme
from .fusions import Fusions
from .recognise import Target
from .saving import RefuseModel
from .undo import Change, Slot

__all__ = ["load_nunchaku", "plan_quantize", "quantize"]


# Arguments more than those of the functions they stand for, in what help() and editors show.
_BEFORE = "\n\n    Returns:"
_MORE = """
        norms: for blocks of diffusers whose layers take 8-bit activations: "share" lets the norm
            before them quantise once for all of them (the same bits), "fuse" computes norm,
            modulation and quantisation in one pass over memory (`patching.norms`).
        activations: "fuse" computes those of diffusers' feed-forward layers inside of the product
            before them, rounded once instead of twice (`patching.activations`); None leaves them
            to torch.
"""


def _with_fusions(function: Callable[..., QuantizedModules]) -> Callable[..., QuantizedModules]:
    """Return a function that quantises and then fuses what is around the layers."""

    @functools.wraps(function)
    def call(model: nn.Module, *args: Any, **kwargs: Any) -> QuantizedModules:
        given = {name: kwargs.pop(name) for name in Fusions._fields if name in kwargs}
        fusions = Fusions(**given).expect(model)
        handle = function(model, *args, **kwargs)
        fuse(model, handle, fusions)
        return _savable(model, handle, fusions)

    signature = inspect.signature(function)
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=Fusions._field_defaults[name],
            annotation="str | None",
        )
        for name in Fusions._fields
    ]
    call.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *keywords])
    call.__doc__ = (function.__doc__ or "").replace(_BEFORE, _MORE + _BEFORE[1:])
    return call


def fuse(model: nn.Module, handle: QuantizedModules, fusions: Fusions) -> list[str]:
    """Fuse what is around quantised layers, have the handle undo it; return what it says of it."""
    fused = fusions.apply(model)
    for part in fused:
        handle.at_undo(part.undo)
    handle.notes += (notes := [part.explain() for part in fused])
    return notes


quantize = _with_fusions(quantization.quantize)
load_nunchaku = _with_fusions(quantization.load_nunchaku)


def _savable(model: nn.Module, handle: QuantizedModules, fusions: Fusions) -> QuantizedModules:
    # A model of diffusers is here only if diffusers was imported.
    models = sys.modules.get("diffusers.models.modeling_utils")
    if models is not None and isinstance(model, models.ModelMixin):
        from .quantizer import make_savable

        make_savable(model, handle, fusions)
    return handle


class _QuantizeChange(Change):
    """Replaces linear layers through `fewstep.quantization`, whose handle knows the way back."""

    def __init__(self, target: Target, summary: str, how: dict[str, Any], fusions: Fusions) -> None:
        super().__init__("quantize", summary)
        self._target, self._how, self._fusions = target, how, fusions
        self._handle: QuantizedModules | None = None
        if hasattr(target.denoiser, "save_pretrained"):
            where = f"pipe.{target.component}.save_pretrained"
            refuse = RefuseModel(target.model)
            self.slots.append(Slot(target.denoiser, "save_pretrained", refuse, where))

    def apply(self) -> None:
        self._handle = quantization.quantize(self._target.denoiser, **self._how)
        self.done += [f"{line} of {self._target.model}" for line in self._handle.schemes()]
        self.done += self._handle.notes
        for note in fuse(self._target.denoiser, self._handle, self._fusions):
            self.done += note.splitlines()
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


def plan_quantize(target: Target, scheme: Any, seen: dict[str, Any], fusions: Fusions) -> Change:
    """Plan the low-bit layers; nothing is changed yet. `seen` are the calibrations, by argument.

    Raises:
        TypeError, ValueError: not a scheme or plan, a model without linear layers to replace, or
            one without norms that are known.
    """
    how = dict(seen)
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
    return _QuantizeChange(target, summary, how, fusions.expect(target.denoiser))
