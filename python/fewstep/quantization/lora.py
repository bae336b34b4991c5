"""A peft LoRA on a quantised layer: rows of the layer's one low-rank branch, not passes of its own.

    y = x W^T + bias + (x [down; A_1; ...]^T) [up, s_1 B_1, ...]^T

down, up  [R, K], [N, R]      the layer's own branch, where it has one
A, B, s   [r, K], [N, r]      of each active adapter, s its scaling (alpha / r, times set_adapters')

`lora.Linear` of peft calls its base layer and then, for each adapter, two products and two passes
over the output. Around a `QuantLinear` it becomes the class below, which hands A and s B to the
layer: one product of rank R + sum r. Names, parameters, files and methods are peft's.

The joined factors are made in every call, by copies of (R + r) (K + N) values, a small share of the
weight. Keeping them would need to notice every change of A, B and s, and writes through `.data`
can't be noticed: peft's hot-swapping writes so, and so do averages of weights in training.

What the branch can't express goes peft's own way: DoRA and the other variants, a bias of B, dropout
that is drawn, `adapter_names`, factors with hooks (offloading at leaf level) or of other classes
than nn.Linear, and training of factors in another dtype than x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..ops._layout import FLOATS
from .hooks import has_hooks
from .linear import QuantLinear, autocast_dtype


class Linear(lora.Linear):
    """peft's `lora.Linear` whose base layer is a `QuantLinear`; made from one by `adopt`."""

    base_layer: QuantLinear

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the base layer's output with the active adapters'.

        `activation` and `rows` are `QuantLinear.forward`'s, for an x that `joined` does not refuse.
        """
        end = {name: kwargs.pop(name) for name in ("activation", "rows") if name in kwargs}
        names = None if args or kwargs else self.joined(x)
        if names is None:
            if end:
                raise TypeError(
                    f"{', '.join(end)}: expected none, because what the adapters add is beside the "
                    "layer, got one"
                )
            return super().forward(x, *args, **kwargs)
        if not names:
            return self.base_layer(x, **end)
        return self.base_layer(x, join=partial(self._join, names), **end)

    def joined(self, x: Tensor) -> list[str] | None:
        """Return the adapters that join the layer's branch, or None where not all of them can."""
        if self.merged:
            return None
        if self.disable_adapters:
            return []
        names = [name for name in self.active_adapters if self._counts(name)]
        return names if all(self._joins(name, x) for name in names) else None

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, and not its `qweight`, which peft's own would return."""
        return self.base_layer.weight

    def _get_base_layer_device_and_dtype(self, base_layer: QuantLinear) -> tuple[Any, Any]:
        return base_layer.quantized.device, base_layer.weight_dtype  # without computing a weight

    def _counts(self, name: str) -> bool:
        """Return whether an adapter is here and not switched off by its weight."""
        if name not in self.lora_A:
            return False
        scale = self.scaling[name]  # a tensor where hot-swapping is prepared, else a float
        return isinstance(scale, Tensor) or scale != 0 or torch.is_grad_enabled()

    def _joins(self, name: str, x: Tensor) -> bool:
        """Return whether an adapter is no more than A, B and a scale."""
        A, B, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if name in getattr(self, "lora_variant", ()) or self.use_dora.get(name, False):
            return False
        drawn = dropout.training and getattr(dropout, "p", 0) > 0
        if drawn or not isinstance(dropout, (nn.Identity, nn.Dropout)):
            return False
        if not (_is_plain(A) and _is_plain(B)) or B.bias is not None:
            return False
        if x.dtype == A.weight.dtype or autocast_dtype(x) is not None:
            return True
        # For inference A is rounded to x's dtype, as x was. Training float32 factors is a choice.
        return not (torch.is_grad_enabled() and A.weight.requires_grad)

    def _join(
        self, names: list[str], down: Tensor | None, up: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        rows = [] if down is None else [down]
        columns = [] if up is None else [up]
        for name in names:
            B, scale = self.lora_B[name].weight, self.scaling[name]
            rows.append(self.lora_A[name].weight.to(dtype))
            is_one = not isinstance(scale, Tensor) and scale == 1
            columns.append(B if is_one else B * scale)
        return _cat(rows, 0), _cat(columns, 1)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _is_plain(factor: nn.Module) -> bool:
    """Return whether multiplying with `factor.weight` is all that calling it does."""
    if type(factor) is not nn.Linear or "forward" in factor.__dict__:
        return False
    if has_hooks(factor):
        return False
    weight = factor.weight
    return type(weight) in (Tensor, nn.Parameter) and weight.dtype in FLOATS


def adopt(layer: nn.Module) -> None:
    """Make peft's LoRA around a quantised layer the class above; others stay what they are."""
    if type(layer) is lora.Linear:
        layer.__class__ = Linear
