"""The number of parameters of a model whose quantised weights are buffers.

diffusers' `num_parameters` counts what `parameters()` lists, which low-bit values don't belong to:
they are neither trained nor cast. A model with quantised layers is given a count of its own, which
is what the model had before: N K + N for each layer, without the low-rank branch, which stands for
a part of the weight.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from ..quantization import QuantLinear

_NAME = "num_parameters"


class _Count:
    """`model.num_parameters` of one model; goes with it into copies and pickles."""

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)  # a cycle would keep the weights until the next collection

    def __call__(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of (trainable or non-embedding) parameters, quantised ones included."""
        model = self._model()
        assert model is not None
        count = getattr(type(model), _NAME)(model, only_trainable, exclude_embeddings)
        if only_trainable:
            return count
        layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
        return count + sum(
            layer.in_features * layer.out_features
            + (0 if layer.bias is None else layer.bias.numel())
            for layer in layers
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> _Count:
        # The copy of the model is there already, though not complete.
        return _Count(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Count, (self._model(),)


def count_quantized(model: nn.Module) -> None:
    """Have `model.num_parameters()` count quantised weights, where the model has such a method."""
    if hasattr(type(model), _NAME):
        setattr(model, _NAME, _Count(model))


def count_as_before(model: nn.Module) -> None:
    """Undo `count_quantized`."""
    model.__dict__.pop(_NAME, None)
