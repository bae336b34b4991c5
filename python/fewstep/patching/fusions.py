"""What `quantize` does besides replacing layers: norms and activations around them, and launches.

`norms` (None by default) is in `norms.py`, `activations` ("fuse" by default) in `activations.py`,
`modulations` (None by default) in `modulations.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from . import activations, modulations, norms
from .activations import FusedActivations, fuse_activations
from .modulations import GroupedModulations, group_modulations
from .norms import FusedNorms, fuse_norms

Fused = FusedActivations | FusedNorms | GroupedModulations


class Fusions(NamedTuple):
    """The keywords, by their names."""

    norms: str | None = None
    activations: str | None = "fuse"
    modulations: str | None = None

    def expect(self, model: nn.Module | None = None) -> Fusions:
        """Refuse values that are not known, and norms for a model that has none of the known ones.

        Raises:
            ValueError: as said; the message names the keyword.
        """
        activations.expect_how(self.activations)
        modulations.expect_how(self.modulations)
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
        if self.modulations is not None:
            handles.append(group_modulations(model))
        return handles
