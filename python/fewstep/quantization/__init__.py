"""Quantised modules and the call that puts them into a model.

handle = fewstep.quantization.quantize_linears(transformer)
print(handle.explain())
handle.undo()
"""

from __future__ import annotations

from .linear import QuantLinear
from .replace import SCHEMES, QuantizedModules, default_skip, quantize_linears

__all__ = ["SCHEMES", "QuantLinear", "QuantizedModules", "default_skip", "quantize_linears"]
