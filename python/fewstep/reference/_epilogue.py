"""What a product does with its sums before they are rounded: activation, gate, residual.

    v   = activation(y)
    out = residual + gate * v

"geglu" and "swiglu" halve the last axis: v = y[..., :N/2] * activation(y[..., N/2:]), activation
gelu or silu: the order of diffusers' chunk(2).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "geglu", "swiglu")


def is_glu(activation: str | None) -> bool:
    """Return whether the activation multiplies one half of its input with the other."""
    return activation in ("geglu", "swiglu")


def activate(y: Tensor, activation: str | None) -> Tensor:
    """Return activation(y) in y's dtype."""
    if is_glu(activation):
        value, switch = y.chunk(2, -1)
        return value * activate(switch, "gelu" if activation == "geglu" else "silu")
    if activation is None:
        return y
    if activation == "silu":
        return F.silu(y)
    return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")


def finish(
    y: Tensor, activation: str | None, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Return residual + gate * activation(y) in y's dtype."""
    out = activate(y, activation)
    if gate is not None:
        out = gate.to(y.dtype) * out
    if residual is not None:
        out = residual.to(y.dtype) + out
    return out
