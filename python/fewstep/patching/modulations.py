"""Modulation layers that read one input, evaluated in one launch: `ops.gemv_w4a16_grouped`.

    emb = linear(silu(temb))                    in every block, of one temb

In diffusers' adaLN models (FLUX, SD3, Qwen-Image, ...) each block has its own silu and its own
linear layer for one row of temb. Where these layers are in w4a16, the first of them that a forward
of the model reaches is evaluated together with all that went with it so far: those that read its
input in every forward that had either. They take their outputs when their turn comes. Which do is
seen and not declared: a model's first forward runs them one by one. Where a cache skips blocks in
some forwards, the layers that all of them read are one launch, and the others another, made when
the first of these is reached. A forward that fails teaches nothing.

An output is taken only where it is what the layer's own product would return, to the bit
(`same_bits`): by a call with the very tensor, at the version, that it was computed from, in the
same forward of the model and thread, from the very weights, at theirs. Writes past the versions,
through `.data`, are seen from the next forward on. All that is kept ends with the forward, so
nothing is stale, and a CUDA graph of a forward holds all that its replay needs; a forward that
KeyboardInterrupt ends keeps its outputs until the next one, because torch runs no hook then.

So that layers get one tensor, the activations before them return one output for one input. Who
wrote to it in place would change it for others, so only activations that nothing but the layer
reads take part: of modules of diffusers, and in an `nn.Sequential` of the two.

A layer is evaluated by itself while something is differentiated or traced by torch.compile, under
autocast, in inference mode (its tensors have no versions), where it has a branch or factors, in a
LoRA, and of a model that is offloaded in parts, whose weights may be on their way. Copies of a
layer or of the model, and what pickle makes, run so, too.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.gemv_w4a16_grouped import same_bits
from ..quantization import QuantLinear
from ..quantization.layers import W4A16Linear
from ..quantization.linear import autocast_dtype
from .fusing import Parent, needs_derivative

__all__ = ["GroupedModulations", "group_modulations", "modulation_layers"]

HOW = ("group",)


def _nothing() -> None:
    return None


class _Alone:
    """What stays behind where a module is copied or pickled."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return _nothing, ()


def _buffers(layer: QuantLinear) -> tuple[Any, ...]:
    """Return the tensors that an output depends on, and their versions."""
    tensors = layer.quantized, layer.weight_scale, layer.bias
    return *tensors, *(None if x is None or x.is_inference() else x._version for x in tensors)


def _same(found: tuple[Any, ...], given: tuple[Any, ...]) -> bool:
    return all(a is b or (type(a) is int and a == b) for a, b in zip(found, given, strict=True))


def _is_usable(x: Any) -> bool:
    """Return whether x can be known again: a plain tensor with a version, not differentiated."""
    return type(x) is Tensor and not x.is_inference() and not needs_derivative(x)


class _Member(NamedTuple):
    """A layer in its place, and the modules on the way there below the model."""

    layer: Parent
    parent: Parent
    key: str
    path: tuple[Parent, ...]

    def refuse(self) -> str | None:
        """Return why the layer can't be evaluated before its turn, or None."""
        layer, parent = self.layer(), self.parent()
        if layer is None or parent is None or parent._modules.get(self.key) is not layer:
            return "it is not in its place"
        for module in (layer, *(x() for x in self.path)):
            if module is not None and not {"_hf_hook", "_diffusers_hook"}.isdisjoint(
                module.__dict__
            ):
                return "a module around it is offloaded"
        return _refuse_layer(layer)


def _refuse_layer(layer: QuantLinear) -> str | None:
    if layer.down is not None:
        return "it has a low-rank branch"
    return None if layer.smooth is None else "it smooths its input"


