"""gemm_fp8 in Triton: gemm_w8a8's kernel on the bits of e4m3 operands, with float32 sums.

a [M, K] and w [N, K] uint8, a_scale [M] or [M, ceil(K / 128)] of blocks, w_scale [N] or with those
[ceil(N / 128), ceil(K / 128)], contiguous; the rest as in gemm_w8a8.py. GPUs of capability 8.9 and
above multiply e4m3; older ones and the interpreter get the same products from float16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import INTERPRETED
from .gemm_w8a8 import launch_gemm_w8a8


def _multiplies_e4m3(device: torch.device) -> bool:
    if INTERPRETED.value:
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 9)


def launch_gemm_fp8(a: Tensor, *operands: Tensor | None) -> None:
    """Fill the last of `operands`, which are those of `launch_gemm_w8a8`."""
    launch_gemm_w8a8(a, *operands, e4m3=True, native=_multiplies_e4m3(a.device))
