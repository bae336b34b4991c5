"""Which derivative is being taken here, and the (primal, tangent) of a tensor in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from ..ops._autograd import transform


def is_forward() -> bool:
    """Return whether the innermost derivative being taken here is a forward one."""
    if torch.compiler.is_compiling():
        return False  # the op takes it from there: right, or it raises
    active = transform()
    if active is not None:
        return active == torch._C._functorch.TransformType.Jvp
    return forward_ad._current_level >= 0


def is_nested() -> bool:
    """Return whether a forward derivative is taken of a forward derivative."""
    levels = retrieve_all_functorch_interpreters()
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1


def unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (primal, tangent) at the current level; a tangent known to be zero is None."""
    if not x.is_floating_point():
        return x, None
    primal, tangent = forward_ad.unpack_dual(x)
    if tangent is not None and tangent._is_zerotensor():
        tangent = None
    return primal, tangent