class _Round:
    """The layers that read one tensor in one forward, and the outputs that wait for them."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.version = x, x._version
        self.outputs: dict[int, tuple[Tensor, tuple[Any, ...]]] = {}
        self.readers: dict[int, None] = {}  # in their order
        self.tried: set[int] = set()  # what a launch was made or refused for

    def is_of(self, x: Tensor) -> bool:
        return self.x is x and self.version == x._version


class _Group(_Alone):
    """The modulation layers of a model, and what one forward knows of them."""

    def __init__(self, launches: Counter[int]) -> None:
        self.launches = launches  # counted by the number of layers
        self.members: dict[int, _Member] = {}  # by id of the layer
        self._parts: dict[int, tuple[int, ...]] = {}  # layer -> those that went with it so far
        self._forward = threading.local()

    def begin(self) -> None:
        """Begin a forward of the model."""
        if not torch.compiler.is_compiling():
            self._forward.rounds, self._forward.activated = [], []

    def learn(self) -> None:
        """Divide the layers into parts, in each of which all or none read an input.

        Parts are only ever divided, so forwards that differ in turns settle.
        """
        if torch.compiler.is_compiling():
            return
        parts = dict(self._parts)
        for readers in (found.readers for found in getattr(self._forward, "rounds", None) or ()):
            seen = {id(parts[i]): parts[i] for i in readers if i in parts}
            divided = [tuple(i for i in readers if i not in parts)]
            for part in seen.values():
                read = tuple(i for i in part if i in readers)
                if len(read) < len(part):
                    divided += [read, tuple(i for i in part if i not in readers)]
            for part in divided:
                parts.update(dict.fromkeys(part, part))
        self._parts = parts

    def end(self) -> None:
        """End a forward, also one that failed: no tensor is kept."""
        if not torch.compiler.is_compiling():
            self._forward.rounds = self._forward.activated = None

    def activate(self, x: Tensor, silu: Any) -> Tensor | None:
        """Return silu(x), the same tensor for the same x, None outside of a forward."""
        done = getattr(self._forward, "activated", None)
        if done is None or not _is_usable(x):
            return None
        for given, version, out, out_version in done:
            if given is x and version == x._version and out_version == out._version:
                return out
        out = silu(x)
        if _is_usable(out):
            done.append((x, x._version, out, out._version))
        return out

    def output(self, layer: QuantLinear, x: Tensor) -> Tensor | None:
        """Return layer(x) if it was computed with others', or is now; else None."""
        rounds = getattr(self._forward, "rounds", None)
        member = self.members.get(id(layer))
        if rounds is None or member is None or member.layer() is not layer:
            return None
        if not _is_usable(x) or autocast_dtype(x) is not None:
            return None
        found = next((part for part in rounds if part.is_of(x)), None)
        if found is None:
            found = _Round(x)
            rounds.append(found)
        found.readers[id(layer)] = None
        if id(layer) not in found.tried:
            self._evaluate(layer, found)
        out, before = found.outputs.pop(id(layer), (None, ()))
        return out if out is not None and _same(before, _buffers(layer)) else None

    def _evaluate(self, first: QuantLinear, of: _Round) -> None:
        """Compute the outputs of a layer and of those that went with it so far."""
        x = of.x
        if self.members[id(first)].refuse() is not None or not _fits(first, first, x):
            of.tried.add(id(first))
            return
        part = self._parts.get(id(first), (id(first),))
        of.tried.update(part)
        members = [self.members[i] for i in part]
        layers = [member.layer() for member in members if member.refuse() is None]
        layers = [layer for layer in layers if _fits(layer, first, x)]
        if len(layers) < 2 or not same_bits(x):
            return
        given = [_buffers(layer) for layer in layers]
        w, w_scale, bias = ([buffers[i] for buffers in given] for i in range(3))
        outputs = ops.gemv_w4a16_grouped(x, w, w_scale, bias=bias)
        self.launches[len(layers)] += 1
        for layer, out, buffers in zip(layers, outputs, given, strict=True):
            of.outputs[id(layer)] = out, buffers


class _Edge:
    """A hook of the model; of a copied model it has no group."""

    def __init__(self, group: _Group, method: str) -> None:
        self._group, self._method = group, method

    def __call__(self, *_: Any) -> None:
        if self._group is not None:
            getattr(self._group, self._method)()


def _fits(layer: QuantLinear, first: QuantLinear, x: Tensor) -> bool:
    """Return whether a layer takes x, and can be in a launch with the first."""
    given = [t for t in (layer.quantized, layer.weight_scale, layer.bias) if t is not None]
    return (
        all(t.device == x.device and not t.is_inference() for t in given)
        and not needs_derivative(*given)
        and layer.weight_scale.dtype == first.weight_scale.dtype
        and layer.scheme.group == first.scheme.group
        and x.dim() > 0
        and x.shape[-1] == layer.in_features
    )


class GroupedSiLU(nn.SiLU):
    """The activation before a modulation layer: one output for one input in a forward."""

    def forward(self, input: Tensor) -> Tensor:
        """Return silu(input)."""
        group = None if torch.compiler.is_compiling() else self.__dict__.get("_modulations")
        out = None if group is None else group.activate(input, super().forward)
        return super().forward(input) if out is None else out


class GroupedW4A16Linear(W4A16Linear):
    """A modulation layer, which may have been evaluated with others."""

    def forward(self, input: Any, join: Any = None, **end: Any) -> Any:
        """Return what `W4A16Linear` returns."""
        group = None if torch.compiler.is_compiling() else self.__dict__.get("_modulations")
        if group is not None and join is None and not end:
            out = group.output(self, input)
            if out is not None:
                return out
        return super().forward(input, join, **end)


_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.SiLU: GroupedSiLU,
    W4A16Linear: GroupedW4A16Linear,
}


