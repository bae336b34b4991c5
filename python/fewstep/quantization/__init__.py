"""Quantised modules and the call that puts them into a model.

handle = fewstep.quantize(transformer, "w4a8", rank=32)
print(handle.explain())
handle.undo()
"""

from __future__ import annotations

from .allocate import allocate
from .calibration import Calibration, calibrate
from .layers import FP8Linear, W4A8Linear, W4A16Linear, W8A8Linear
from .linear import QuantLinear
from .nunchaku import pack_awq, pack_svdq, unpack_awq, unpack_svdq
from .nunchaku_file import load_nunchaku
from .plan import Plan
from .replace import QuantizedModules, choose_layers, default_skip, quantize
from .rows import QuantizedRows
from .scheme import KINDS, Scheme

__all__ = [
    "KINDS",
    "Calibration",
    "FP8Linear",
    "Plan",
    "QuantLinear",
    "QuantizedModules",
    "QuantizedRows",
    "Scheme",
    "W4A8Linear",
    "W4A16Linear",
    "W8A8Linear",
    "allocate",
    "calibrate",
    "choose_layers",
    "default_skip",
    "load_nunchaku",
    "pack_awq",
    "pack_svdq",
    "quantize",
    "unpack_awq",
    "unpack_svdq",
]
