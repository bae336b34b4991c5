"""What `norm_jvp` and its backward share: checks and layouts of their eight inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._expect import expect_tensors
from ._layout import FLOATS
from ._rows import (
    acc_dtype,
    expect_broadcast,
    expect_like,
    expect_primal,
    expect_rows,
)
from ._select import first_tensor, refuse_triton

KINDS = ("layer", "rms")
NAMES = ("x", "t_x", "weight", "bias", "scale", "shift", "t_scale", "t_shift")
MAX_TRITON_COLUMNS = 16384  # a row is held in registers


def parameter(v: Tensor | None, x: Tensor) -> Tensor | None:
    """Return weight or bias as kernels read them: contiguous, in the accumulation dtype."""
    return None if v is None else v.to(acc_dtype(x)).contiguous()


def refuse_triton_rows(*args: Any, **kwargs: Any) -> str | None:
    """Return why the Triton kernels can't run: their conditions, or too many columns."""
    columns = first_tensor(args).shape[-1]
    if columns > MAX_TRITON_COLUMNS:
        return f"expected at most {MAX_TRITON_COLUMNS} columns, got {columns}"
    return refuse_triton(args, FLOATS)


def validate(x: Tensor, inputs: dict[str, Tensor | None], kind: str) -> None:
    """Refuse what neither op takes; `inputs` maps NAMES, the message names the argument."""
    if kind not in KINDS:
        raise ValueError(f"kind: expected 'layer' or 'rms', got {kind!r}")
    expect_rows("x", x)
    expect_like("t_x", inputs["t_x"], "x", x)
    expect_tensors(weight=inputs["weight"], bias=inputs["bias"])
    for name in ("weight", "bias"):
        v = inputs[name]
        if v is None:
            continue
        if v.shape != x.shape[-1:]:
            raise ValueError(f"{name}: expected [C] = [{x.shape[-1]}], got {list(v.shape)}")
        if v.dtype not in (x.dtype, torch.float32):
            raise ValueError(f"{name}: expected {x.dtype} as x has, or float32, got {v.dtype}")
        if v.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {v.device}")
    for name in NAMES[4:]:
        expect_broadcast(name, inputs[name], "x", x)
    for name in ("scale", "shift"):
        expect_primal(f"t_{name}", inputs[f"t_{name}"], inputs[name])
