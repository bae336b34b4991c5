"""Puts quantised modules in the place of a model's linear layers, and takes them out again.

Instances are replaced (`parent._modules[name]`), never classes or code. What is left alone is
recorded with the reason in words.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .linear import QuantLinear, refuse_linear

SCHEMES = ("w8a8",)
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
        r"|y_embedder|add_embedding|text_embedder|pooled\w*)(\.|$)",
        _EMBEDDING,
    ),
    (r"^(proj_out\w*|norm_out\w*|final_layer\w*|last_layer\w*|lm_head)(\.|$)", _FINAL),
)

Skip = Callable[[str, nn.Linear], "str | None"]


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
class _Slot:
    """One place that holds a linear layer: `parent._modules[key]`, called `name` in the model."""

    parent: nn.Module
    key: str
    name: str
    linear: nn.Linear


@dataclass
class QuantizedModules:
    """What `quantize_linears` did. `with quantize_linears(model): ...` undoes it at the end.

    replaced    name -> the QuantLinear there
    skipped     name -> why the layer was left alone
    """

    replaced: dict[str, QuantLinear] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    _slots: list[_Slot] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the very layers back that were there, with the weights they had. Idempotent.

        A move or a cast that the quantised layers have seen meanwhile is made good, and so is the
        training flag.

        Raises:
            RuntimeError: something else has taken a place since; nothing is changed then.
        """
        for slot in self._slots:
            found = slot.parent._modules.get(slot.key)
            if found is not self.replaced[slot.name]:
                raise RuntimeError(
                    f"{slot.name}: expected the QuantLinear put there by quantize_linears, got "
                    f"{type(found).__name__}; undo that change first"
                )
        for slot in self._slots:
            _follow(slot.linear, self.replaced[slot.name])
            slot.parent._modules[slot.key] = slot.linear
        self._slots.clear()

    def explain(self) -> str:
        """Return what was replaced and what was left alone, with the reasons."""
        left = [f"left alone: {line}" for line in self.left_alone()]
        return "\n".join([f"{self.count()} in w8a8", *left, *([self.memory()] * bool(self._slots))])

    def count(self) -> str:
        """Say how many layers were replaced."""
        return _layers(len(self.replaced))

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


def _follow(linear: nn.Linear, layer: QuantLinear) -> None:
    """Put a layer that was outside the model into the state that the model is in now."""
    dtype, device = layer.weight_dtype, layer.weight_int8.device
    # A model on the meta device has its weights with an offloading hook: nothing to follow.
    if device.type != "meta" and (dtype, device) != (linear.weight.dtype, linear.weight.device):
        linear.to(device=device, dtype=dtype)
    linear.train(layer.training)


def _slots(model: nn.Module) -> Iterator[_Slot]:
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if isinstance(child, nn.Linear):
                yield _Slot(parent, key, f"{prefix}.{key}" if prefix else key, child)


def _has_hooks(linear: nn.Linear) -> bool:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(linear, name) for name in hooks)


def _refuse_structure(slot: _Slot, adapters: list[str], users: Counter[int]) -> str | None:
    """Return why replacing this layer would change more than its arithmetic, or None."""
    linear = slot.linear
    if any(slot.name.startswith(prefix) for prefix in adapters):
        return "part of a LoRA adapter: fuse or unload it first"
    if type(linear) is not nn.Linear:
        return f"a {type(linear).__name__}, whose users may rely on more than nn.Linear does"
    if "forward" in linear.__dict__:
        return "its forward was replaced on the instance, which a new module would lose"
    if _has_hooks(linear):
        return "it has hooks, which a new module would lose"
    if users[id(linear.weight)] > 1:
        return "its weight is shared with another module"
    return refuse_linear(linear)


def _plan(model: nn.Module, skip: Skip) -> tuple[list[_Slot], dict[str, str]]:
    slots = list(_slots(model))
    adapters = [
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if hasattr(module, "base_layer") or hasattr(module, "lora_A")
    ]
    users = Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )
    skipped: dict[str, str] = {}
    refused: dict[int, str] = {}  # one layer in several places is replaced in all or in none
    for slot in slots:
        reason = _refuse_structure(slot, adapters, users) or skip(slot.name, slot.linear)
        if reason is not None:
            refused.setdefault(id(slot.linear), reason)
    kept = []
    for slot in slots:
        if id(slot.linear) in refused:
            skipped[slot.name] = refused[id(slot.linear)]
        else:
            kept.append(slot)
    return kept, skipped


def quantize_linears(
    model: nn.Module, *, scheme: str = "w8a8", skip: Skip | None = None
) -> QuantizedModules:
    """Replace the `nn.Linear` modules inside `model` by quantised ones, in place.

    Subclasses of nn.Linear, layers with hooks, LoRA layers and layers whose weight another module
    uses are always left alone. A layer that sits in several places stays one layer.

    Args:
        model: the module that contains the layers.
        scheme: "w8a8".
        skip: (name, layer) -> why to leave the layer alone, or None; `default_skip` if not given.

    Returns:
        The handle: `replaced`, `skipped` with reasons, `explain()`, `undo()`. It keeps the original
        layers for `undo`; their memory is freed with the handle.

    Raises:
        ValueError: an unknown scheme, nothing to quantise, or a weight that is not finite. The
            model is unchanged then.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme: expected one of {', '.join(SCHEMES)}, got {scheme!r}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            "model: expected a module that contains linear layers, got a linear layer itself; "
            "QuantLinear.from_linear returns its quantised form"
        )
    slots, skipped = _plan(model, default_skip if skip is None else skip)
    handle = QuantizedModules(skipped=skipped)
    if not slots:
        detail = "; ".join(handle.left_alone()) or "none at all"
        raise ValueError(
            f"model: expected at least one nn.Linear that can be quantised in "
            f"{type(model).__name__}, got {detail}"
        )
    made: dict[int, QuantLinear] = {}
    for slot in slots:  # everything that can fail comes before the first change
        try:
            if id(slot.linear) not in made:
                made[id(slot.linear)] = QuantLinear.from_linear(slot.linear)
        except ValueError as error:
            raise ValueError(f"{slot.name}: {error}") from error
        handle.replaced[slot.name] = made[id(slot.linear)]
    for slot in slots:
        slot.parent._modules[slot.key] = handle.replaced[slot.name]
        handle._slots.append(slot)
    return handle
