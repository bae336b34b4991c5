"""The end of a low-bit product: activation, gate and residual, in float32, before the rounding.

    v   = activation(y)                          y [..., M, N]: the product, its bias and branch
    out = residual + gate * v                    rounded once to out_dtype

activation   None, "gelu" (with erf), "gelu_tanh", "silu": width N' = N
             "geglu", "swiglu": v = y[..., :N/2] * gelu or silu(y[..., N/2:]): N' = N / 2
gate         [N'], [..., 1, N'] or [..., M, N'], what broadcasts; floating; 1 if absent
residual     [..., M, N']  floating; 0 if absent

With u = 2^-24 and |y' - y| <= e for what the product returns in the place of an exact y,

    |v' - v| <= 1.13 e + 8 u |y|                                      (1.13: the steepest slope)
    |v' - v| <= |act(s)| e + (|y| + e) (1.13 e_s + 8 u |s|) + u |v|   for a half y times act(s)
    |out' - out| <= |gate| |v' - v| + 2 u (|gate v| + |out|)

before the rounding to out_dtype: the activations are y times a number in [0, 1] that is within
some 2^-23 of the exact one, not within as little of what a large negative y leaves of itself.

out_dtype int8 gives (q, scale), to the bit `quantize_int8` of what the product returns in the
activations' dtype if they are floating, else in bfloat16: the input of the next layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference._epilogue import ACTIVATIONS, activate, is_glu
from ._expect import expect_tensors
from ._layout import FLOATS

__all__ = [
    "ACTIVATIONS",
    "activate",
    "expect_activation",
    "expect_epilogue",
    "gate_rows",
    "is_glu",
    "width",
]


def width(N: int, activation: str | None) -> int:
    """Return how many columns are left of N."""
    return N // 2 if is_glu(activation) else N


def expect_activation(activation: str | None) -> None:
    """Refuse an activation without a name."""
    if activation is not None and activation not in ACTIVATIONS:
        wanted = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: expected None or one of {wanted}, got {activation!r}")


def _broadcasts(shape: torch.Size, out: tuple[int, ...]) -> bool:
    if not shape or len(shape) > len(out) or shape[-1] != out[-1]:
        return False
    return all(n in (1, m) for n, m in zip(reversed(shape), reversed(out), strict=False))


def expect_epilogue(
    rows: tuple[int, ...],
    N: int,
    device: torch.device,
    activation: str | None,
    gate: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Refuse an activation without a name, and a gate or a residual that doesn't fit."""
    if activation is None and gate is None and residual is None:
        return
    expect_tensors(gate=gate, residual=residual)
    expect_activation(activation)
    if is_glu(activation) and N % 2:
        raise ValueError(f"w: expected an even N for {activation}, got {N}")
    out = (*rows, width(N, activation))
    for name, x in (("gate", gate), ("residual", residual)):
        if x is None:
            continue
        if name == "gate" and not _broadcasts(x.shape, out):
            raise ValueError(
                f"gate: expected a shape ending in {out[-1]} that broadcasts to {list(out)}, "
                f"got {list(x.shape)}"
            )
        if name == "residual" and x.shape != out:
            raise ValueError(f"residual: expected shape {list(out)}, got {list(x.shape)}")
        if x.dtype not in FLOATS:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {x.dtype}")
        if x.device != device:
            raise ValueError(
                f"{name}: expected the device of the activations, {device}, got {x.device}"
            )


def gate_rows(gate: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Return the gate as [G, N']: row m of the M = prod(rows) flattened ones has row m // (M / G).

    Axes at the end along which it is one row are not repeated; others are, where they have to be.
    No axis is empty.
    """
    full, kept = gate.expand(*rows, gate.shape[-1]), len(rows)
    while kept and (full.stride(kept - 1) == 0 or rows[kept - 1] == 1):
        kept -= 1
    return full[(slice(None),) * kept + (0,) * (len(rows) - kept)].reshape(-1, gate.shape[-1])