@dataclass
class GroupedModulations:
    """What `group_modulations` did.

    grouped   names of the layers that may be evaluated with others
    left      name -> why a modulation layer is always evaluated by itself
    """

    grouped: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    _launches: Counter[int] = field(default_factory=Counter, repr=False)  # by layers in one
    _changed: list[nn.Module] = field(default_factory=list, repr=False)
    _hooks: list[Any] = field(default_factory=list, repr=False)  # torch's handles

    def explain(self) -> str:
        """Return which layers can share launches, the launches so far, and why others can't."""
        lines = []
        if self.grouped:
            many = ", ".join(f"{n} of {k} layers" for k, n in sorted(self._launches.items()))
            lines = [
                f"{len(self.grouped)} modulation layers can share a launch where they read one "
                "input; none do under autocast, in inference mode, where something is "
                "differentiated or compiled, or for more rows than agree to the bit"
            ]
            lines += [f"launches so far: {many}"] if many else []
        for reason, count in Counter(self.left.values()).most_common():
            lines.append(f"left alone: {count} modulation layers, {reason}")
        return "\n".join(lines) or "no modulation layers: linear layers behind a silu of their own"

    def undo(self) -> None:
        """Give the modules back the classes they had, and take the hooks out."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._changed:
            module = self._changed.pop()
            module.__dict__.pop("_modulations", None)
            for before, form in _FORMS.items():
                if type(module) is form:
                    module.__class__ = before
        self.grouped.clear()


def _pairs(model: nn.Module) -> list[tuple[str, nn.Module, str, nn.SiLU, nn.Module]]:
    """Return (name, parent, key, activation, layer) of every layer behind a silu of its own."""
    found = []
    for name, parent in model.named_modules():
        children = parent._modules
        for first, second in (("silu", "linear"), ("0", "1")):
            silu, layer = children.get(first), children.get(second)
            if first == "0" and (type(parent) is not nn.Sequential or len(children) != 2):
                continue
            if (
                type(silu) in (nn.SiLU, GroupedSiLU)
                and not silu.inplace
                and isinstance(layer, nn.Linear)
            ):
                found.append((f"{name}.{second}" if name else second, parent, second, silu, layer))
    return found


def modulation_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers behind a silu of their own, as adaLN's are."""
    return [pair[0] for pair in _pairs(model)]


def _is_known(parent: nn.Module) -> bool:
    """Return whether nothing but the layer reads what the activation before it returns."""
    package = type(parent).__module__.partition(".")[0]
    return type(parent) is nn.Sequential or package in ("diffusers", __package__.partition(".")[0])


def _path(model: nn.Module, name: str) -> tuple[Parent, ...]:
    """Return the modules around a layer, without the model itself."""
    keys, path = name.split(".")[:-1], []
    for key in keys:
        model = model._modules[key]
        path.append(Parent(model))
    return tuple(path)


def group_modulations(model: nn.Module) -> GroupedModulations:
    """Let modulation layers in w4a16 that read one input be evaluated together; see the module.

    Args:
        model: of diffusers, with layers that `fewstep.quantize` or `from_pretrained` quantised.

    Returns:
        The handle: `grouped`, `left`, `explain()`, `undo()`. Nothing to do is no error.
    """
    handle = GroupedModulations()
    group = _Group(handle._launches)
    alike: dict[Any, list[Any]] = defaultdict(list)
    for pair in _pairs(model):
        layer = pair[-1]
        if type(layer) is GroupedW4A16Linear:
            here = layer.__dict__.get("_modulations") is not None
            handle.left[pair[0]] = "grouped already" if here else "in a copy of a grouped model"
        elif not isinstance(layer, W4A16Linear):
            scheme = layer.scheme if isinstance(layer, QuantLinear) else "not quantised"
            handle.left[pair[0]] = f"{scheme}"
        elif type(layer) is not W4A16Linear:
            handle.left[pair[0]] = f"a {type(layer).__name__}"
        elif not _is_known(pair[1]):
            handle.left[pair[0]] = f"what {type(pair[1]).__name__} does with its silu is not known"
        elif (reason := _refuse_layer(layer)) is not None:
            handle.left[pair[0]] = reason
        else:
            alike[layer.in_features, layer.scheme.group].append(pair)
    for pairs in alike.values():
        if len(pairs) < 2:
            handle.left[pairs[0][0]] = "no other has its inputs and groups"
            continue
        for name, parent, key, silu, layer in pairs:
            group.members[id(layer)] = _Member(
                Parent(layer), Parent(parent), key, _path(model, name)
            )
            for module in (silu, layer):
                if type(module) in _FORMS:  # one layer may sit in several places
                    module.__class__ = _FORMS[type(module)]
                    module.__dict__["_modulations"] = group
                    handle._changed.append(module)
            handle.grouped.append(name)
    if handle.grouped:
        handle._hooks = [
            model.register_forward_pre_hook(_Edge(group, "begin")),
            model.register_forward_hook(_Edge(group, "learn")),
            model.register_forward_hook(_Edge(group, "end"), always_call=True),
        ]
    return handle


def expect_how(how: str | None) -> None:
    """Refuse what `quantize(modulations=)` does not know.

    Raises:
        ValueError: as said.
    """
    if how is not None and how not in HOW:
        raise ValueError(f"modulations: expected None or one of {', '.join(HOW)}, got {how!r}")
