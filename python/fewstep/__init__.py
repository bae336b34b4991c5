"""fewstep makes diffusers pipelines fast at 1-8 steps, and trains the few-step weights.

    import fewstep

    patch = fewstep.patch(pipe, quantize="w8a8", cache="taylor")
    images = pipe(...)
    patch.undo()

Importing the package imports neither diffusers nor Triton and touches no device: everything below
is loaded on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import (
        assets,
        caching,
        distillation,
        metrics,
        ops,
        quantization,
        reference,
        sampling,
        tangent,
    )
    from .patching import (
        Patch,
        QuantizationConfig,
        apply_cache,
        load_nunchaku,
        patch,
        quantize,
        remove_cache,
    )
    from .tangent import forward_mode, jvp, scaled_dot_product_attention

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
    "tangent",
)
_FROM = {
    "apply_cache": "patching",
    "patch": "patching",
    "Patch": "patching",
    "forward_mode": "tangent",
    "jvp": "tangent",
    "load_nunchaku": "patching",
    "quantize": "patching",
    "remove_cache": "patching",
    "QuantizationConfig": "patching",
    "scaled_dot_product_attention": "tangent",
}

__all__ = [
    "Patch",
    "QuantizationConfig",
    "__version__",
    "apply_cache",
    "assets",
    "caching",
    "distillation",
    "forward_mode",
    "jvp",
    "load_nunchaku",
    "metrics",
    "ops",
    "patch",
    "quantization",
    "quantize",
    "reference",
    "remove_cache",
    "sampling",
    "scaled_dot_product_attention",
    "tangent",
]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f"fewstep.{_FROM[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"fewstep.{name}")
    raise AttributeError(f"module 'fewstep' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
