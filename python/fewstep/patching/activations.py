"""Activations of diffusers' feed-forward layers, computed inside of the quantised product.

    y = x W^T + bias + branch                 v = act(y)

`GELU`, `GEGLU`, `SwiGLU` and `LinearActivation` of diffusers hold the layer and the activation
both and round y between them. With a `QuantLinear` for the layer the product applies act to its
float32 sums (`ops/_epilogue.py`), so v is rounded once, and y never reaches memory. A `FeedForward`
goes on: where its second layer quantises what it gets as it is, the first product returns v as int8
rows, the very rows that the second layer would have made of it.

Nothing outside of these modules sees anything else than before: they get and return tensors. Only
the class of the instances changes, to one that adds a path to `forward`; modules, parameters, names
and hooks stay the same objects. In each call it is decided anew, and diffusers' own forward runs
where the layer is not a quantised one with at most a LoRA that joins its branch, where something is
hooked between the layer and the activation, and while anything is differentiated (act's derivative
needs y, which the product would have to be taken again for).

Blocks that call a layer and then an activation by themselves: `activated_blocks.py`.

`ApproximateGELU` (y sigmoid(1.702 y)) stays as it is: the products don't have it. Gates and
residuals of blocks do, too: on CPUs the product takes longer for them than torch's own pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from diffusers.models import activations as plain
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from ..quantization import QuantLinear
from ..quantization.rows import QuantizedRows
from .fusing import is_watched, is_wrapped, needs_derivative

__all__ = ["FusedActivations", "fuse_activations"]

HOW = ("fuse",)
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def is_quantized(layer: nn.Module | None) -> bool:
    """Return whether a layer is a quantised one, or peft's layer around one."""
    base = getattr(layer, "base_layer", layer)  # peft's layers have one
    return isinstance(base, QuantLinear)


def refuse_layer(layer: nn.Module, x: Tensor | QuantizedRows) -> str | None:
    """Return why a layer can't apply an activation to what it makes of x, or None."""
    if is_watched(layer):
        return "its layer has hooks"
    given = [x] if isinstance(x, Tensor) else []
    if not isinstance(layer, QuantLinear):
        base = layer._modules.get("base_layer")
        if not (isinstance(base, QuantLinear) and hasattr(layer, "joined")):
            return f"its layer is a {type(layer).__name__}"
        if is_watched(base):
            return "its layer has hooks"
        if not given or layer.joined(x) is None:
            return "its layer has adapters that don't join it"
        given += layer.parameters()
    return "it is differentiated" if needs_derivative(*given) else None


class _Activated:
    """A layer with its activation: one product, where that is possible."""

    def activation_name(self) -> str | None:
        """Return what `ops/_epilogue.py` calls the activation, None if it has none such."""
        raise NotImplementedError

    def forward(self, hidden_states: Any, *args: Any, rows: bool = False, **kwargs: Any) -> Any:
        """Return the activation of the layer's output; with `rows`, as int8 rows if it can."""
        if not isinstance(self, _Activated):  # undone below what somebody put around it meanwhile
            return type(self).forward(self, hidden_states, *args, **kwargs)
        name = self.activation_name()
        if args or kwargs or name is None or refuse_layer(self.proj, hidden_states) is not None:
            return super().forward(hidden_states, *args, **kwargs)
        return self.proj(hidden_states, activation=name, rows=rows)


class FusedGELU(_Activated, plain.GELU):
    """diffusers' GELU, exact or by tanh."""

    def activation_name(self) -> str | None:
        """Return "gelu" or "gelu_tanh"."""
        return _GELU.get(self.approximate)


class FusedGEGLU(_Activated, plain.GEGLU):
    """diffusers' GEGLU."""

    def activation_name(self) -> str | None:
        """Return "geglu"."""
        return "geglu"


def activation_of(activation: nn.Module) -> str | None:
    """Return what the products call a module of torch, None if they have none such."""
    if is_wrapped(activation):
        return None
    if type(activation) is nn.GELU:
        return _GELU.get(activation.approximate)
    return "silu" if type(activation) is nn.SiLU else None


class FusedSwiGLU(_Activated, plain.SwiGLU):
    """diffusers' SwiGLU."""

    def activation_name(self) -> str | None:
        """Return "swiglu", or None where its activation was replaced."""
        return "swiglu" if activation_of(self.activation) == "silu" else None


class FusedLinearActivation(_Activated, plain.LinearActivation):
    """diffusers' LinearActivation with silu or gelu."""

    def activation_name(self) -> str | None:
        """Return the activation's name, None for others."""
        return activation_of(self.activation)


