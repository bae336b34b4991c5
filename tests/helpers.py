"""Helpers of the op tests: devices, layouts that catch out-of-bounds accesses, tolerances."""

from pathlib import Path

import torch
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
DEVICES = ["cpu", *(["cuda"] if HAS_CUDA else [])]
CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def place(op: str, impl: str | None, device: str | None, has_cuda: bool = HAS_CUDA) -> str | None:
    """Return the device type that a test of one kernel runs on, or None where it can't run there.

    `device` is the one that the test asks for, None if it leaves the choice: Triton takes the GPU
    where there is one and its CPU interpreter otherwise, never both in a process.
    """
    if impl == "triton":
        only = "cuda" if has_cuda else "cpu"
        return only if device in (None, only) else None
    if impl == "native" and device == "cuda" and not any(CUDA_SOURCES.glob(f"{op}*.cu")):
        return None
    return device or "cpu"


def padded(x: Tensor, pad: int = 37) -> Tensor:
    """Copy x into the middle of a larger buffer whose other elements are NaN (127 for integers).

    A kernel that reads past an edge poisons its result; `padding_intact` finds one that writes.
    """
    fill = float("nan") if x.is_floating_point() else 127
    flat = torch.full((x.numel() + 2 * pad,), fill, dtype=x.dtype, device=x.device)
    flat[pad : pad + x.numel()] = x.reshape(-1)
    return flat[pad : pad + x.numel()].view(x.shape)


def padding_intact(x: Tensor, pad: int = 37) -> bool:
    """Return whether the buffer around a tensor made by `padded` still holds its fill."""
    flat = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
    edges = torch.cat([flat[:pad], flat[-pad:]])
    return bool(edges.isnan().all() if x.is_floating_point() else (edges == 127).all())


def strided(x: Tensor) -> Tensor:
    """Return x with the same values and no contiguous axis order: rows two apart in a wider one."""
    wide = torch.full(
        (*x.shape[:-1], 2 * x.shape[-1] + 3),
        float("nan") if x.is_floating_point() else 127,
        dtype=x.dtype,
        device=x.device,
    )
    view = wide[..., 1 : 1 + 2 * x.shape[-1] : 2]
    view.copy_(x)
    return view


def row_sliced(x: Tensor) -> Tensor:
    """Return x as a slice along its last axis of a wider tensor: unit stride, gaps between rows."""
    wide = torch.full(
        (*x.shape[:-1], x.shape[-1] + 5),
        float("nan") if x.is_floating_point() else 127,
        dtype=x.dtype,
        device=x.device,
    )
    view = wide[..., 2 : 2 + x.shape[-1]]
    view.copy_(x)
    return view


def steps_apart(q: Tensor, other: Tensor) -> Tensor:
    """Return how many 8-bit numbers lie between two results in int8 or e4m3, element by element."""

    def place(x: Tensor) -> Tensor:
        bits = x.view(torch.int8).int()
        # e4m3 has a sign and a magnitude, which numbers it from zero on.
        return bits if x.dtype == torch.int8 else torch.where(bits < 0, -(bits & 0x7F), bits)

    return (place(q) - place(other)).abs()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return the relative Frobenius error against a higher-precision result (0 for 0 / 0)."""
    got, want = got.double(), want.double()
    error = (got - want).norm().item()
    return error / max(want.norm().item(), 1e-300) if error else 0.0
