"""Whether a module's weights are those of before.

At every call by identity, storage, layout and version, which every ordinary write changes. Writes
through `.data` (peft's merges, averages of weights) change none of these: they are looked for less
often, in a sample of the values.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .clock import Unknown

__all__ = ["Weights"]

_SAMPLE = 512  # elements of a tensor


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers):
        for tensor in held.values():
            if tensor is not None:
                yield tensor
    for child in module._modules.values():
        if child is not None:
            yield from _tensors(child)


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
    """The parameters and buffers of a module and what is in it, as they were."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held: list[_Weight] = []
        self._samples: list[Tensor] = []

    def are_same(self) -> bool:
        """Whether the tensors are those of `remember`, unchanged as far as versions tell."""
        tensors = list(_tensors(self._module))
        return len(tensors) == len(self._held) and all(map(_Weight.is_same, self._held, tensors))

    def remember(self) -> None:
        """Take what is there now for what later calls are compared with.

        Raises:
            Unknown: tensors that can't be followed.
        """
        self.forget()
        tensors = list(_tensors(self._module))
        held = [_Weight(tensor) for tensor in tensors]
        self._samples = [_sample(tensor) for tensor in tensors if tensor.numel()]
        self._held = held

    def forget(self) -> None:
        """Hold nothing: no module with weights has the same then."""
        self._held, self._samples = [], []

    def samples(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield some bytes of each tensor, as they were and as they are; none where others are."""
        if self._held and self.are_same():
            tensors = (tensor for tensor in _tensors(self._module) if tensor.numel())
            for before, tensor in zip(self._samples, tensors, strict=True):
                yield before, _sample(tensor)