class FusedFeedForward(FeedForward):
    """diffusers' feed-forward layer, whose first product quantises for the second."""

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the layers of `net` make of the input, one after the other."""
        if not isinstance(self, FusedFeedForward):
            return type(self).forward(self, hidden_states, *args, **kwargs)
        if args or kwargs or self.refuse_chain() is not None:
            return super().forward(hidden_states, *args, **kwargs)
        first, _, *rest = self.net
        hidden_states = first(hidden_states, rows=True)
        for module in rest:
            hidden_states = module(hidden_states)
        return hidden_states

    def refuse_chain(self) -> str | None:
        """Return why the second layer takes no rows from the first, or None."""
        first, dropout, second, *_ = self.net
        if not isinstance(first, _Activated):
            return f"its first layer is a {type(first).__name__}"
        if type(dropout) is not nn.Dropout or (dropout.training and dropout.p > 0):
            return "something is between its layers"
        if not isinstance(second, QuantLinear):
            return f"its second layer is a {type(second).__name__}"
        if any(is_wrapped(module) for module in (self.net, first, dropout, second)):
            return "something between its layers has hooks"
        if (reason := second.refuse_rows()) is not None:
            return f"its second layer {reason}"
        if second.smooth is not None or second.rotate:
            return "its second layer smooths or rotates what it gets"
        return None


_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    plain.GELU: FusedGELU,
    plain.GEGLU: FusedGEGLU,
    plain.SwiGLU: FusedSwiGLU,
    plain.LinearActivation: FusedLinearActivation,
    FeedForward: FusedFeedForward,
}


@dataclass
class FusedActivations:
    """What `fuse_activations` did.

    fused     names of the modules whose activation is part of their layer's product
    chained   names of the feed-forward layers whose second layer gets int8 rows from the first
    left      name -> why the second layer of another one quantises for itself
    """

    fused: list[str] = field(default_factory=list)
    chained: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    # With the class before only: pickle finds that by its name, but not the form of a block.
    _changed: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def explain(self) -> str:
        """Return how many activations are part of a product, and how many rows go on in int8."""
        if not self.fused:
            return "0 activations are part of the product before them"
        lines = [
            f"{len(self.fused)} activations are part of the product before them; "
            f"{len(self.chained)} feed-forward layers hand int8 rows to their second layer"
        ]
        for reason, count in Counter(self.left.values()).most_common():
            lines.append(f"left alone: the second layer of {count}, {reason}")
        return "\n".join(lines)

    def undo(self) -> None:
        """Give the modules back the classes they had."""
        while self._changed:
            module, before = self._changed.pop()
            if type(module) is _fused_form(before):
                module.__class__ = before
        self.fused.clear()
        self.chained.clear()

    def change(self, module: nn.Module) -> None:
        """Give a module the form of its class that fuses."""
        form = _fused_form(type(module))
        assert form is not None
        self._changed.append((module, type(module)))
        module.__class__ = form


def _fused_form(before: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class that modules of a class get, None if they keep theirs."""
    from .activated_blocks import form_of  # which takes parts of this module

    return _FORMS.get(before) or form_of(before)


def fuse_activations(model: nn.Module) -> FusedActivations:
    """Let products of quantised layers compute the activations behind them, in place.

    Args:
        model: of diffusers, with layers that `fewstep.quantize` or `from_pretrained` quantised.

    Returns:
        The handle: `fused`, `chained`, `explain()`, `undo()`. Nothing to do is no error.
    """
    from .activated_blocks import wants  # which takes parts of this module

    handle = FusedActivations()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        form = _FORMS.get(type(module), nn.Module)
        if issubclass(form, _Activated) and is_quantized(module.proj):
            if form.activation_name(module) is not None:  # diffusers has mish and relu, too
                handle.change(module)
                handle.fused.append(name)
        elif wants(module):
            handle.change(module)
            handle.fused.append(f"{name}.act_mlp" if name else "act_mlp")
    for name, module in modules.items():
        if type(module) is FeedForward and isinstance(module.net[0], _Activated):
            handle.change(module)
            reason = module.refuse_chain()
            if reason is None:
                handle.chained.append(name)
            else:
                handle.left[name] = reason
    return handle


def expect_how(how: str | None) -> None:
    """Refuse what `quantize(activations=)` does not know.

    Raises:
        ValueError: as said.
    """
    if how is not None and how not in HOW:
        raise ValueError(f"activations: expected None or one of {', '.join(HOW)}, got {how!r}")
