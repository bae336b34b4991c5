"""Whether a module is the one of before: what is in it, its attributes and its weights.

At every call by identity of modules, value of attributes, and identity, storage, layout and version
of tensors, which every ordinary write changes. Writes through `.data` (peft's merges, averages of
weights) change none of these: they are looked for less often, in a sample of the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .clock import Unknown

__all__ = ["Weights"]

_SAMPLE = 512  # elements of a tensor


# What every module has: children, tensors and hooks, which are followed apart. Parts that stand for
# a forward set the last ones.
_OWN = frozenset(vars(nn.Module())) | {"forward", "_fewstep_time", "_fewstep_text"}
_PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for name, value in module.__dict__.items():
        if name not in _OWN and isinstance(value, Tensor):
            yield value
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


def _form(value: Any) -> Any:
    """Return what two values of an attribute share only if a module does the same with both."""
    if isinstance(value, _PLAIN):
        return type(value), repr(value) if isinstance(value, float) else value
    if isinstance(value, Tensor):  # followed as a weight
        return Tensor
    if isinstance(value, tuple | list):
        return type(value), tuple(map(_form, value))
    if isinstance(value, dict):
        return type(value), tuple((name, _form(x)) for name, x in value.items())
    try:
        return id(value), weakref.ref(value)  # other objects are not asked whether they equal
    except TypeError:
        raise Unknown(f"an attribute of type {type(value).__name__}") from None


def _structure(module: nn.Module) -> Iterator[Any]:
    """Yield the module, its attributes, and the same of all in it."""
    yield weakref.ref(module)
    yield type(module)
    for name, value in module.__dict__.items():
        if name not in _OWN:
            yield name, _form(value)
    for name, child in module._modules.items():
        yield name
        if child is not None:
            yield from _structure(child)


class _Weight:
    """A tensor as it was. Its storage is held weakly: memory goes when the model's does."""

    def __init__(self, tensor: Tensor) -> None:
        if tensor.is_meta:
            raise Unknown("weights are not there")
        if tensor.is_inference():
            raise Unknown("weights were made in inference mode")
        storage = tensor.untyped_storage()
        self.tensor = weakref.ref(tensor)
        self.version = tensor._version
        self.storage = StorageWeakRef(storage)  # keeps the address from being used again
        self.layout = (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())

    def is_same(self, tensor: Tensor) -> bool:
        return (
            self.tensor() is tensor
            and not tensor.is_inference()
            and self.version == tensor._version
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.layout
            == (tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
        )


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    some = flat[:: max(1, flat.numel() // _SAMPLE)]
    return some.clone(memory_format=torch.contiguous_format).view(torch.uint8)


class Weights:
    """A module and what is in it as they were. Nothing of it is held strongly.

    Attributes:
        state: a number that belongs to what was remembered last.
    """

    def __init__(self) -> None:
        self.state = 0
        self._structure: list[Any] = []
        self._held: list[_Weight] = []
        self._samples: list[Tensor] = []

    def are_same(self, module: nn.Module) -> bool:
        """Whether all is as in `remember`, tensors unchanged as far as versions tell.

        Raises:
            Unknown: attributes that can't be followed.
        """
        tensors = list(_tensors(module))
        return (
            len(tensors) == len(self._held)
            and all(map(_Weight.is_same, self._held, tensors))
            and self._structure == list(_structure(module))
        )

    def remember(self, module: nn.Module) -> None:
        """Take what is there now for what later calls are compared with.

        Raises:
            Unknown: tensors or attributes that can't be followed.
        """
        self.forget()
        tensors = list(_tensors(module))
        held = [_Weight(tensor) for tensor in tensors]
        structure = list(_structure(module))
        self._samples = [_sample(tensor) for tensor in tensors if tensor.numel()]
        self._structure, self._held = structure, held

    def forget(self) -> None:
        """Hold nothing: no module is the same then."""
        self.state += 1
        self._structure, self._held, self._samples = [], [], []

    def samples(self, module: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some bytes of each tensor, as they were and as they are; none where others are."""
        try:
            same = self._held and self.are_same(module)
        except Unknown:
            same = False
        if same:
            tensors = (tensor for tensor in _tensors(module) if tensor.numel())
            for before, tensor in zip(self._samples, tensors, strict=True):
                yield before, _sample(tensor)
