"""`quantize="w8a8"` of patch(), and `fewstep.quantize` and `load_nunchaku` for one model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import quantization
from ..quantization import Calibration, Plan, QuantizedModules, Scheme
from ..quantization.replace import Skip
from .fusions import Fused, Fusions
from .recognise import Target
from .saving import RefuseModel
from .undo import Change, Slot

__all__ = ["load_nunchaku", "plan_quantize", "quantize"]


def quantize(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    *,
    rank: int | None = None,
    group: int | None = None,
    rotate: int | bool | None = None,
    skip: Skip | None = None,
    plan: Plan | None = None,
    smooth: Calibration | str | Path | None = None,
    compensate: Calibration | str | Path | None = None,
    keep_originals: bool = True,
    norms: str | None = None,
    activations: str | None = "fuse",
    modulations: str | None = None,
) -> QuantizedModules:
    """Quantise the linear layers of a model and fuse what is around them, in place.

    `fewstep.quantization.quantize` replaces the layers and does no more. This one has activations
    (and, if asked to, norms) reach into the quantised layers besides, and leaves a model of
    diffusers ready for `save_pretrained` and `dequantize`.

    Subclasses of nn.Linear, layers with hooks, LoRA layers and layers whose weight another module
    uses are always left alone. A layer that sits in several places stays one layer.

    Args:
        model: the module that contains the layers.
        scheme: "w8a8", "fp8", "w4a8" or "w4a16", or with options as in "w4a8-g64-r32"
            (`fewstep.quantization.Scheme`).
        rank: of the low-rank branch; 0 by default.
        group: neighbours that share a scale of a 4-bit weight: 32, 64 (default) or 128.
        rotate: 16, 32, 64, 128 or 256: every so many neighbours of a layer's input are rotated
            before they are quantised, and the weight likewise. True for the largest block that
            divides the layer's inputs.
        skip: (name, layer) -> why to leave the layer alone, or None; True and False will do.
            `fewstep.quantization.default_skip` if not given.
        plan: a scheme for each layer, instead of all the above.
        smooth: what `fewstep.quantization.calibrate` saw of this model, or a file with it. Each
            layer then tries smoothing factors and takes them where they lower its error; with a
            plan, or "w8a8-smooth", where that says so.
        compensate: the same for the rounding of the weights, whose errors then make up for each
            other; usually the calibration that `smooth` has.
        keep_originals: for `undo`. Without them a layer's memory is freed as soon as it is
            replaced, so the peak is the model and one layer.
        norms: for blocks of diffusers whose layers take 8-bit activations: "share" lets the norm
            before them quantise once for all of them (the same bits), "fuse" computes norm,
            modulation and quantisation in one pass over memory (`patching.norms`).
        activations: "fuse" computes those of diffusers' feed-forward layers inside of the product
            before them, rounded once instead of twice (`patching.activations`); None leaves them
            to torch.
        modulations: "group" evaluates modulation layers in w4a16 that read the same row, as adaLN's
            do in every block, in one launch: the same bits (`patching.modulations`).

    Returns:
        The handle: `replaced`, `skipped` with reasons, `explain()`, `undo()`, `plan()`. It keeps
        the original layers for `undo`, also after `model.dequantize()`; their memory is freed with
        the handle.

    Raises:
        TypeError: a scheme, plan or calibration of another type.
        ValueError: an unknown scheme, nothing to quantise, a plan or a calibration for another
            model, smoothing that is asked for without a calibration, or a layer that can't be
            quantised so: its inputs are no multiple of the group or of the rotation, its weight is
            not finite, on the meta device, or quantised already; `norms`, `activations` or
            `modulations` that are not known, or `norms` for a model without blocks that are. The
            message names the argument or the layer, and the model is unchanged.
    """
    fusions = Fusions(norms, activations, modulations).expect(model)
    handle = quantization.quantize(
        model,
        scheme,
        rank=rank,
        group=group,
        rotate=rotate,
        skip=skip,
        plan=plan,
        smooth=smooth,
        compensate=compensate,
        keep_originals=keep_originals,
    )
    return _finish(model, handle, fusions)


def load_nunchaku(
    model: nn.Module,
    source: str | Path | Mapping[str, Tensor],
    *,
    norms: str | None = None,
    activations: str | None = "fuse",
    modulations: str | None = None,
) -> QuantizedModules:
    """Put a file of Nunchaku's 4-bit layers into a model of diffusers and fuse around them.

    `fewstep.quantization.load_nunchaku` puts the layers there and does no more; the rest is as in
    `fewstep.quantize`.

    SVDQuant layers become `W4A8Linear`, AWQ layers `W4A16Linear`; other tensors of the file take
    the place of the model's. What the file does not name stays as it is. The model may be on the
    meta device; then the file must have all of it, and it comes to the CPU.

    Args:
        model: a FluxTransformer2DModel for Nunchaku's own names, any model for diffusers' names.
        source: a safetensors file, or its tensors. int4 with groups of 64; NVFP4 is refused.
        norms: as in `quantize`.
        activations: as in `quantize`.
        modulations: as in `quantize`.

    Returns:
        The handle, as of `quantize`; `undo()` puts the very layers and tensors back.

    Raises:
        TypeError: source is neither a path nor a mapping.
        ValueError: a file that is truncated or not packed so, or a tensor that is missing, belongs
            to no layer of the model, has another dtype or shape, or holds a NaN; `norms` or
            `activations` as in `quantize`. The message names the key or the argument, what was
            expected and what came, and the model is unchanged.
    """
    fusions = Fusions(norms, activations, modulations).expect(model)
    return _finish(model, quantization.load_nunchaku(model, source), fusions)


def fuse(model: nn.Module, handle: QuantizedModules, fusions: Fusions) -> list[Fused]:
    """Fuse what is around quantised layers, have the handle undo it; return what did it."""
    fused = fusions.apply(model)
    for part in fused:
        handle.at_undo(part.undo)
    handle.notes += [part.explain() for part in fused]
    return fused


def _finish(model: nn.Module, handle: QuantizedModules, fusions: Fusions) -> QuantizedModules:
    fused = fuse(model, handle, fusions)
    # A model of diffusers is here only if diffusers was imported.
    models = sys.modules.get("diffusers.models.modeling_utils")
    if models is not None and isinstance(model, models.ModelMixin):
        from .quantizer import make_savable

        make_savable(model, handle, fusions, fused)
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
        for part in fuse(self._target.denoiser, self._handle, self._fusions):
            self.done += part.explain().splitlines()
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
