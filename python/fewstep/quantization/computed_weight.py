"""What `weight` of a quantised layer returns: a tensor to read, made of its low-bit values."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ComputedWeight"]


class ComputedWeight(Tensor):
    """The dequantised weight, for reading. Assigning to `.data`, as merging a LoRA does, raises."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # what it computes is plain again

    @property
    def data(self) -> Tensor:
        """The values."""
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise RuntimeError(
            "weight: expected to be read only, got an assignment: the weight of a quantised layer "
            "is computed from its low-bit values. A LoRA stays beside it: load it without fusing, "
            "or fuse it before the model is quantised"
        )
