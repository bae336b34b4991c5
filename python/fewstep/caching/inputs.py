"""Which argument of a model is its input, which is the time, and what an input looks like.

input     by its name in diffusers' denoisers, or else the first floating tensor (or list of
          such) with room for samples, channels and places
entry     the input as one tensor [B, ...]; lists of samples of one size are stacked (Z-Image)
form      shape, dtype and device of the entry; of samples of several sizes, all shapes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["CONDITIONING", "entry_of", "form_of", "input_of", "stacked", "tensors_of", "time_of"]

# What tells the guided from the unguided pass; the first one given counts.
CONDITIONING = ("encoder_hidden_states", "class_labels", "pooled_projections")
_INPUTS = ("hidden_states", "sample", "x", "latents", "input_ids")
_TIMES = ("timestep", "t", "time")
_LEAST = 3  # dimensions: samples, channels (or tokens) and places


def input_of(given: Mapping[str, Any]) -> Any:
    """Return the input among a model's arguments: a tensor, a list of tensors, or None."""
    for name in _INPUTS:
        if tensors_of(given.get(name)):
            return given[name]
    beside = (*_TIMES, *CONDITIONING)
    others = [value for name, value in given.items() if name not in beside]
    return next(
        (value for value in others if _may_be_latents(value)),
        next((value for value in others if isinstance(value, Tensor)), None),
    )


def time_of(given: Mapping[str, Any]) -> Any:
    """Return the time that a model is given, or None."""
    return next((given[name] for name in _TIMES if given.get(name) is not None), None)


def _may_be_latents(value: Any) -> bool:
    tensors = tensors_of(value)
    more = not isinstance(value, Tensor)  # a list's own dimension
    return bool(tensors) and all(
        x.is_floating_point() and x.dim() + more >= _LEAST for x in tensors
    )


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors of a tensor or of nested lists of nothing but tensors, else none."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, list | tuple):
        return []
    found = [tensors_of(part) for part in value]
    return [tensor for part in found for tensor in part] if all(found) else []


def stacked(value: list[Any] | tuple[Any, ...]) -> Tensor | None:
    """Return a list of tensors of one form as one tensor, None where it is no such list."""
    if not value or not all(isinstance(part, Tensor) for part in value):
        return None
    return torch.stack(tuple(value)) if len({_form(part) for part in value}) == 1 else None


def entry_of(given: Any) -> Tensor | None:
    """Return an input as one tensor; None where there is none, or samples of several sizes."""
    return given if given is None or isinstance(given, Tensor) else stacked(given)


def form_of(given: Any, entry: Tensor | None) -> tuple[Any, ...]:
    """Return shape, dtype and device of an input; () where there is none."""
    if entry is not None:
        return _form(entry)
    tensors = tensors_of(given)
    if not tensors:
        return ()
    return (len(tensors), *(x.shape for x in tensors)), tensors[0].dtype, tensors[0].device


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device
