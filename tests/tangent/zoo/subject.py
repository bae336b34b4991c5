"""The call under test: forward mode through an unmodified model in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .oracle import plain_attention

HOW = "plain `torch.func.jvp` with attention as matmul and softmax"


def forward_jvp(
    function: Callable[..., torch.Tensor],
    primals: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, t_y) of a function that runs a model."""
    with plain_attention():
        return torch.func.jvp(function, primals, tangents)
