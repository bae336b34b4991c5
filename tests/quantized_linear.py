"""What the tests of QuantLinear share: schemes of every kind, and a layer of one."""

import torch
from torch import nn

from fewstep.quantization import QuantLinear

SCHEMES = ["w8a8", "fp8", "w4a8-g32-r8-h64", "w4a16"]


def make(dtype=torch.float32, bias=True, inputs=192, outputs=100, scheme="w8a8"):
    linear = nn.Linear(inputs, outputs, bias=bias).to(dtype)
    return linear, QuantLinear.from_linear(linear, scheme)
