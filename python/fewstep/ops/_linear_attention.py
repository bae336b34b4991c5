"""What `linear_attention_jvp` and its backward share: checks and layouts of their six inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._expect import expect_tensor, expect_tensors
from ._layout import DTYPES, FLOATS
from ._rows import acc_dtype
from ._select import refuse_triton

HEAD_DIMS = range(8, 129, 8)
MAX_GPU_DIM = 64  # the states of wider heads don't fit in shared memory
NAMES = ("q", "k", "v", "t_q", "t_k", "t_v")


def refuse_triton_heads(*args: Any, **kwargs: Any) -> str | None:
    """Return why the Triton kernels can't run: their conditions, or too wide a head on a GPU."""
    heads = [x for x in args[:5] if isinstance(x, Tensor)]  # in either op, q and v are among these
    widest = max(x.shape[-1] for x in heads)
    if heads[0].device.type == "cuda" and widest > MAX_GPU_DIM:
        return f"expected head dims up to {MAX_GPU_DIM} on a GPU, got {widest}"
    return refuse_triton(args, FLOATS)


def new_states(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate state and t_state for 4-d q and v."""
    shape = (*q.shape[:2], q.shape[-1], v.shape[-1] + 1)
    return q.new_empty(shape, dtype=acc_dtype(q)), q.new_empty(shape, dtype=acc_dtype(q))


def new_like_rows(x: Tensor, rows: int, columns: int) -> Tensor:
    """Allocate [B, H, rows, columns] with heads inside tokens where x has them so."""
    b, h = x.shape[:2]
    if x.stride(1) < x.stride(2):
        return x.new_empty((b, rows, h, columns)).transpose(1, 2)
    return x.new_empty((b, h, rows, columns))


def validate(q: Tensor, k: Tensor, v: Tensor, tangents: dict[str, Tensor | None]) -> None:
    """Refuse what neither op takes; the message names the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect_tensor(name, x)
    expect_tensors(**tangents)
    if q.dtype not in DTYPES:
        raise ValueError(f"q: expected a floating dtype, got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q: expected [B, H, N, D], got shape {list(q.shape)}")
    for name, x in {"k": k, "v": v, **tangents}.items():
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise ValueError(f"{name}: expected the dtype of q, {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {x.device}")
        if x.dim() != 4 or x.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name}: expected the batch and heads of q, {list(q.shape[:2])}, and two more "
                f"axes, got shape {list(x.shape)}"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: expected the head dim of q, {q.shape[-1]}, got {k.shape[-1]}")
    if v.shape[-2] != k.shape[-2]:
        raise ValueError(f"v: expected as many rows as k, {k.shape[-2]}, got {v.shape[-2]}")
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] not in HEAD_DIMS:
            raise ValueError(
                f"{name}: expected a head dim that is a multiple of 8 from 8 to 128, got "
                f"{x.shape[-1]}"
            )
    for name, primal in (("t_q", q), ("t_k", k), ("t_v", v)):
        tangent = tangents[name]
        if tangent is not None and tangent.shape != primal.shape:
            raise ValueError(
                f"{name}: expected the shape of {name[2:]}, {list(primal.shape)}, got "
                f"{list(tangent.shape)}"
            )
