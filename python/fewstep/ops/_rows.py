"""Tensors as rows, for ops over the last axis with operands that are broadcast along the others.

Kernels see x as [B, N, C] with unit stride in C, and an operand that is broadcast against x as a
view of that shape with stride 0 where it is broadcast. Which axes of x are B and which N is chosen
so that this holds without a copy (`choose_split`), wherever all operands are broadcast along
leading axes, along the last ones or along all. The gradient of an operand comes back as one row per
token, or as sums over the tokens where it has one row for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ._expect import expect_tensor, expect_tensors
from ._layout import DTYPES, unit_stride


def acc_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which rows of x are computed."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _lift(v: Tensor, dim: int) -> Tensor:
    """View v with leading axes of size 1, at least three and at least `dim` in all."""
    return v[(None,) * (max(dim, 3) - v.dim())]


def fold(x: Tensor | None, split: int = 1) -> Tensor | None:
    """View x [..., C] as [B, N, C] with unit stride in C; copies only if no such view exists.

    The first `split` axes become B, the others N.
    """
    if x is None:
        return None
    return unit_stride(_lift(x, 3).flatten(split, -2).flatten(0, split - 1))


def is_shared(v: Tensor, x: Tensor, split: int = 1) -> bool:
    """Return whether v has one row for all tokens of a batch item of `fold(x, split)`."""
    return all(size == 1 for size in _lift(v, x.dim()).shape[split:-1])


def fold_broadcast(v: Tensor | None, x: Tensor, split: int = 1) -> Tensor | None:
    """View v, which broadcasts against x, as `fold(x, split)`, stride 0 where it is broadcast."""
    if v is None:
        return None
    v, x = _lift(v, x.dim()), _lift(x, 3)
    batch, middle = x.shape[:split], x.shape[split:-1]
    v = v.expand(*_needed(v.shape[:split], batch), *_needed(v.shape[split:-1], middle), -1)
    folded = unit_stride(v.flatten(split, -2).flatten(0, split - 1))
    return folded.expand(batch.numel(), middle.numel(), -1)


def _needed(sizes: Sequence[int], whole: Sequence[int]) -> Sequence[int]:
    """Return the sizes to which axes are expanded before they become one: none if all are 1."""
    return sizes if all(size == 1 for size in sizes) else whole


def choose_split(x: Tensor, like: Sequence[Tensor | None], *operands: Tensor | None) -> int:
    """Return how many axes of x to take as batch, so that nothing or little is copied.

    A modulation with one row per frame, [B, F, 1, C] against [B, F, N, C], is broadcast along N
    alone: with F in the batch it is a view, and its gradient a sum over the rows of its frame.
    """
    if x.dim() < 4 or x.numel() == 0:
        return 1

    def copied(split: int) -> int:
        whole = [_lift(v, 3) for v in (x, *like) if v is not None]
        total = sum(0 if _is_view(v, split) else v.numel() for v in whole)
        for v in operands:
            if v is not None:
                v = _lift(v, x.dim())
                sizes = (
                    *_needed(v.shape[:split], x.shape[:split]),
                    *_needed(v.shape[split:-1], x.shape[split:-1]),
                )
                v = v.expand(*sizes, -1)
                total += 0 if _is_view(v, split) else v.numel()
        return total

    return min(range(1, x.dim() - 1), key=copied)


def _is_view(v: Tensor, split: int) -> bool:
    """Return whether the axes before `split`, and those from it to the last, are one each."""

    def one(axes: range) -> bool:
        kept = [(v.shape[i], v.stride(i)) for i in axes if v.shape[i] != 1]
        return all(a[1] == b[0] * b[1] for a, b in pairwise(kept))

    return one(range(split)) and one(range(split, v.dim() - 1))


def unfold_rows(gradient: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """Return the gradient of v from one of each row, [B, N, C]."""
    lifted = _lift(x, 3).shape
    return gradient.view(lifted).sum_to_size(_lift(v, x.dim()).shape).view(v.shape).to(v.dtype)


def unfold_sums(sums: Tensor, v: Tensor, x: Tensor, split: int = 1) -> Tensor:
    """Return the gradient of a shared v from sums over some tokens each, [B, parts, C]."""
    shape = _lift(v, x.dim()).shape
    batch = _lift(x, 3).shape[:split]
    summed = sums.sum(1).view(*batch, *shape[split:]).sum_to_size(shape)
    return summed.to(v.dtype).reshape(v.shape)


def expect_rows(name: str, x: Tensor) -> None:
    """Refuse an x that has no rows, or no floating dtype."""
    expect_tensor(name, x)
    if x.dtype not in DTYPES:
        raise ValueError(f"{name}: expected a floating dtype, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name}: expected [..., C] with C at least 1, got {list(x.shape)}")


def _expect_kind(name: str, v: Tensor, of: str, x: Tensor) -> None:
    if v.dtype != x.dtype:
        raise ValueError(f"{name}: expected the dtype of {of}, {x.dtype}, got {v.dtype}")
    if v.device != x.device:
        raise ValueError(f"{name}: expected the device of {of}, {x.device}, got {v.device}")


def expect_like(name: str, v: Tensor | None, of: str, x: Tensor) -> None:
    """Refuse a v that has not the shape, dtype and device of x, the argument `of`."""
    expect_tensors(**{name: v})
    if v is None:
        return
    if v.shape != x.shape:
        raise ValueError(
            f"{name}: expected the shape of {of}, {list(x.shape)}, got {list(v.shape)}"
        )
    _expect_kind(name, v, of, x)


def expect_broadcast(name: str, v: Tensor | None, of: str, x: Tensor) -> None:
    """Refuse a v that does not broadcast against x with a last axis as long as that of x."""
    expect_tensors(**{name: v})
    if v is None:
        return
    sizes = list(zip(v.shape[::-1], x.shape[::-1], strict=False))
    fits = 1 <= v.dim() <= x.dim() and v.shape[-1] == x.shape[-1]
    if not fits or any(a not in (1, b) for a, b in sizes):
        raise ValueError(
            f"{name}: expected a shape that broadcasts against {of}, {list(x.shape)}, with all of "
            f"its last axis, got {list(v.shape)}"
        )
    _expect_kind(name, v, of, x)


def expect_primal(name: str, tangent: Tensor | None, primal: Tensor | None) -> None:
    """Refuse the tangent of an operand that is not there."""
    if tangent is not None and primal is None:
        raise ValueError(f"{name}: expected {name[2:]} to be given with its tangent, got None")


def expect_wanted(wanted: Sequence[str] | None, primals: dict[str, Tensor | None]) -> int:
    """Return `wanted` as bits in the order of `primals`; None is all that are there."""
    names = list(primals)
    if wanted is None:
        wanted = [name for name, v in primals.items() if v is not None]
    elif isinstance(wanted, str):
        wanted = (wanted,)
    for name in wanted:
        if primals.get(name) is None:
            raise ValueError(
                f"wanted: expected names of given tensors among {', '.join(names)}, got {name!r}"
            )
    return sum(1 << names.index(name) for name in set(wanted))


def wanted_names(names: Sequence[str], ctx: Any, *cotangents: Tensor | None) -> list[str]:
    """Return the inputs of an op whose gradients a backward has to compute.

    Those of tangents come from `cotangents` alone. Without any they are left out rather than zero:
    a zero would be taken through everything that has led to the tangents.
    """
    skipped = all(c is None for c in cotangents)
    needs = zip(names, ctx.needs_input_grad, strict=False)
    return [name for name, need in needs if need and not (skipped and name.startswith("t_"))]


def names_in(asked: int, names: Sequence[str]) -> list[str]:
    """Return the names that the bits of `asked` stand for."""
    return [name for i, name in enumerate(names) if asked >> i & 1]


def pack(found: dict[str, Tensor], names: Sequence[str], x: Tensor) -> tuple[Tensor, ...]:
    """Return one tensor per name, empty where there is none: a registered op returns no None."""
    return tuple(found[name] if name in found else x.new_empty(0) for name in names)


def unpack(outputs: Sequence[Tensor], asked: int) -> tuple[Tensor | None, ...]:
    """Undo `pack`."""
    return tuple(x if asked >> i & 1 else None for i, x in enumerate(outputs))
