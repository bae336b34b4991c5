"""What `quantize` does besides replacing layers: norms and activations around them.

`norms` (None by default) is in `norms.py`, `activations` ("fuse" by default) in `activations.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from . import activations, norms
from .activations import FusedActivations, fuse_activations
from .norms import FusedNorms, fuse_norms

Fused = FusedActivations | FusedNorms


class Fusions(NamedTuple):
    """The two keywords, by their names."""

    norms: str | None = None
    activations: str | None = "fuse"

    def expect(self, model: nn.Module | None = None) -> Fusions:
        """Refuse values that are not known, and norms for a model that has none of the known ones.

        Raises:
            ValueError: as said; the message names the keyword.
        """
        activations.expect_how(self.activations)
        if self.norms is not None:
            norms.expect_how(self.norms)
            if model is not None:
                norms.expect_places(model)
        return self

    def apply(self, model: nn.Module) -> list[Fused]:
        """Fuse in a model whose layers are quantised; return the handles."""
        handles: list[Fused] = []
        if self.activations is not None:
            handles.append(fuse_activations(model))
        if self.norms is not None:
            handles.append(fuse_norms(model, self.norms))
        return handles
