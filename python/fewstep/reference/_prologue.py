"""Oracle of what comes before a row is quantised: activation, smoothing, rotation, projection.

    x   <- activation(x)                          rounded to x's dtype
    x'  = x * (1 / smooth)                        one division a column, one product a value
    x'' = x' H_B / sqrt(B)                        of every B neighbours
    low = x down^T                                of x as it is before smoothing

H_B is the Hadamard matrix in Sylvester's order, H_2B = [[H_B, H_B], [H_B, -H_B]]: butterflies at
distance 1, 2, 4, ... B / 2, then one product by B^-1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._epilogue import activate


def activated(x: Tensor, activation: str | None) -> Tensor:
    """Return activation(x) in x's dtype, computed in float64 for float64, else in float32."""
    if activation is None:
        return x
    return activate(x if x.dtype == torch.float64 else x.float(), activation).to(x.dtype)


def rotate_blocks(x: Tensor, size: int) -> Tensor:
    """Return x [..., K] with every `size` neighbours rotated, in x's dtype; its own inverse."""
    if not size or not x.shape[-1]:
        return x
    distance = 1
    while distance < size:
        a, b = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        distance *= 2
    return x * size**-0.5


def prepare(x: Tensor, smooth: Tensor | None, rotate: int) -> Tensor:
    """Return x'' in float64 for float64, else in float32."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if smooth is not None:
        divisor = smooth.to(x.dtype)
        x = x * (torch.ones_like(divisor) / divisor)  # CUDA divides a number inexactly
    return rotate_blocks(x, rotate)


def project(x: Tensor, down: Tensor) -> Tensor:
    """Return low [..., R] in x's dtype, with sums in float64."""
    return (x.double() @ down.double().mT).to(x.dtype)
