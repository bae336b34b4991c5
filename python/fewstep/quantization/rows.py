"""Rows that are quantised already: what several layers read, quantised once.

A `QuantizedRows` stands for the tensor q * scale[..., None] in a dtype, and goes through a model in
its place as far as the quantised layers that read it. It is no tensor: what needs values raises.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops


@dataclass(frozen=True)
class QuantizedRows:
    """Activations as `ops.quantize_int8` returns them.

    q       [..., C]  int8
    scale   [...]     float32
    dtype   of the activations, and of what layers make of them
    smooth  the factors that they were divided by first: the very tensor of the layers, or None
    rotate  the block in which they were rotated after that, or 0
    """

    q: Tensor
    scale: Tensor
    dtype: torch.dtype
    smooth: Tensor | None = None
    rotate: int = 0

    @staticmethod
    def of(x: Tensor, smooth: Tensor | None = None, rotate: int = 0) -> QuantizedRows:
        """Quantise activations as a layer with these factors and this rotation does."""
        q, scale = ops.quantize_int8(x, smooth=smooth, rotate=rotate)
        return QuantizedRows(q, scale, x.dtype, smooth, rotate)

    @property
    def shape(self) -> torch.Size:
        """Shape of the activations."""
        return self.q.shape

    @property
    def ndim(self) -> int:
        """Axes of the activations."""
        return self.q.ndim

    @property
    def device(self) -> torch.device:
        """Where the activations are."""
        return self.q.device

    def to(self, *args: Any, **kwargs: Any) -> QuantizedRows:
        """As `Tensor.to`; another dtype changes what layers return, not q."""
        like = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        q, scale = self.q.to(like.device), self.scale.to(like.device)
        return replace(self, q=q, scale=scale, dtype=like.dtype)
