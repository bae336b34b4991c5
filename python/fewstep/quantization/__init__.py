"""Quantised modules and the call that puts them into a model.

handle = fewstep.quantization.quantize_linears(transformer)
print(handle.explain())
handle.undo()
"""

from __future__ import annotations

from .linear import QuantLinear
from .replace import QuantizedModules, default_skip, quantize_linears

__all__ = ["QuantLinear", "QuantizedModules", "default_skip", "quantize_linears"]
