"""quantize(model, scheme): quantised modules in the place of a model's linear layers, and back.

Instances are replaced (`parent._modules[name]`), never classes or code. What is left alone is
recorded with the reason in words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..ops._layout import FLOATS
from .calibration import Calibration
from .hooks import has_hooks
from .linear import QuantLinear
from .plan import Plan
from .recipe import Recipe, expect_calibration
from .scheme import Scheme

MIB = 2**20
# At 1,024 rows a bfloat16 layer of 128 x 128 breaks even: quantising and dispatch, about 0.1 ms,
# cost what int8 saves (docs/ops/gemm_w8a8.md).
SMALLEST_SIDE = 64
SMALLEST_WEIGHT = 128 * 128

_EMBEDDING = "embeds time, label or guidance: one row per image, and every layer sees its error"
_FINAL = "the final projection: its error goes straight into the prediction"
_SENSITIVE = (
    (
        r"(^|\.)(time_\w*|timestep\w*|t_embedder|guidance_embedder|class_emb\w*|label_emb\w*"
        r"|y_embedder|add_embedding|text_embedder|pooled\w*|adaln_single)(\.|$)",
        _EMBEDDING,
    ),
    (r"^(proj_out\w*|norm_out\w*|final_layer\w*|last_layer\w*|lm_head)(\.|$)", _FINAL),
)

Skip = Callable[[str, nn.Linear], "str | bool | None"]
Given = Calibration | str | Path | None  # a calibration, a file with one, or none


def default_skip(name: str, linear: nn.Linear) -> str | None:
    """Return why a layer is better left in its precision, or None: the `skip` used by default."""
    small = min(linear.in_features, linear.out_features) < SMALLEST_SIDE
    if small or linear.weight.numel() < SMALLEST_WEIGHT:
        return f"too small to gain: {linear.in_features} -> {linear.out_features}"
    for pattern, reason in _SENSITIVE:
        if re.search(pattern, name):
            return reason
    return None


@dataclass(frozen=True)
class Slot:
    """One place that holds a linear layer: `parent._modules[key]`, called `name` in the model."""

    parent: nn.Module
    key: str
    name: str
    linear: nn.Linear


@dataclass
class QuantizedModules:
    """What `quantize` did. `with quantize(model, "w8a8"): ...` undoes it at the end.

    replaced    name -> the QuantLinear there
    skipped     name -> why the layer was left alone
    notes       what was done besides, for `explain`
    dequantized name -> the nn.Linear that `model.dequantize()` has put in a QuantLinear's place
    """

    replaced: dict[str, QuantLinear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    dequantized: dict[str, nn.Linear] = field(default_factory=dict, repr=False)
    _model: nn.Module | None = field(default=None, repr=False)
    _slots: list[Slot] = field(default_factory=list, repr=False)
    _undone: bool = field(default=False, repr=False)
    _calibrated: dict[str, bool] = field(default_factory=dict, repr=False)  # notes of the plan
    _at_undo: list[Callable[[], None]] = field(default_factory=list, repr=False)

    def at_undo(self, call: Callable[[], None]) -> None:
        """Have `undo` call this once the layers are back."""
        self._at_undo.append(call)

    def put(self, slots: list[Slot]) -> None:
        """Put `replaced` into these places and remember what was there."""
        for slot in slots:
            slot.parent._modules[slot.key] = self.replaced[slot.name]
            self._slots.append(slot)

    def undo(self) -> None:
        """Put the very layers back that were there, with the weights they had. Idempotent.

        A move or a cast that the quantised layers have seen meanwhile is made good, and so is the
        training flag. After `model.dequantize()` the originals take the places of the layers that
        it made, whose weights are those that quantisation left.

        Raises:
            RuntimeError: the originals were not kept, or something else has taken a place since;
                nothing is changed then.
        """
        if self.replaced and not self._slots and not self._undone:
            raise RuntimeError("undo: expected original layers, got none: keep_originals was False")
        for slot in self._slots:
            found = slot.parent._modules.get(slot.key)
            ours = self.replaced[slot.name], self.dequantized.get(slot.name)
            if found is None or found not in ours:
                raise RuntimeError(
                    f"{slot.name}: expected the QuantLinear put there by quantize, got "
                    f"{type(found).__name__}; undo that change first"
                )
        for slot in self._slots:
            _follow(slot.linear, self.dequantized.get(slot.name, self.replaced[slot.name]))
            slot.parent._modules[slot.key] = slot.linear
        self._slots.clear()
        self.dequantized.clear()
        self._undone = True
        while self._at_undo:
            self._at_undo.pop()()

    def explain(self) -> str:
        """Return what was replaced and what was left alone, with the reasons."""
        left = [f"left alone: {line}" for line in self.left_alone()]
        memory = [self.memory()] * bool(self._slots)
        return "\n".join([*self.schemes(), *left, *self.notes, *memory])

    def count(self) -> str:
        """Say how many layers were replaced."""
        return _layers(len(self.replaced))

    def schemes(self) -> list[str]:
        """Say how many layers have which scheme, one line each."""
        found = Counter(str(layer.scheme) for layer in self.replaced.values())
        return [f"{_layers(count)} in {scheme}" for scheme, count in found.most_common()]

    def plan(self) -> Plan:
        """Return what was done as a plan for other models of the same kind.

        Raises:
            RuntimeError: it was undone.
        """
        if self._undone or self._model is None:
            raise RuntimeError("plan: expected layers that are in the model, got an undone handle")
        layers = {n: layer.scheme for n, layer in self.replaced.items()}
        return Plan.of(self._model, layers, self._calibrated)

    def left_alone(self) -> list[str]:
        """Say what was left alone, one line per reason."""
        lines = []
        for reason, count in Counter(self.skipped.values()).most_common():
            names = [name for name, why in self.skipped.items() if why == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"{_layers(count)}, {reason}: {shown}")
        return lines

    def memory(self) -> str:
        """Say what the weights of the replaced layers take, before and now."""
        before = sum(_bytes(linear) for linear in {slot.linear for slot in self._slots})
        now = sum(_bytes(layer) for layer in set(self.replaced.values()))
        return (
            f"their weights took {before / MIB:.1f} MiB and take {now / MIB:.1f} MiB; the "
            "original layers are kept for undo, where they are, until this handle is gone"
        )

    def __enter__(self) -> QuantizedModules:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.undo()


def _layers(count: int) -> str:
    return f"{count} linear layer{'s' * (count != 1)}"


def _bytes(module: nn.Module) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _follow(linear: nn.Linear, layer: nn.Linear) -> None:
    """Put a layer that was outside the model into the state of the one in its place."""
    if isinstance(layer, QuantLinear):
        dtype, device = layer.weight_dtype, layer.quantized.device
    else:
        dtype, device = layer.weight.dtype, layer.weight.device
    # A weight on the meta device is with an offloading hook, or was never loaded.
    meta = torch.device("meta") in (device, linear.weight.device)
    if not meta and (dtype, device) != (linear.weight.dtype, linear.weight.device):
        linear.to(device=device, dtype=dtype)
    linear.train(layer.training)


def _slots(model: nn.Module) -> Iterator[Slot]:
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                yield Slot(parent, key, f"{prefix}.{key}" if prefix else key, child)


def _refuse_structure(slot: Slot, adapters: list[str], users: Counter[int]) -> str | None:
    """Return why replacing this layer would change more than its arithmetic, or None."""
    linear = slot.linear
    if any(slot.name.startswith(prefix) for prefix in adapters):
        return "part of a LoRA adapter: fuse or unload it first"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, whose users may rely on more than nn.Linear does"
    if "forward" in linear.__dict__:
        return "its forward was replaced on the instance, which a new module would lose"
    if has_hooks(linear):
        return "it has hooks, which a new module would lose"
    if users[id(linear.weight)] > 1:
        return "its weight is shared with another module"
    if linear.weight.dtype not in FLOATS:
        return f"its weights are {linear.weight.dtype}"
    return None


def find_slots(model: nn.Module) -> tuple[list[Slot], dict[str, str]]:
    """Return the places of all linear layers, and name -> why one must stay as it is.

    Raises:
        ValueError: a layer is quantised already.
    """
    slots = list(_slots(model))
    adapters = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "lora_A")
    ]
    users = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    refused: dict[str, str] = {}
    for slot in slots:
        if isinstance(slot.linear, QuantLinear):
            raise ValueError(
                f"{slot.name}: expected a layer that is not quantised, got one in "
                f"{slot.linear.scheme}; undo that first"
            )
        reason = _refuse_structure(slot, adapters, users)
        if reason is not None:
            refused[slot.name] = reason
    return slots, refused


def choose_layers(
    model: nn.Module, scheme: Scheme | None, skip: Skip | None = None, plan: Plan | None = None
) -> tuple[dict[str, Scheme], dict[str, str]]:
    """Return the scheme of each layer to replace, and the reason for each that is left alone.

    Raises:
        ValueError: a layer is quantised already, or the plan is for another model.
    """
    if plan is not None:
        plan.check(model)
    reason = default_skip if skip is None else skip

    def decide(name: str, linear: nn.Linear) -> Scheme | str:
        if plan is not None:
            return plan.layers[name] or "the plan leaves it alone"
        assert scheme is not None
        why = reason(name, linear)
        if why is not None and not isinstance(why, (str, bool)):
            raise TypeError(f"skip: expected a reason, None or a bool, got {why!r} for {name}")
        return ("skip says so" if why is True else why) or scheme

    slots, structures = find_slots(model)
    schemes: dict[str, Scheme] = {}
    refused: dict[int, str] = {}  # one layer in several places is replaced in all or in none
    for slot in slots:
        made = structures.get(slot.name) or decide(slot.name, slot.linear)
        if isinstance(made, str):
            refused.setdefault(id(slot.linear), made)
        else:
            schemes[slot.name] = made
    one: dict[int, str] = {}
    for slot in slots:  # only a plan can ask for two
        name = one.setdefault(id(slot.linear), slot.name)
        if slot.name in schemes and schemes.get(name, schemes[slot.name]) != schemes[slot.name]:
            raise ValueError(
                f"plan: expected one scheme for {name} and {slot.name}, which are one layer, got "
                f"{schemes[name]} and {schemes[slot.name]}"
            )
    skipped = {slot.name: refused[id(slot.linear)] for slot in slots if id(slot.linear) in refused}
    return {name: s for name, s in schemes.items() if name not in skipped}, skipped


def _seen(model: nn.Module, smooth: Given, compensate: Given) -> list[Calibration | None]:
    """Return the calibrations to smooth and to compensate with, one that serves both once."""
    layers = [slot.name for slot in _slots(model)]
    found = expect_calibration("smooth", smooth, model, layers)
    paths = isinstance(smooth, (str, Path)) and isinstance(compensate, (str, Path))
    if compensate is smooth or (paths and Path(smooth) == Path(compensate)):
        return [found, found]
    return [found, expect_calibration("compensate", compensate, model, layers)]


def quantize(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    *,
    rank: int | None = None,
    group: int | None = None,
    rotate: int | bool | None = None,
    skip: Skip | None = None,
    plan: Plan | None = None,
    smooth: Given = None,
    compensate: Given = None,
    keep_originals: bool = True,
) -> QuantizedModules:
    """Replace the `nn.Linear` modules inside `model` by quantised ones, in place.

    This knows of layers alone: `fewstep.quantize` calls it, then fuses norms and activations around
    the layers and makes a model of diffusers ready for `save_pretrained` and `dequantize`.

    Subclasses of nn.Linear, layers with hooks, LoRA layers and layers whose weight another module
    uses are always left alone. A layer that sits in several places stays one layer.

    Args:
        model: the module that contains the layers.
        scheme: "w8a8", "fp8", "w4a8" or "w4a16", or with options as in "w4a8-g64-r32" (`Scheme`).
        rank: of the low-rank branch; 0 by default.
        group: neighbours that share a scale of a 4-bit weight: 32, 64 (default) or 128.
        rotate: 16, 32, 64, 128 or 256: every so many neighbours of a layer's input are rotated
            before they are quantised, and the weight likewise: outliers lose their hold on the
            scales, without data. True for the largest block that divides the layer's inputs.
        skip: (name, layer) -> why to leave the layer alone, or None; True and False will do.
            `default_skip` if not given.
        plan: a scheme for each layer, instead of all the above.
        smooth: what `calibrate` saw of this model, or a file with it (`Calibration.save`). Each
            layer then tries smoothing factors and takes them where they lower its error; with a
            plan, or "w8a8-smooth", where that says so. Layers no call reached stay without.
        compensate: the same for the rounding of the weights: what rounding one of them does to a
            layer's output is made up for by the others, by the branch and by the bias
            (`compensation`), where that lowers the layer's error on rows held out. It costs time
            now and none later. Usually the calibration that `smooth` has.
        keep_originals: for `undo`. Without them a layer's memory is freed as soon as it is
            replaced, so the peak is the model and one layer.

    Returns:
        The handle: `replaced`, `skipped` with reasons, `explain()`, `undo()`, `plan()`. It keeps
        the original layers for `undo`; their memory is freed with the handle.

    Raises:
        TypeError: a scheme or plan of another type.
        ValueError: an unknown scheme, nothing to quantise, a plan for another model, or a layer
            that can't be quantised so: its inputs are no multiple of the group or of the rotation,
            its weight is not finite, on the meta device, or quantised already; smoothing is asked
            for and there is no calibration of it; a calibration is of another model. The message
            names the layer, and the model is unchanged.
    """
    if plan is not None:
        if any(value is not None for value in (scheme, rank, group, rotate, skip)):
            raise ValueError(
                "plan: expected no scheme, rank, group, rotate or skip beside it, got one"
            )
        if not isinstance(plan, Plan):
            raise TypeError(f"plan: expected a Plan, got {type(plan).__name__}")
    elif scheme is None:
        raise ValueError("scheme: expected a scheme or a plan, got neither")
    asked = (
        None
        if scheme is None
        else Scheme.parse(scheme, rank=rank, group=group, rotate=rotate or None)
    )
    if hasattr(model, "_orig_mod"):
        raise ValueError("model: expected the model itself, got one that is compiled already")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains linear layers, got a linear layer itself; "
            "QuantLinear.from_linear returns its quantised form"
        )
    schemes, skipped = choose_layers(model, asked, skip, plan)
    handle = QuantizedModules(skipped=skipped, _model=model)
    if not schemes:
        detail = "; ".join(handle.left_alone()) or "none at all"
        raise ValueError(
            f"model: expected at least one nn.Linear that can be quantised in "
            f"{type(model).__name__}, got {detail}"
        )
    slots = [slot for slot in _slots(model) if slot.name in schemes]
    recipe = Recipe(schemes, *_seen(model, smooth, compensate), literal=plan is not None)
    handle._calibrated = recipe.calibrated()
    if plan is not None and plan.notes.get("compensated") and compensate is None:
        handle.notes.append(
            "rounded to nearest: the plan was made with rounding compensated, and no compensate= "
            "was given"
        )
    for slot in slots:  # what can be seen at once comes before the first singular value
        reason = recipe.refuse(slot.name, slot.linear)
        if reason is not None:
            raise ValueError(f"{slot.name}: {reason}")
    if not keep_originals:
        del slot  # nothing here may keep a layer alive
        return _replace_for_good(handle, slots, recipe)
    made: dict[int, QuantLinear] = {}
    for slot in slots:  # everything that can fail comes before the first change
        try:
            if id(slot.linear) not in made:
                made[id(slot.linear)] = recipe.make(slot.name, slot.linear)
        except ValueError as error:
            raise ValueError(f"{slot.name}: {error}") from error
        handle.replaced[slot.name] = made[id(slot.linear)]
    handle.put(slots)
    handle.notes += recipe.notes()
    return handle


def _replace_for_good(
    handle: QuantizedModules, slots: list[Slot], recipe: Recipe
) -> QuantizedModules:
    """Replace layer by layer and let go of each original at once."""
    for slot in slots:  # the only thing left that can fail
        if not slot.linear.weight.isfinite().all():
            raise ValueError(f"{slot.name}: expected finite weights, got inf or NaN")
        del slot
    while slots:
        linear = slots[0].linear
        here = [slot for slot in slots if slot.linear is linear]
        slots[:] = [slot for slot in slots if slot.linear is not linear]  # the caller's too
        layer = recipe.make(here[0].name, linear)
        while here:
            slot = here.pop()
            slot.parent._modules[slot.key] = handle.replaced[slot.name] = layer
        del linear, slot
    handle.notes += recipe.notes()
    return handle
