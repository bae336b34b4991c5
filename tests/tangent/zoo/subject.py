"""The call under test: forward mode through an unmodified model in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch

import fewstep

HOW = "`torch.func.jvp` inside `fewstep.forward_mode()`"


def forward_jvp(
    function: Callable[..., torch.Tensor],
    primals: tuple[torch.Tensor, ...],
    tangents: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (y, t_y) of a function that runs a model."""
    with fewstep.forward_mode():
        return torch.func.jvp(function, primals, tangents)
