"""gemm_grouped in Triton: gemm_w8a8's kernel, launched for one problem after the other.

Launches follow each other on one stream; what the Hopper kernel saves, the SMs that the small
problems leave idle, they do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gemm_fp8 import launch_gemm_fp8
from .gemm_w8a8 import launch_gemm_w8a8


def launch_gemm_grouped(problems: Sequence[tuple[Tensor | None, ...]]) -> None:
    """Fill the last of each problem's operands, which are those of `launch_gemm_w8a8`."""
    for operands in problems:
        is_int8 = operands[0].dtype == torch.int8
        (launch_gemm_w8a8 if is_int8 else launch_gemm_fp8)(*operands)
