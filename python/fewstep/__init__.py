"""fewstep makes diffusers pipelines fast at 1-8 steps, and trains the few-step weights.

    import fewstep

    patch = fewstep.patch(pipe, steps=2, quantize="w8a8", cache="first-block")
    images = pipe(...)
    patch.undo()

Importing the package imports neither diffusers nor Triton and touches no device: everything below
is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import assets, caching, distillation, metrics, ops, quantization, reference, sampling
    from .patching import Patch, patch

__version__ = "0.1.0"

_MODULES = (
    "assets",
    "caching",
    "distillation",
    "metrics",
    "ops",
    "patching",
    "quantization",
    "reference",
    "sampling",
)
_FROM_PATCHING = ("patch", "Patch")

__all__ = [
    "Patch",
    "__version__",
    "assets",
    "caching",
    "distillation",
    "metrics",
    "ops",
    "patch",
    "quantization",
    "reference",
    "sampling",
]


def __getattr__(name: str) -> Any:
    if name in _FROM_PATCHING:
        return getattr(importlib.import_module("fewstep.patching"), name)
    if name in _MODULES:
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
