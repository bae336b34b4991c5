"""What may come before a row is quantised, in the same pass.

    x  <- activation(x)                       rounded to x's dtype; halves: [..., 2 K] to [..., K]
    x'  = x * (1 / smooth)                    columns evened out (SmoothQuant, arXiv 2211.10438)
    x'' = x' H_B / sqrt(B)                    every B neighbours rotated (QuaRot, arXiv 2404.00456)
    low = x down^T                            the low-rank branch's first product, of x before x'

x       [..., K]   floating                   smooth  [K]     floating, positive
rotate  B          0 for none, or 16, 32, 64, 128 or 256 that divides K
down    [R, K]     x's dtype                  low     [..., R]  x's dtype

What is quantised is x'' instead of x: its largest value, its scale, its roundings. The arithmetic
is float32 and of one order (1 / smooth by one division, one product; butterflies (a + b, a - b) at
distance 1, 2, 4, ... B / 2, that is H_B in Sylvester's order; one product by float32(B^-1/2)), so
every implementation returns the same bits. Sums of up to B values come before the last product: x'
beyond 2^127 / B may overflow there, which makes the row's scale NaN.

The weight that a product multiplies with x'' is (W diag(smooth)) H: H is symmetric and its own
inverse up to rounding, so x'' ((W diag(smooth)) H)^T = x W^T. An outlier channel loses its hold on
the scale of its row: smoothing moves it into the weight, rotation spreads it over B columns.

The activations are those of `_epilogue.py`: x times a number in [0, 1] within 2^-22 of the exact
one, in float32, rounded once to x's dtype, as a tensor between two layers would be. Implementations
differ in those last bits, so where x is next to a tie of its dtype they may round to different
sides; everything behind is of the same bits for the same x.

low is summed in float32 and rounded once to x's dtype. With u half a unit of that dtype

    |low - exact| <= K 2^-24 sum_k |x_k down_rk| + u |exact|

up to subnormals of bfloat16, which AVX512_BF16 takes for zero. Its bits depend neither on threads
nor on the other rows, but implementations and instruction sets sum in orders of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..reference._prologue import activated, rotate_blocks
from ._epilogue import ACTIVATIONS, expect_activation, is_glu, width
from ._expect import expect_tensors
from ._layout import DTYPES, FLOATS

__all__ = [
    "ROTATIONS",
    "activated",
    "activation_cases",
    "expect_prologue",
    "expect_rotation",
    "project",
    "prologue_cases",
    "quantise_apart",
    "rotate_blocks",
]

ROTATIONS = (16, 32, 64, 128, 256)


def expect_rotation(rotate: int, name: str, K: int) -> None:
    """Refuse a block that is none, or does not divide the K of the argument `name`."""
    if isinstance(rotate, bool) or not isinstance(rotate, (int, torch.SymInt)):
        raise TypeError(f"rotate: expected an integer, got {rotate!r}")
    if rotate == 0:
        return
    if rotate not in ROTATIONS:
        raise ValueError(f"rotate: expected 0 or one of {ROTATIONS}, got {rotate!r}")
    if K % rotate:
        raise ValueError(f"rotate: expected a block that divides K = {K} of {name}, got {rotate}")


def expect_prologue(
    name: str,
    x: Tensor,
    smooth: Tensor | None,
    rotate: int,
    down: Tensor | None = None,
    activation: str | None = None,
) -> None:
    """Refuse what does not fit x [..., K], the floating argument `name`."""
    expect_tensors(smooth=smooth, down=down)
    expect_activation(activation)
    if is_glu(activation) and x.shape[-1] % 2:
        raise ValueError(f"{name}: expected an even last axis for {activation}, got {x.shape[-1]}")
    K = width(x.shape[-1], activation)
    expect_rotation(rotate, name, K)
    if smooth is not None:
        allowed = DTYPES if x.dtype == torch.float64 else FLOATS
        if smooth.shape != (K,) or smooth.dtype not in allowed:
            raise ValueError(
                f"smooth: expected floating [{K}], got {smooth.dtype} {list(smooth.shape)}"
            )
    if down is not None and (down.dim() != 2 or down.shape[1] != K or down.dtype != x.dtype):
        raise ValueError(f"down: expected {x.dtype} [R, {K}], got {down.dtype} {list(down.shape)}")
    for argument, value in (("smooth", smooth), ("down", down)):
        if value is not None and value.device != x.device:
            raise ValueError(
                f"{argument}: expected the device of {name}, {x.device}, got {value.device}"
            )


def quantise_apart(
    quantise: Callable[..., tuple[Tensor, ...]], x: Tensor, activation: str, down: Tensor
) -> tuple[Tensor, ...]:
    """Return (q, scale, low) of a kernel without a branch: `quantise(x)`, and torch's product."""
    x = activated(x, activation or None)
    return *quantise(x), project(x, down)


def project(x: Tensor, down: Tensor | None, low: Tensor | None = None) -> Tensor:
    """Return low [..., R]: the one given, or torch's own x down^T in x's dtype."""
    if low is not None:
        return low
    assert down is not None
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return F.linear(x, down)
    return F.linear(x, down)


def prologue_cases(
    device: torch.device, K: int
) -> list[tuple[tuple[Any, ...], dict[str, Any], float, float]]:
    """Return gate cases of a quantising op on rows of K, a multiple of 256; bits must agree."""
    generator = torch.Generator().manual_seed(2)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float, float]] = []
    smooth = (torch.rand(K, generator=generator) + 0.1).to(device)
    for dtype in FLOATS:
        x = torch.randn((7, K), generator=generator).to(device, dtype)
        cases.append(((x,), {"smooth": smooth.to(dtype)}, 0.0, 0.0))
        cases += [((x,), {"rotate": rotate}, 0.0, 0.0) for rotate in (16, 256)]
        cases.append(((x,), {"smooth": smooth, "rotate": 128}, 0.0, 0.0))
    return cases


def activation_cases(
    device: torch.device, K: int
) -> list[tuple[tuple[Any, ...], dict[str, Any], float]]:
    """Return gate cases of a quantising op on rows that K values are left of, bounded in norm.

    Against an oracle that rounds nothing but q: half a unit of bfloat16 moves one in 2^-9 |v| of
    int8's v by one, and one in 40 of e4m3's by a sixteenth, which is 1.5e-2 of either in norm;
    float32's 2^-22 as many times less.
    """
    generator = torch.Generator().manual_seed(3)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], float]] = []
    for dtype, bound in ((torch.float32, 5e-3), (torch.bfloat16, 4e-2)):
        for activation in ACTIVATIONS:
            columns = 2 * K if is_glu(activation) else K
            x = torch.randn((5, columns), generator=generator).to(device, dtype)
            cases.append(((x,), {"activation": activation}, bound))
    return cases
