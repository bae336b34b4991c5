"""Oracle of `fewstep.ops.gemm_grouped`: `gemm_w8a8` or `gemm_fp8`, problem by problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gemm_fp8 import gemm_fp8
from .gemm_w8a8 import gemm_w8a8


def gemm_grouped(
    a: Sequence[Tensor],
    a_scale: Sequence[Tensor | None],
    w: Sequence[Tensor],
    w_scale: Sequence[Tensor],
    *,
    out_dtype: torch.dtype,
    activation: str | None = None,
    rotate: int = 0,
    **lists: Sequence[Any],
) -> list[Tensor]:
    """Return the products; float64 throughout. `lists`: the other arguments, one entry each."""
    shared = {"activation": activation, "rotate": rotate, "out_dtype": out_dtype}
    outs = []
    for i, first in enumerate(zip(a, a_scale, w, w_scale, strict=True)):
        product = gemm_w8a8 if w[i].dtype == torch.int8 else gemm_fp8
        outs.append(product(*first, **{name: x[i] for name, x in lists.items()}, **shared))
    return outs
